"""Tests that run the warp-specialised kernels themselves."""

import pytest
import torch

from kvops.kernels.device import current_device


def _no_hopper() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return "no Hopper GPU"
    return "" if current_device().arch == "sm_90" else "the kernels were imported for the interpreter"


def on_hopper(test):
    """Skips unless there is a Hopper GPU and the kernels were imported to run on it."""
    skip = pytest.mark.skipif(bool(_no_hopper()), reason=_no_hopper() or "runs")
    return pytest.mark.gpu(skip(test))
