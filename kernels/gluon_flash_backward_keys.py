"""Gradients of keys and values for Hopper in Gluon: warp groups that specialise, and no dS in shared memory.

A program owns 2 x BLOCK_N keys of one KV head and has three warp groups. The producer (one warp) copies with TMA: the
keys and values, then tiles of BLOCK_M queries of every head of the group, with their rows of dO, lse and delta, through
a ring of STAGES slots. Two consumers own BLOCK_N keys each and keep dK and dV in registers. Scores are computed
transposed, [keys, queries], so that P^T and dS^T can be left operands from registers. While a consumer computes P^T,
the tensor cores multiply V dO^T; while it computes dS^T, they multiply P^T dO. The products of the other consumer
overlap with the rest.

The grid has one program for each block of keys, in ascending order: under a causal mask the first keys are seen by the
most queries. It is not persistent, because the state of a loop over work items would not fit into the registers, and a
program that ends early makes room for the next.

A consumer waits for dS^T Q of a tile before it starts K Q^T of the next one. With an accumulator pending across the end
of the loop the assembler serialises all products (C7512, C7514).

Barriers
--------
All barriers are mbarriers in shared memory. A wait for a phase returns once the barrier has completed it (mod 2).

- ``kv_full[c]`` (count 1): the producer expects the bytes of the keys and values of consumer c, and TMA completes them.
- ``full[s]`` (count 1): the same for a tile of queries. The t-th tile lives in slot t % STAGES and completes phase
  t // STAGES of that slot, so consumers wait for phase (t // STAGES) & 1.
- ``empty[s]`` (count 2, one arrival of each consumer for each tile): phase t // STAGES completes when both have
  released tile t. Before tile t is loaded the producer waits for phase t // STAGES - 1, whose parity is (t // STAGES &
  1) ^ 1; for the first STAGES tiles that is the parity of the phase "before" an unused barrier, which counts as
  complete.
- ``written[c]`` (count 1): consumer c has written dK and dV into the slots of its keys and values. The producer
  stores them, so that only the producer needs registers for their addresses.

A parity suffices because no group falls two phases behind: a consumer releases a tile only after it was full (even a
tile whose queries see none of its keys), and the producer fills a slot only after both consumers released it.

No deadlock: before it loads tile t the producer waits only for the release of tile t - STAGES, and a consumer that has
tile t releases it without waiting for another tile.

One thread arrives at a barrier, while every warp reads and writes shared memory on its own. A barrier of the warp group
before the arrival ensures that all four warps are done. A fence of the storing threads comes before TMA reads their
data.

Rows past the last query need no mask: TMA reads their q, dO, lse and delta as 0, so they add 0.
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
    consumer_tiles,
    give_back,
    group_barrier,
    key_tiles,
    skip,
    slots,
    tma_load,
    tma_store,
    work_item,
)
from kvops.kernels.primitives import LN_2


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, dk_desc, dv_desc,
    k_tiles, v_tiles, q_tiles, dout_tiles, lse_rows, delta_rows, kv_full, full, empty, written,
    kv_heads, seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works,
    GROUP: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys and values, then every tile of queries that sees any of the keys; store the gradients."""
    BLOCK_N: gl.constexpr = k_tiles.shape[2]
    BLOCK_M: gl.constexpr = q_tiles.shape[2]
    TILE_BYTES: gl.constexpr = (
        q_desc.block_type.nbytes
        + dout_desc.block_type.nbytes
        + lse_desc.block_type.nbytes
        + delta_desc.block_type.nbytes
    )
    block, batch_head = work_item(gl.program_id(0), blocks, all_heads, section, section_works)
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    key = (blocks - 1 - block) * (2 * BLOCK_N)
    for c in gl.static_range(2):
        mbarrier.expect(kv_full.index(c), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma_load(k_desc, [batch, key + c * BLOCK_N, kv_head, 0], kv_full.index(c), k_tiles.index(c))
        tma_load(v_desc, [batch, key + c * BLOCK_N, kv_head, 0], kv_full.index(c), v_tiles.index(c))
    first, _, _, last = key_tiles(
        key, min(2 * BLOCK_N, seqlen_k - key), low, high, seqlen_q, HAS_LOW, HAS_HIGH, BLOCK_M
    )
    t = 0
    for member in range(GROUP):
        head = kv_head * GROUP + member
        batch_query_head = batch_head * GROUP + member
        for i in range(first, last):
            slot = t % STAGES
            arrived = full.index(slot)
            mbarrier.wait(empty.index(slot), (t // STAGES & 1) ^ 1)
            mbarrier.expect(arrived, TILE_BYTES)
            tma_load(q_desc, [batch, i * BLOCK_M, head, 0], arrived, q_tiles.index(slot))
            tma_load(lse_desc, [batch_query_head, i * BLOCK_M], arrived, lse_rows.index(slot))
            tma_load(dout_desc, [batch, i * BLOCK_M, head, 0], arrived, dout_tiles.index(slot))
            tma_load(delta_desc, [batch_query_head, i * BLOCK_M], arrived, delta_rows.index(slot))
            t += 1
    for c in gl.static_range(2):
        mbarrier.wait(written.index(c), 0)
        tma_store(dk_desc, [batch, key + c * BLOCK_N, kv_head, 0], k_tiles.index(c))
        tma_store(dv_desc, [batch, key + c * BLOCK_N, kv_head, 0], v_tiles.index(c))
    tma.store_wait(0)


@gluon.jit
def _consumer(
    k_tiles, v_tiles, q_tiles, dout_tiles, lse_rows, delta_rows, kv_full, full, empty, written,
    seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works, scale,
    GROUP: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """dK and dV of one half of the block's keys."""
    BLOCK_N: gl.constexpr = k_tiles.shape[2]
    BLOCK_M: gl.constexpr = q_tiles.shape[2]
    BLOCK_D: gl.constexpr = k_tiles.shape[4]
    DTYPE: gl.constexpr = k_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    KEY_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    QUERY_LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)

    block, _ = work_item(gl.program_id(0), blocks, all_heads, section, section_works)
    block_key = (blocks - 1 - block) * (2 * BLOCK_N)
    key = block_key + CONSUMER * BLOCK_N
    block_first, tiles, first, full_first, full_last, last = consumer_tiles(
        block_key, CONSUMER, BLOCK_N, seqlen_k, low, high, seqlen_q, HAS_LOW, HAS_HIGH, BLOCK_M
    )
    # Rows are counted from there, too.
    keys = key - block_first * BLOCK_M + gl.arange(0, BLOCK_N, KEY_LAYOUT)
    first_row = gl.expand_dims(keys + low, 1)
    end_row = gl.expand_dims(keys + high, 1)

    k = k_tiles.index(CONSUMER).reshape([BLOCK_N, BLOCK_D])
    v = v_tiles.index(CONSUMER).reshape([BLOCK_N, BLOCK_D])
    zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S_LAYOUT)
    dk = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, ACC_LAYOUT)
    dv = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, ACC_LAYOUT)
    mbarrier.wait(kv_full.index(CONSUMER), 0)
    start = 0
    for _ in range(GROUP):
        skip(start, start + first, full, empty, STAGES)
        for i in range(first, last):
            t = start + i
            slot = t % STAGES
            mbarrier.wait(full.index(slot), t // STAGES & 1)
            q = q_tiles.index(slot).reshape([BLOCK_M, BLOCK_D])
            dout = dout_tiles.index(slot).reshape([BLOCK_M, BLOCK_D])
            s_pending = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            dp_pending = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
            # The products finish in the order they were started: with one left, K Q^T is done.
            s = warpgroup_mma_wait(1, deps=[s_pending])
            lse = gl.expand_dims(lse_rows.index(slot).reshape([BLOCK_M]).load(QUERY_LAYOUT), 0)
            p = gl.exp2(s * scale - lse)
            row = gl.expand_dims(i * BLOCK_M + gl.arange(0, BLOCK_M, QUERY_LAYOUT), 0)
            # At 128 the products take longer than the mask, and to branch takes registers that are not there.
            if BLOCK_D > 64 or (i < full_first) | (i >= full_last):
                if HAS_LOW:
                    p = gl.where(row >= first_row, p, 0.0)
                if HAS_HIGH:
                    p = gl.where(row < end_row, p, 0.0)
            dv_pending = warpgroup_mma(gl.convert_layout(p.to(DTYPE), P_LAYOUT), dout, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp_pending])
            delta = gl.expand_dims(delta_rows.index(slot).reshape([BLOCK_M]).load(QUERY_LAYOUT), 0)
            ds = gl.convert_layout((p * (dp - delta)).to(DTYPE), P_LAYOUT)
            dk_pending = warpgroup_mma(ds, q, dk, is_async=True)
            dk, dv = warpgroup_mma_wait(0, deps=[dk_pending, dv_pending])
            give_back(empty.index(slot))
        skip(start + max(0, last), start + tiles, full, empty, STAGES)
        start += tiles
    # The keys and values are read: the gradients leave from where they were.
    k.store((dk * (scale * LN_2)).to(DTYPE))
    v.store(dv.to(DTYPE))
    fence_async_shared()
    give_back(written.index(CONSUMER))


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "low", "high", "blocks", "all_heads", "section", "section_works"])
def gluon_flash_backward_keys_kernel(
    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, dk_desc, dv_desc,
    kv_heads, seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works, scale,
    GROUP: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Key j is seen by the queries from j + low to before j + high; ``scale`` includes log2(e)."""
    k_tiles, v_tiles = slots(k_desc, 2), slots(v_desc, 2)
    q_tiles, dout_tiles = slots(q_desc, STAGES), slots(dout_desc, STAGES)
    lse_rows, delta_rows = slots(lse_desc, STAGES), slots(delta_desc, STAGES)
    kv_full, written = barriers(2, 1), barriers(2, 1)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    # The copy engine must see the barriers as they were initialised.
    fence_async_shared()
    group_barrier()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    k_tiles, v_tiles, q_tiles, dout_tiles, lse_rows, delta_rows, kv_full, full, empty, written,
                    seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works, scale,
                    GROUP, HAS_LOW, HAS_HIGH, STAGES, 0,
                ),
            ),
            (
                _consumer,
                (
                    k_tiles, v_tiles, q_tiles, dout_tiles, lse_rows, delta_rows, kv_full, full, empty, written,
                    seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works, scale,
                    GROUP, HAS_LOW, HAS_HIGH, STAGES, 1,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, dout_desc, lse_desc, delta_desc, dk_desc, dv_desc,
                    k_tiles, v_tiles, q_tiles, dout_tiles, lse_rows, delta_rows, kv_full, full, empty, written,
                    kv_heads, seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works,
                    GROUP, HAS_LOW, HAS_HIGH, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
