"""The kernels run in the interpreters of all supported versions of Triton."""

import numpy as np
import pytest
import torch
import triton
from conftest import DEVICE
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

import kvops
from kvops.kernels.interpreter import mend_loop_bounds


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels were not imported for the interpreter")
def test_kernels_loop_up_to_a_scalar_with_triton_3_6_and_numpy_2_5(monkeypatch):
    """That Triton takes int() of an array [1] there, and that NumPy refuses: no kernel with a loop ran."""
    patch_tensor = interpreter._patch_lang_tensor

    def refuse(self):
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    def refusing(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", refuse)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", refusing)
    q, k, v = torch.randn(3, 1, 40, 2, 16)
    with pytest.raises(InterpreterError, match="0-dimensional"):
        kvops.flash_attention(q, k, v)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    mend_loop_bounds()
    assert kvops.flash_attention(q, k, v)[0].isfinite().all()


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels were not imported for the interpreter")
def test_masks_of_conditions_on_scalars_are_masks(monkeypatch):
    """Triton 3.9 refuses masks of int32, which its interpreter made of them."""
    store, masks = interpreter.InterpreterBuilder.create_masked_store, []

    def create_masked_store(self, pointers, values, mask, *options):
        masks.append(mask.data.dtype)
        return store(self, pointers, values, mask, *options)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", create_masked_store)
    lens = torch.tensor([[40, 3]], dtype=torch.int32)
    tables = torch.arange(6, dtype=torch.int32).view(1, 2, 3)
    kvops.paged_attention(torch.randn(1, 1, 2, 16), *torch.randn(2, 6, 16, 16), tables, lens, batch_invariant=True)
    assert set(masks) == {np.dtype(bool)}
