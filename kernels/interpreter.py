"""Changes of Triton's interpreter that the kernels need."""

from typing import Any

import triton


def mend_loop_bounds() -> None:
    """Let kernels loop up to a scalar with all supported versions of Triton and NumPy.

    Triton 3.6 calls ``int()`` on an array of one element there. NumPy 2.5 rejects that unless the array is 0-d. Triton
    3.7 squeezes it first, as this does.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    from triton.runtime import interpreter

    patch_tensor: Any = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


def mend_masks() -> None:
    """Let masks be joined with conditions on scalars in all supported versions of Triton.

    Where the interpreter makes a block of what a comparison of two int32 scalars gives, it makes one of int32, not one
    of bool. Triton 3.9 refuses such masks.
    """
    from triton.runtime import interpreter

    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, shape: Any, scalar: Any) -> Any:
        handle = splat(self, shape, scalar)
        if scalar.data.dtype == bool:
            handle.data = handle.data.astype(bool)
        return handle

    interpreter.InterpreterBuilder.create_splat = create_splat
