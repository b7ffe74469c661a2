"""Whether sequences stay in their tokens, and lists in their tables and the cache: kernels ask before anything else.

On a CPU a wrong number would end the process, or change what belongs to something else.
"""

from kvops.kernels.cpu.jit import jit


@jit
def blocks_are_inside(table, first, last, num_blocks):
    """Whether the blocks [first, last) of a table are in a cache of ``num_blocks``."""
    inside = True
    for j in range(first, last):
        inside &= 0 <= table[j] < num_blocks
    return inside


@jit
def counts_are_inside(counts, most):
    """Whether every sequence has 0 to ``most`` tokens."""
    inside = True
    for count in counts:
        inside &= 0 <= count <= most
    return inside


@jit
def lists_are_inside(tables, lens, num_blocks, size):
    """Whether all lists [B, H] fit in their tables, and their blocks of ``size`` slots are in the cache."""
    for b in range(lens.shape[0]):
        for h in range(lens.shape[1]):
            length = lens[b, h]
            if not 0 <= length <= tables.shape[2] * size:
                return False
            if not blocks_are_inside(tables[b, h], 0, -(-length // size), num_blocks):
                return False
    return True
