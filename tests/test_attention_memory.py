"""The CPU implementations never hold a matrix of queries times keys, forward or backward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvops.eager import attention, scores, window


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation inside has written."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "window_left": 100},
        {"window_left": 350, "window_right": 10},
        {"causal": True, "softcap": 5.0},
        {"causal": True, "alibi_slopes": torch.tensor([0.1, 0.2])},
        {"causal": True, "dropout_p": 0.1, "dropout_seed": torch.tensor([5])},
    ],
    ids=["causal", "window", "wide window", "softcap", "alibi", "dropout"],
)
def test_no_tensor_grows_with_the_square_of_the_length(options, monkeypatch):
    # Tiles of a fixed size would hide a matrix of this short a sequence.
    monkeypatch.setattr(window, "_TILE_ELEMENTS", 1 << 14)
    monkeypatch.setattr(attention, "_MASK_ELEMENTS", 1 << 14)
    length = 512
    q, k = torch.randn(1, length, 2, 8), torch.randn(1, length, 1, 8)
    with LargestTensor() as largest:
        out, lse = attention.flash_attention(q, k, k, **options)
        attention.flash_attention_backward(out, q, k, k, out, lse, **options)
        if "dropout_p" not in options:
            scores.attention_scores(q[:, -300:], k, lse[:, :, -300:], **options)
    assert largest.elements <= 64 * length  # the matrix: 2 * 512 * length
