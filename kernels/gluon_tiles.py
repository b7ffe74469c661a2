"""Parts of the warp-specialised kernels for Hopper: the order of work items and tiles, and the slots of tiles.

In each kernel a producer copies tiles with TMA and two consumers compute. Tiles go through a ring of slots: tile t
lives in slot t % STAGES until both consumers have released it. ``gluon_flash_forward_kernel`` explains the barriers.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.6 and 3.7 have other names for these than later versions.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
group_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
# The most tokens of packed sequences, and the size at which an address wraps around (see descriptor).
TURN = gl.constexpr(1 << 30)


@gluon.jit
def work_item(work, blocks, heads, section, section_works):
    """Which (row block, head) the number ``work`` stands for; ``heads`` counts those of all sequences.

    Heads are taken in sections whose keys and values fit in the L2 cache together (``section_works`` is section x
    blocks). Within a section the last row blocks come first: under a causal mask they see the most keys, and no long
    work starts late.
    """
    number = work // section_works
    rest = work - number * section_works
    first = number * section
    width = min(section, heads - first)
    # What max() guards cannot happen; it keeps sums of arguments from being formed, held and spilled ahead of the loop.
    return max(0, blocks - 1 - rest // width), first + rest % width


@gluon.jit
def key_tiles(row, rows, low, high, seqlen_k, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, BLOCK: gl.constexpr):
    """The tiles of keys that the queries row .. row + rows - 1 see.

    Query i sees the keys from i + low to before i + high.
    Returns first <= full_first <= full_last <= last in tiles: every query sees the whole of the tiles full_first ..
    full_last - 1, the others from first to last - 1 need a mask, and what is outside is seen by none.
    """
    keys = seqlen_k
    first = 0
    full_first = 0
    full_last = seqlen_k // BLOCK
    if HAS_HIGH:
        keys = max(0, min(seqlen_k, row + high + rows - 1))
        full_last = max(0, min(seqlen_k, row + high)) // BLOCK
    if rows <= 0:
        keys = 0
    last = (keys + BLOCK - 1) // BLOCK
    if HAS_LOW:
        first = min(last, max(0, row + low) // BLOCK)
        full_first = min(last, (max(0, row + low + rows - 1) + BLOCK - 1) // BLOCK)
    full_last = max(full_first, min(last, full_last))
    return first, full_first, full_last, last


@gluon.jit
def consumer_tiles(
    block_row, CONSUMER: gl.constexpr, ROWS: gl.constexpr, length, low, high, walked, HAS_LOW: gl.constexpr,
    HAS_HIGH: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """The tiles that a block of 2 x ROWS rows needs, of which a consumer's are to be masked, seen whole or skipped.

    Returns the block's first tile and, counted from there (fewer numbers to hold in the loop), how many the block has
    and the consumer's first, full_first, full_last and last (see ``key_tiles``).
    """
    row = block_row + CONSUMER * ROWS
    block_first, _, _, block_last = key_tiles(
        block_row, min(2 * ROWS, length - block_row), low, high, walked, HAS_LOW, HAS_HIGH, BLOCK
    )
    first, full_first, full_last, last = key_tiles(
        row, min(ROWS, length - row), low, high, walked, HAS_LOW, HAS_HIGH, BLOCK
    )
    first -= block_first
    full_first -= block_first
    full_last -= block_first
    last -= block_first
    return block_first, block_last - block_first, first, full_first, full_last, last


@gluon.jit
def slots(desc, NUMBER: gl.constexpr):
    """Shared memory for so many of the tiles that ``desc`` copies."""
    return gl.allocate_shared_memory(desc.dtype, [NUMBER] + desc.block_type.shape, desc.layout)  # noqa: RUF005


@gluon.jit
def barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """So many barriers, each of which completes a phase with COUNT arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=COUNT)
    return made


@gluon.jit
def give_back(empty):
    """Say that this consumer is done with a slot, once all of its warps are."""
    group_barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def skip(first, last, full, empty, STAGES: gl.constexpr):
    """Give back unread the tiles numbered first .. last - 1, each after it arrived."""
    for t in range(first, last):
        mbarrier.wait(full.index(t % STAGES), t // STAGES & 1)
        give_back(empty.index(t % STAGES))


@gluon.jit
def rows_at(batch, head, row, first, length, PACKED: gl.constexpr):
    """Coordinates, in the descriptor, of the rows of one head from ``row`` of a sequence on.

    Of packed sequences those that TMA finds outside are exactly those from ``length`` on (see ``descriptor``).
    """
    place = batch, row, head, 0
    if PACKED:
        place = TURN, first + length, TURN - length + row, head, 0
    return place


def bounded(window_left: int, window_right: int, seqlen_q: int, seqlen_k: int) -> tuple[bool, bool]:
    """Whether a window bounds the keys on the left and on the right; one that reaches past the ends does not.

    Positions run from seqlen_k - seqlen_q to seqlen_k - 1.
    """
    return 0 <= window_left < seqlen_k - 1, 0 <= window_right < seqlen_q - 1


def descriptor(tensor: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """A TMA descriptor whose block is ``rows`` tokens of one head: past the ends it reads 0 and writes nothing.

    Each of several packed sequences [tokens, heads, head_dim] has its own end. Two more dimensions have strides
    2^33 - s and s, where s is the stride of a token. They map the coordinates of rows_at, (2^30, first + length,
    2^30 - length + row), to element 2^63 + (first + row) s. 2^63 elements are 2^64 bytes, which vanish from an address.
    TMA compares the third coordinate with the size of its dimension, 2^30, so rows from ``length`` on are outside.
    (The method is that of Triton's tools/ragged_tma.py.)
    """
    # A dimension of size 1 may have any stride, also one that TMA rejects.
    strides = [stride if size > 1 else 8 for stride, size in zip(tensor.stride()[:-1], tensor.shape, strict=False)]
    shape, block = list(tensor.shape), [rows, 1, width]
    if tensor.dim() == 3:
        strides = [2**33 - strides[0], strides[0], *strides]
        shape, block = [2**31 - 1, 2**31 - 1, TURN.value, *shape[1:]], [1, *block]
    block = [1, *block]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, shape, [*strides, 1], block, layout)
