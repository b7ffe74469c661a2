"""Flash attention, forward, for Hopper in Gluon: warp groups that specialise (Shah et al., FlashAttention-3, 2024).

A program is three warp groups. The producer (one warp) copies tiles with TMA: a block of 2 x BLOCK_ROWS queries, then K
and V tiles through a ring of STAGES slots. Two consumers own BLOCK_ROWS queries each. While a consumer computes the
softmax of tile i, the tensor cores multiply P V of tile i - 1; Q K^T overlaps with the softmax of the other consumer.

Dense and packed sequences run the same source. A packed call passes cumulative lengths. A work item is then a block of
rows of one sequence; every sequence has as many items as the longest one. A group skips items past the end of their
sequence. All three groups read the same lengths and skip the same items.

Barriers
--------
All barriers are mbarriers in shared memory. A wait for a phase returns once the barrier has completed it (mod 2).

- ``k_full[s]``, ``v_full[s]`` (count 1): the producer expects the bytes of a tile, and TMA completes them. The t-th
  tile that this program loads (t counts over all its work items) lives in slot t % STAGES and completes phase t //
  STAGES of that slot, so consumers wait for phase (t // STAGES) & 1.
- ``k_empty[s]``, ``v_empty[s]`` (count 2, one arrival of each consumer for each tile): phase t // STAGES completes when
  both have released tile t. Before tile t is loaded the producer waits for phase t // STAGES - 1, whose parity is
  (t // STAGES & 1) ^ 1; for the first STAGES tiles that is the parity of the phase "before" an unused barrier, which
  counts as complete.
- ``q_full[c]`` (count 1), ``q_empty[c]`` (count 1): the same with one slot for each consumer; the n-th work item of
  a program is phase n. The output is stored from the query slot, so a consumer releases it after TMA has read it.

A parity suffices because no group falls two phases behind: a consumer releases a tile only after it was full (even a
tile that none of its rows sees), and the producer fills a slot only after both consumers released it. For the same
reason consumers wait for a tile that they skip: an early arrival would count for the previous tile in that slot.

No deadlock: the producer loads K(t), V(t), K(t + 1), ... and before it loads tile t it waits only for the release of
tile t - STAGES. A consumer releases K(t) once its product is complete, and V(t) after tile t + 1 has arrived; with
STAGES >= 2 that tile was loaded before.

One thread arrives at a barrier, while every warp reads shared memory on its own. A barrier of the warp group before the
arrival ensures that all four warps have read the tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvops.kernels.gluon_tiles import (
    barriers,
    give_back,
    group_barrier,
    key_tiles,
    rows_at,
    slots,
    tma_load,
    tma_store,
    work_item,
)
from kvops.kernels.primitives import LARGEST, LN_2, LOG2_E


@gluon.jit
def sequence(cu_seqlens_ptr, batch, length):
    """The first token and the length of sequence ``batch``: 0 and ``length`` unless it is a packed one."""
    first = 0
    if cu_seqlens_ptr is not None:
        first = gl.load(cu_seqlens_ptr + batch)
        length = gl.load(cu_seqlens_ptr + batch + 1) - first
    return first, length


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, cu_q_ptr, cu_k_ptr,
    q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works,
    GROUP: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Load the queries and then every key and value tile that any row of the block sees, for one work after another."""
    BLOCK_ROWS: gl.constexpr = q_tiles.shape[-3]
    BLOCK_N: gl.constexpr = k_tiles.shape[-3]
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
                tma_load(q_desc, rows, q_full.index(c), q_tiles.index(c))
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
                tma_load(k_desc, rows, k_full.index(slot), k_tiles.index(slot))
                mbarrier.wait(v_empty.index(slot), phase)
                mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
                tma_load(v_desc, rows, v_full.index(slot), v_tiles.index(slot))
                loaded += 1
            done += 1


