"""Flash attention, forward, for Hopper in Gluon: warp groups that specialise (Shah et al., FlashAttention-3, 2024).

A program is three warp groups. The producer (one warp) copies tiles with TMA: a block of 2 x BLOCK_ROWS queries, then K
and V tiles through a ring of STAGES slots. Two consumers own BLOCK_ROWS queries each. While a consumer computes the
softmax of tile i, the tensor cores multiply P V of tile i - 1; the other consumer's softmax covers Q K^T.

Dense and packed sequences run the same source. A packed call passes the cumulative lengths: a work is then a block of
one sequence's rows, as many for each as the longest has, and a group that finds it past the end goes on to the next.
All three read the same lengths, so they agree.

Barriers
--------
All are mbarriers in shared memory; "wait(phase)" returns once the barrier's phase number ``phase`` (mod 2) is complete.

- ``k_full[s]``, ``v_full[s]`` (count 1): the producer expects the bytes of a tile, TMA completes them. The t-th tile
  ever loaded by this program (t counts through all of its works) lives in slot t % STAGES and completes phase
  t // STAGES of that slot, so consumers wait for phase (t // STAGES) & 1.
- ``k_empty[s]``, ``v_empty[s]`` (count 2, one arrival of each consumer for each tile): phase t // STAGES completes when
  both gave tile t back. Before tile t is loaded the producer waits for phase t // STAGES - 1, whose parity is
  (t // STAGES & 1) ^ 1; for the first STAGES tiles that is the parity of the phase "before" an unused barrier, which
  counts as complete.
- ``q_full[c]`` (count 1), ``q_empty[c]`` (count 1): the same with one slot for each consumer; the n-th work of a
  program is phase n. The output leaves through the query slot, so a consumer gives it back after TMA has read it.

A parity is enough because nobody is ever two phases behind: a consumer gives a tile back only after it has seen it full
(even a tile that none of its rows sees), and the producer fills a slot only after both gave it back. That is also why a
tile that is skipped is waited for: an early arrival would be counted for the tile that was in the slot before.

No deadlock: the producer loads K(t), V(t), K(t + 1), ... and to load tile t it waits only until tile t - STAGES was
given back. A consumer gives back K(t) once it is multiplied, and V(t) after tile t + 1 has arrived; with STAGES >= 2
that one was loaded before.

An arrival is made by one thread while each warp reads shared memory for itself: a barrier of the warp group before it
makes sure that all four warps are done with the tile.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvops.autotune.config import GluonFlashForwardConfig
from kvops.autotune.lookup import choose
from kvops.kernels.dense import dense_problem, describable, mask_bounds, padded
from kvops.kernels.device import current_device

# Triton 3.6 and 3.7 spell these differently from what came after.
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_LOG2_E = 1.4426950408889634
LOG2_E = gl.constexpr(_LOG2_E)
LN_2 = gl.constexpr(0.6931471805599453)
# Tokens that packed sequences may have, and what brings an address round to where it was: see descriptor.
_TURN = 1 << 30
TURN = gl.constexpr(_TURN)


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
def sequence(cu_seqlens_ptr, batch, length):
    """The first token and the length of sequence ``batch``: 0 and ``length`` unless it is a packed one."""
    first = 0
    if cu_seqlens_ptr is not None:
        first = gl.load(cu_seqlens_ptr + batch)
        length = gl.load(cu_seqlens_ptr + batch + 1) - first
    return first, length


@gluon.jit
def rows_at(batch, head, row, first, length, PACKED: gl.constexpr):
    """Coordinates, in the descriptor, of the rows of one head from ``row`` of a sequence on.

    Of packed sequences those that TMA finds outside are exactly those from ``length`` on (see ``descriptor``).
    """
    place = batch, row, head, 0
    if PACKED:
        place = TURN, first + length, TURN - length + row, head, 0
    return place


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
def _producer(
    q_desc, k_desc, v_desc, cu_q_ptr, cu_k_ptr,
    q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works,
    GROUP: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    BLOCK_ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the queries and then every key and value tile that any row of the block sees, for one work after another."""
    PACKED: gl.constexpr = cu_q_ptr is not None
    loaded = 0
    done = 0
    for work in range(gl.program_id(0), works, programs):
        block, batch_head = work_item(work, blocks, all_heads, section, section_works)
        batch = batch_head // heads
        head = batch_head % heads
        row = block * (2 * BLOCK_ROWS)
        first_q, length_q = sequence(cu_q_ptr, batch, seqlen_q)
        if not PACKED or row < length_q:
            first_k, length_k = sequence(cu_k_ptr, batch, seqlen_k)
            offset = length_k - length_q if PACKED else 0
            for c in gl.static_range(2):
                mbarrier.wait(q_empty.index(c), (done & 1) ^ 1)
                mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
                rows = rows_at(batch, head, row + c * BLOCK_ROWS, first_q, length_q, PACKED)
                _load(q_desc, rows, q_full.index(c), q_tiles.index(c))
            first, _, _, last = key_tiles(
                row, min(2 * BLOCK_ROWS, length_q - row), low + offset, high + offset, length_k, HAS_LOW, HAS_HIGH,
                BLOCK_N,
            )  # fmt: skip
            for i in range(first, last):
                slot = loaded % STAGES
                phase = (loaded // STAGES & 1) ^ 1
                rows = rows_at(batch, head // GROUP, i * BLOCK_N, first_k, length_k, PACKED)
                mbarrier.wait(k_empty.index(slot), phase)
                mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
                _load(k_desc, rows, k_full.index(slot), k_tiles.index(slot))
                mbarrier.wait(v_empty.index(slot), phase)
                mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
                _load(v_desc, rows, v_full.index(slot), v_tiles.index(slot))
                loaded += 1
            done += 1


@gluon.jit
def _give_back(empty):
    """Say that this consumer is done with a slot, once all of its warps are."""
    _barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def _skip(first, last, k_full, k_empty, v_full, v_empty, STAGES: gl.constexpr):
    """Give back unread the tiles numbered first .. last - 1, each after it arrived."""
    for t in range(first, last):
        slot = t % STAGES
        phase = t // STAGES & 1
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.wait(v_full.index(slot), phase)
        _barrier()
        mbarrier.arrive(k_empty.index(slot), count=1)
        mbarrier.arrive(v_empty.index(slot), count=1)


@gluon.jit
def _softmax(s, m, l, key, first_key, end_key, scale, softcap, HAS_SOFTCAP: gl.constexpr, MASKED: gl.constexpr):
    """Fold a tile of dot products into the running maximum m and sum l (Milakov and Gimelshein, 2018).

    ``scale`` includes log2(e); with a softcap c, it is divided by c, and ``softcap`` is c log2(e). Row r sees the keys
    from first_key[r] to before end_key[r]; ``key`` is the tile's first. Returns p, the factor for what was accumulated
    before, m and l.
    """
    if HAS_SOFTCAP:
        # tanh through exp2 of a negative number: it saturates to +-1 without an overflow.
        t = gl.exp2(gl.abs(s) * (scale * -2.0))
        s = gl.where(s < 0.0, t - 1.0, 1.0 - t) / (1.0 + t)
        scale = softcap
    if MASKED:
        column = key + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        column = gl.expand_dims(column, 0)
        seen = (column >= gl.expand_dims(first_key, 1)) & (column < gl.expand_dims(end_key, 1))
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    shift = m_new
    if MASKED:
        shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
    rescale = gl.exp2(m - shift)
    l = l * rescale + gl.sum(p, 1)
    return p, rescale, m_new, l


@gluon.jit
def _attend(
    acc, p, m, l, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, first, last, shift,
    first_key, end_key, scale, softcap,
    HAS_SOFTCAP: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Steps for the tiles first .. last - 1, each finishing the one before it: on entry and on exit ``p`` still has to
    be multiplied with the value tile of the last step, which has arrived. Tile i is the (i + shift)-th that this
    program loads."""
    BLOCK_ROWS: gl.constexpr = q.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[-3]
    BLOCK_D: gl.constexpr = q.shape[1]
    P_LAYOUT: gl.constexpr = p.type.layout
    zeros = gl.zeros([BLOCK_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    for i in range(first, last):
        t = i + shift
        slot = t % STAGES
        before = (t - 1) % STAGES
        mbarrier.wait(k_full.index(slot), t // STAGES & 1)
        k = k_tiles.index(slot).reshape([BLOCK_N, BLOCK_D])
        s_pending = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        v = v_tiles.index(before).reshape([BLOCK_N, BLOCK_D])
        acc_pending = warpgroup_mma(p, v, acc, is_async=True)
        # The products finish in the order they were started: with one left, Q K^T is done.
        s = warpgroup_mma_wait(1, deps=[s_pending])
        _give_back(k_empty.index(slot))
        p_next, rescale, m, l = _softmax(s, m, l, i * BLOCK_N, first_key, end_key, scale, softcap, HAS_SOFTCAP, MASKED)
        # V of this tile is needed by the next step only, but this wait and the dependency on p_next keep the assembler
        # from moving the exponentials behind the wait for P V: they are what runs beside it.
        mbarrier.wait(v_full.index(slot), t // STAGES & 1)
        acc, p = warpgroup_mma_wait(0, deps=[acc_pending, gl.convert_layout(p_next.to(k.dtype), P_LAYOUT)])
        _give_back(v_empty.index(before))
        acc *= gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, p, m, l


@gluon.jit
def _consumer(
    out_desc, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
    q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works, scale, softcap,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Attention of one half of the block's queries, for one work after another."""
    PACKED: gl.constexpr = cu_q_ptr is not None
    BLOCK_ROWS: gl.constexpr = q_tiles.shape[-3]
    BLOCK_N: gl.constexpr = k_tiles.shape[-3]
    BLOCK_D: gl.constexpr = q_tiles.shape[-1]
    DTYPE: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ACC_ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, ACC_LAYOUT)

    q = q_tiles.index(CONSUMER).reshape([BLOCK_ROWS, BLOCK_D])
    rows = gl.arange(0, BLOCK_ROWS, ROW_LAYOUT)
    loaded = 0
    done = 0
    for work in range(gl.program_id(0), works, programs):
        block, batch_head = work_item(work, blocks, all_heads, section, section_works)
        batch = batch_head // heads
        head = batch_head % heads
        block_row = block * (2 * BLOCK_ROWS)
        first_q, length_q = sequence(cu_q_ptr, batch, seqlen_q)
        if not PACKED or block_row < length_q:
            _, length_k = sequence(cu_k_ptr, batch, seqlen_k)
            offset = length_k - length_q if PACKED else 0
            row = block_row + CONSUMER * BLOCK_ROWS
            block_first, _, _, block_last = key_tiles(
                block_row, min(2 * BLOCK_ROWS, length_q - block_row), low + offset, high + offset, length_k,
                HAS_LOW, HAS_HIGH, BLOCK_N,
            )  # fmt: skip
            first, full_first, full_last, last = key_tiles(
                row, min(BLOCK_ROWS, length_q - row), low + offset, high + offset, length_k, HAS_LOW, HAS_HIGH, BLOCK_N,
            )  # fmt: skip
            shift = loaded - block_first

            first_key = gl.full([BLOCK_ROWS], 0, gl.int32, ROW_LAYOUT)
            end_key = first_key + length_k
            if HAS_LOW:
                first_key = gl.maximum(first_key, row + low + offset + rows)
            if HAS_HIGH:
                end_key = gl.minimum(end_key, row + high + offset + rows)
            if sinks_ptr is not None:
                # The sink is a key whose value is 0: the softmax starts with it.
                m = (
                    gl.full([BLOCK_ROWS], 0.0, gl.float32, ROW_LAYOUT)
                    + gl.load(sinks_ptr + head).to(gl.float32) * LOG2_E
                )
                l = gl.full([BLOCK_ROWS], 1.0, gl.float32, ROW_LAYOUT)
            else:
                m = gl.full([BLOCK_ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
                l = gl.zeros([BLOCK_ROWS], gl.float32, ROW_LAYOUT)
            acc = gl.zeros([BLOCK_ROWS, BLOCK_D], gl.float32, ACC_LAYOUT)

            mbarrier.wait(q_full.index(CONSUMER), done & 1)
            if last > first:
                _skip(loaded, first + shift, k_full, k_empty, v_full, v_empty, STAGES)
                t = first + shift
                mbarrier.wait(k_full.index(t % STAGES), t // STAGES & 1)
                k = k_tiles.index(t % STAGES).reshape([BLOCK_N, BLOCK_D])
                zeros = gl.zeros([BLOCK_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
                s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                _give_back(k_empty.index(t % STAGES))
                p, _rescale, m, l = _softmax(
                    s, m, l, first * BLOCK_N, first_key, end_key, scale, softcap, HAS_SOFTCAP, True
                )
                p = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
                mbarrier.wait(v_full.index(t % STAGES), t // STAGES & 1)
                if HAS_LOW:
                    acc, p, m, l = _attend(
                        acc, p, m, l, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, first + 1, full_first,
                        shift, first_key, end_key, scale, softcap, HAS_SOFTCAP, True, STAGES, S_LAYOUT,
                    )  # fmt: skip
                acc, p, m, l = _attend(
                    acc, p, m, l, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, max(first + 1, full_first),
                    full_last, shift, first_key, end_key, scale, softcap, HAS_SOFTCAP, False, STAGES, S_LAYOUT,
                )  # fmt: skip
                acc, p, m, l = _attend(
                    acc, p, m, l, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, max(first + 1, full_last),
                    last, shift, first_key, end_key, scale, softcap, HAS_SOFTCAP, True, STAGES, S_LAYOUT,
                )  # fmt: skip
                t = last - 1 + shift
                v = v_tiles.index(t % STAGES).reshape([BLOCK_N, BLOCK_D])
                acc_pending = warpgroup_mma(p, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc_pending])
                _give_back(v_empty.index(t % STAGES))
                _skip(last + shift, block_last + shift, k_full, k_empty, v_full, v_empty, STAGES)
            else:
                _skip(loaded, block_last + shift, k_full, k_empty, v_full, v_empty, STAGES)

            sees_a_key = end_key > first_key
            lse = gl.where(sees_a_key, (m + gl.log2(l)) * LN_2, float("-inf"))
            lse_row = head * seqlen_q + first_q + row if PACKED else batch_head * seqlen_q + row
            gl.store(lse_ptr + lse_row + rows, lse, mask=row + rows < length_q)
            inverse = 1.0 / gl.where(sees_a_key, l, 1.0)
            acc *= gl.expand_dims(gl.convert_layout(inverse, ACC_ROW_LAYOUT), 1)
            # The queries are read: the output leaves from where they were.
            q.store(acc.to(DTYPE))
            fence_async_shared()
            _barrier()
            _store(out_desc, rows_at(batch, head, row, first_q, length_q, PACKED), q_tiles.index(CONSUMER))
            tma.store_wait(0)
            _give_back(q_empty.index(CONSUMER))
            loaded += block_last - block_first
            done += 1


@gluon.jit
def _consumer_0(
    out_desc, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
    q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works, scale, softcap,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, HAS_SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _consumer(
        out_desc, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
        q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works,
        scale, softcap, HAS_LOW, HAS_HIGH, HAS_SOFTCAP, STAGES, 0,
    )  # fmt: skip


@gluon.jit
def _consumer_1(
    out_desc, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
    q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works, scale, softcap,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, HAS_SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _consumer(
        out_desc, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
        q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works,
        scale, softcap, HAS_LOW, HAS_HIGH, HAS_SOFTCAP, STAGES, 1,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "seqlen_q",
        "seqlen_k",
        "low",
        "high",
        "blocks",
        "works",
        "programs",
        "all_heads",
        "section",
        "section_works",
    ]
)
def gluon_flash_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works, scale, softcap,
    GROUP: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_desc.dtype
    BLOCK_ROWS: gl.constexpr = q_desc.block_type.shape[-3]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[-3]
    q_tiles = gl.allocate_shared_memory(DTYPE, [2] + q_desc.block_type.shape, q_desc.layout)  # noqa: RUF005
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES] + k_desc.block_type.shape, k_desc.layout)  # noqa: RUF005
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES] + v_desc.block_type.shape, v_desc.layout)  # noqa: RUF005
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(2):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=2)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=2)
    # The copy engine must see the barriers as they were initialised.
    fence_async_shared()
    _barrier()
    gl.warp_specialize(
        [
            (
                _consumer_0,
                (
                    out_desc, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr, q_tiles, k_tiles, v_tiles,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works,
                    scale, softcap, HAS_LOW, HAS_HIGH, HAS_SOFTCAP, STAGES,
                ),
            ),
            (
                _consumer_1,
                (
                    out_desc, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr, q_tiles, k_tiles, v_tiles,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works,
                    scale, softcap, HAS_LOW, HAS_HIGH, HAS_SOFTCAP, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, cu_q_ptr, cu_k_ptr, q_tiles, k_tiles, v_tiles,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works,
                    GROUP, HAS_LOW, HAS_HIGH, BLOCK_ROWS, BLOCK_N, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launchable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> str | None:
    """Why these (valid) arguments, dense or packed, cannot be launched, or None if they can."""
    arch = current_device().arch
    if arch != "sm_90":
        return f"needs a Hopper GPU (sm_90), this is {arch}"
    if q.dtype not in _DTYPES:
        return f"needs float16 or bfloat16, got {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"needs head sizes up to 256, got {q.shape[-1]} and {v.shape[-1]}"
    if v.shape[-1] % 8:
        return f"needs a value head size that is a multiple of 8, got {v.shape[-1]}"
    if q.shape[:-1].numel() >= 2**31:
        return f"needs fewer than 2^31 rows of queries, got shape {list(q.shape)}"
    if alibi_slopes is not None:
        return "has no ALiBi"
    if scale is not None and not scale > 0:
        return f"needs a positive scale, got {scale}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if 0 in tensor.shape:
            return f"needs {name} to have elements, got shape {list(tensor.shape)}"
        if tensor.dim() == 3 and tensor.shape[0] > _TURN:
            return f"needs {name} to have at most 2^30 tokens, got shape {list(tensor.shape)}"
        if not describable(tensor):
            return f"needs {name} aligned to 16 bytes, base and strides, got strides {list(tensor.stride())}"
    return None


_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def bounded(window_left: int, window_right: int, seqlen_q: int, seqlen_k: int) -> tuple[bool, bool]:
    """Whether there is a window on the left and on the right: one that reaches past the ends is none.

    Positions run from seqlen_k - seqlen_q to seqlen_k - 1.
    """
    return 0 <= window_left < seqlen_k - 1, 0 <= window_right < seqlen_q - 1


def descriptor(tensor: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """A TMA descriptor whose block is ``rows`` tokens of one head: past the ends it reads 0 and writes nothing.

    Of packed sequences [tokens, heads, head_dim] each ends for itself. Two more dimensions of strides 2^33 - s and s, s
    being that of a token, bring rows_at's coordinates (2^30, first + length, 2^30 - length + row) to the element
    2^63 + (first + row) s: 2^64 bytes, which no address shows, and the row. TMA compares the third with 2^30, that
    dimension's size, so a row is outside from ``length`` on. (Known from Triton's tools/ragged_tma.py.)
    """
    # The stride of a dimension of size 1 may be anything, which TMA would refuse.
    strides = [stride if size > 1 else 8 for stride, size in zip(tensor.stride()[:-1], tensor.shape, strict=False)]
    shape, block = list(tensor.shape), [rows, 1, width]
    if tensor.dim() == 3:
        strides = [2**33 - strides[0], strides[0], *strides]
        shape, block = [2**31 - 1, 2**31 - 1, _TURN, *shape[1:]], [1, *block]
    block = [1, *block]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, shape, [*strides, 1], block, layout)


def gluon_flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    config: GluonFlashForwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; see ``kvops.flash_attention``. ``config`` replaces the one that would be chosen.

    Raises ValueError with the reason where ``launchable`` gives one.
    """
    _refuse(launchable(q, k, v, scale=scale, alibi_slopes=alibi_slopes))
    window_left, window_right = mask_bounds(causal, window_left, window_right)
    sizes = q.shape[0], q.shape[1], k.shape[1]
    config = config or choose(
        "gluon_flash_forward", current_device(), *dense_problem(q, v, *sizes, window_left, window_right)
    )
    return launch(q, k, v, None, None, *sizes, window_left, window_right, scale, softcap, sinks, config)


def gluon_flash_forward_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    config: GluonFlashForwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on packed sequences; see ``kvops.flash_attention_varlen`` and ``gluon_flash_forward``."""
    _refuse(launchable(q, k, v, scale=scale, alibi_slopes=alibi_slopes))
    window_left, window_right = mask_bounds(causal, window_left, window_right)
    sizes = cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
    config = config or choose(
        "gluon_flash_forward_varlen", current_device(), *dense_problem(q, v, *sizes, window_left, window_right)
    )
    return launch(q, k, v, cu_seqlens_q, cu_seqlens_k, *sizes, window_left, window_right, scale, softcap, sinks, config)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"gluon_flash_forward: {reason}")


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    window_left: int,
    window_right: int,
    scale: float | None,
    softcap: float,
    sinks: torch.Tensor | None,
    config: GluonFlashForwardConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch what is ``launchable``; a causal mask has ``window_right`` 0, packed sequences their largest lengths."""
    heads, head_dim = q.shape[-2:]
    heads_kv, head_dim_v = v.shape[-2:]
    has_low, has_high = bounded(window_left, window_right, seqlen_q, seqlen_k)
    scale = (head_dim**-0.5 if scale is None else scale) * _LOG2_E
    width = max(64, padded(head_dim), padded(head_dim_v))
    if cu_seqlens_q is None:
        out = q.new_empty(batch, seqlen_q, heads, head_dim_v)
        lse = q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
        offset, lse_rows = seqlen_k - seqlen_q, seqlen_q
    else:
        # Tokens after the last sequence belong to nobody: they see no key.
        out = q.new_zeros(q.shape[0], heads, head_dim_v)
        lse = q.new_full((heads, q.shape[0]), float("-inf"), dtype=torch.float32)
        offset, lse_rows = 0, q.shape[0]
    blocks = triton.cdiv(seqlen_q, 2 * config.block_rows)
    works = blocks * heads * batch
    if works == 0:
        return out, lse
    bytes_per_head = max(1, seqlen_k) * (head_dim + head_dim_v) * q.element_size()
    section = min(heads * batch, heads // heads_kv * max(1, config.section_bytes // bytes_per_head))
    programs = min(works, current_device().num_sms) if config.persistent else works
    gluon_flash_forward_kernel[(programs,)](
        descriptor(q, config.block_rows, width),
        descriptor(k, config.block_n, width),
        descriptor(v, config.block_n, width),
        descriptor(out, config.block_rows, width),
        lse,
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        heads,
        lse_rows,
        seqlen_k,
        offset - window_left if has_low else 0,
        offset + window_right + 1 if has_high else 0,
        blocks,
        works,
        programs,
        heads * batch,
        section,
        section * blocks,
        scale / softcap if softcap > 0 else scale,
        softcap * _LOG2_E,
        GROUP=heads // heads_kv,
        HAS_LOW=has_low,
        HAS_HIGH=has_high,
        HAS_SOFTCAP=softcap > 0,
        STAGES=config.stages,
        CONSUMER_REGISTERS=config.consumer_registers,
        PRODUCER_REGISTERS=config.producer_registers,
        num_warps=4,
    )
    return out, lse
