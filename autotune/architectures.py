"""Families of GPU architectures: what is known of one member serves the others until there is a better answer.

Within a family the matrix instructions, registers and copy engines are the same, and kernels compile to nearly the same
code: sm_103 (B300) is a faster sm_100 (B200), sm_121 (GB10) a smaller sm_120.
"""

from functools import cache


@cache
def family(arch: str) -> str:
    """The architecture that stands for the family of ``arch``: ``"sm_100"`` for ``"sm_103"``, ``"gfx942"`` for
    ``"gfx940"``; ``arch`` itself where no family is known."""
    for member, representative in (
        ("sm_9", "sm_90"),
        ("sm_10", "sm_100"),
        ("sm_12", "sm_120"),
        ("gfx94", "gfx942"),
        ("gfx95", "gfx950"),
    ):
        if arch.startswith(member) and len(arch) == len(representative):
            return representative
    return arch


def has_tma(arch: str) -> bool:
    """Whether a tensor memory accelerator copies tiles by descriptor (Hopper and later); elsewhere Triton expands
    loads through descriptors into ordinary ones."""
    return family(arch) in ("sm_90", "sm_100", "sm_120")