@gluon.jit
def _skip(first, last, k_full, k_empty, v_full, v_empty, STAGES: gl.constexpr):
    """Give back unread the tiles numbered first .. last - 1, each after it arrived."""
    for t in range(first, last):
        slot = t % STAGES
        phase = t // STAGES & 1
        mbarrier.wait(k_full.index(slot), phase)
        mbarrier.wait(v_full.index(slot), phase)
        group_barrier()
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
        give_back(k_empty.index(slot))
        p_next, rescale, m, l = _softmax(s, m, l, i * BLOCK_N, first_key, end_key, scale, softcap, HAS_SOFTCAP, MASKED)
        # V of this tile is needed by the next step only, but this wait and the dependency on p_next keep the assembler
        # from moving the exponentials behind the wait for P V: they are what runs beside it.
        mbarrier.wait(v_full.index(slot), t // STAGES & 1)
        acc, p = warpgroup_mma_wait(0, deps=[acc_pending, gl.convert_layout(p_next.to(k.dtype), P_LAYOUT)])
        give_back(v_empty.index(before))
        acc *= gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, p, m, l


# Over 80 lines: the role of one warp group; the order of its barriers and products must be read in one place.
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
                # The sink is a key whose value is 0: the softmax starts with it. +inf cannot be subtracted from itself:
                # the largest number beside any score is as good.
                sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2_E
                m = gl.full([BLOCK_ROWS], 0.0, gl.float32, ROW_LAYOUT) + gl.where(sink > LARGEST, LARGEST, sink)
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
                give_back(k_empty.index(t % STAGES))
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
                give_back(v_empty.index(t % STAGES))
                _skip(last + shift, block_last + shift, k_full, k_empty, v_full, v_empty, STAGES)
            else:
                _skip(loaded, block_last + shift, k_full, k_empty, v_full, v_empty, STAGES)

            sees_a_key = end_key > first_key
            lse = (m + gl.log2(l)) * LN_2
            if sinks_ptr is not None:
                lse = gl.where(sink > LARGEST, sink, lse)
            lse = gl.where(sees_a_key, lse, float("-inf"))
            lse_row = head * seqlen_q + first_q + row if PACKED else batch_head * seqlen_q + row
            gl.store(lse_ptr + lse_row + rows, lse, mask=row + rows < length_q)
            inverse = 1.0 / gl.where(sees_a_key, l, 1.0)
            acc *= gl.expand_dims(gl.convert_layout(inverse, ACC_ROW_LAYOUT), 1)
            # The queries are read: the output leaves from where they were.
            q.store(acc.to(DTYPE))
            fence_async_shared()
            group_barrier()
            tma_store(out_desc, rows_at(batch, head, row, first_q, length_q, PACKED), q_tiles.index(CONSUMER))
            tma.store_wait(0)
            give_back(q_empty.index(CONSUMER))
            loaded += block_last - block_first
            done += 1


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
    q_tiles, k_tiles, v_tiles = slots(q_desc, 2), slots(k_desc, STAGES), slots(v_desc, STAGES)
    q_full, q_empty = barriers(2, 1), barriers(2, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    # The copy engine must see the barriers as they were initialised.
    fence_async_shared()
    group_barrier()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    out_desc, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr, q_tiles, k_tiles, v_tiles,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works,
                    scale, softcap, HAS_LOW, HAS_HIGH, HAS_SOFTCAP, STAGES, 0,
                ),
            ),
            (
                _consumer,
                (
                    out_desc, lse_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr, q_tiles, k_tiles, v_tiles,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works,
                    scale, softcap, HAS_LOW, HAS_HIGH, HAS_SOFTCAP, STAGES, 1,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, cu_q_ptr, cu_k_ptr, q_tiles, k_tiles, v_tiles,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, seqlen_q, seqlen_k, low, high, blocks, works, programs, all_heads, section, section_works,
                    GROUP, HAS_LOW, HAS_HIGH, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
