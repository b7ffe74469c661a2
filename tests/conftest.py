"""Fixtures that every family shares.

``backend`` runs a test twice: once on the eager implementation and once on the Triton kernels, which run in Triton's
interpreter on a machine without a GPU and as compiled kernels where ``KVOPS_TEST_DEVICE=cuda``.
"""

import importlib
import os
import pathlib

import pytest
import torch

DEVICE = os.environ.get("KVOPS_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    # Triton reads this when a kernel is decorated: import every kernel while it is set.
    os.environ["TRITON_INTERPRET"] = "1"
    for _path in sorted((pathlib.Path(__file__).parent.parent / "kernels").glob("[!_]*.py")):
        importlib.import_module(f"kvops.kernels.{_path.stem}")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(params=["eager", "triton"])
def backend(request, monkeypatch) -> str:
    """The implementation under test; on a GPU only the kernels exist."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1" if request.param == "triton" else "0")
    elif request.param == "eager":
        pytest.skip("the eager implementation serves CPU tensors")
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Keep the tests of the real model in one process: loading it takes longer than most of them."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.get_closest_marker("model"):
                item.add_marker(pytest.mark.xdist_group("model"))
