"""What Triton's interpreter needs to run the kernels."""

from typing import Any

import triton


def mend_loop_bounds() -> None:
    """Let kernels loop up to a scalar, whatever the versions of Triton and NumPy.

    Triton 3.6 takes ``int()`` of an array of one element there, which NumPy 2.5 refuses unless it has no dimension.
    Triton 3.7 squeezes it, too.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return
    from triton.runtime import interpreter

    patch_tensor: Any = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch
