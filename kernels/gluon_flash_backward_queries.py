"""Gradient of queries for Hopper in Gluon: ``gluon_flash_backward_keys`` with queries and keys exchanged.

A program owns 2 x BLOCK_M queries of one head. The producer copies them with their rows of dO, then tiles of BLOCK_N
keys and values through a ring; two consumers own BLOCK_M queries each and keep dQ in registers. While a consumer
computes P, the tensor cores multiply dO V^T; the products of the other consumer overlap with the rest. The barriers are
those of ``gluon_flash_backward_keys``: ``q_full`` belongs to a consumer's queries and dO, and dQ is stored from the
slot of the queries.
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
    q_desc, k_desc, v_desc, dout_desc, dq_desc, q_tiles, dout_tiles, k_tiles, v_tiles, q_full, full, empty, written,
    heads, seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works,
    GROUP: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the queries and dO, then every tile of keys and values that any of them sees; store the gradient."""
    BLOCK_M: gl.constexpr = q_tiles.shape[2]
    BLOCK_N: gl.constexpr = k_tiles.shape[2]
    block, batch_head = work_item(gl.program_id(0), blocks, all_heads, section, section_works)
    batch = batch_head // heads
    head = batch_head % heads
    row = block * (2 * BLOCK_M)
    for c in gl.static_range(2):
        mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes + dout_desc.block_type.nbytes)
        tma_load(q_desc, [batch, row + c * BLOCK_M, head, 0], q_full.index(c), q_tiles.index(c))
        tma_load(dout_desc, [batch, row + c * BLOCK_M, head, 0], q_full.index(c), dout_tiles.index(c))
    first, _, _, last = key_tiles(
        row, min(2 * BLOCK_M, seqlen_q - row), low, high, seqlen_k, HAS_LOW, HAS_HIGH, BLOCK_N
    )
    t = 0
    for i in range(first, last):
        slot = t % STAGES
        arrived = full.index(slot)
        mbarrier.wait(empty.index(slot), (t // STAGES & 1) ^ 1)
        mbarrier.expect(arrived, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma_load(k_desc, [batch, i * BLOCK_N, head // GROUP, 0], arrived, k_tiles.index(slot))
        tma_load(v_desc, [batch, i * BLOCK_N, head // GROUP, 0], arrived, v_tiles.index(slot))
        t += 1  # noqa: SIM113 (Gluon has no enumerate)
    for c in gl.static_range(2):
        mbarrier.wait(written.index(c), 0)
        tma_store(dq_desc, [batch, row + c * BLOCK_M, head, 0], q_tiles.index(c))
    tma.store_wait(0)


@gluon.jit
def _consumer(
    lse_ptr, delta_ptr, q_tiles, dout_tiles, k_tiles, v_tiles, q_full, full, empty, written,
    stride_rows, seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works, scale,
    HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """dQ of one half of the block's queries."""
    BLOCK_M: gl.constexpr = q_tiles.shape[2]
    BLOCK_N: gl.constexpr = k_tiles.shape[2]
    BLOCK_D: gl.constexpr = q_tiles.shape[4]
    DTYPE: gl.constexpr = q_tiles.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    DS_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    KEY_LAYOUT: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)

    block, batch_head = work_item(gl.program_id(0), blocks, all_heads, section, section_works)
    block_row = block * (2 * BLOCK_M)
    row = block_row + CONSUMER * BLOCK_M
    block_first, tiles, first, full_first, full_last, last = consumer_tiles(
        block_row, CONSUMER, BLOCK_M, seqlen_q, low, high, seqlen_k, HAS_LOW, HAS_HIGH, BLOCK_N
    )
    rows = row + gl.arange(0, BLOCK_M, ROW_LAYOUT)
    place = gl.to_tensor(batch_head).to(gl.int64) * stride_rows + rows
    # Rows past the last query: their dO and delta are 0, and so is dS.
    lse = gl.expand_dims(gl.load(lse_ptr + place, mask=rows < seqlen_q, other=0.0), 1)
    delta = gl.expand_dims(gl.load(delta_ptr + place, mask=rows < seqlen_q, other=0.0), 1)
    # Keys are counted from there, too.
    rows -= block_first * BLOCK_N
    first_key = gl.expand_dims(rows + low, 1)
    end_key = gl.full([BLOCK_M], 0, gl.int32, ROW_LAYOUT) + (seqlen_k - block_first * BLOCK_N)
    if HAS_HIGH:
        end_key = gl.minimum(end_key, rows + high)
    end_key = gl.expand_dims(end_key, 1)

    q = q_tiles.index(CONSUMER).reshape([BLOCK_M, BLOCK_D])
    dout = dout_tiles.index(CONSUMER).reshape([BLOCK_M, BLOCK_D])
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    dq = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, ACC_LAYOUT)
    mbarrier.wait(q_full.index(CONSUMER), 0)
    skip(0, first, full, empty, STAGES)
    for i in range(first, last):
        slot = i % STAGES
        mbarrier.wait(full.index(slot), i // STAGES & 1)
        k = k_tiles.index(slot).reshape([BLOCK_N, BLOCK_D])
        v = v_tiles.index(slot).reshape([BLOCK_N, BLOCK_D])
        s_pending = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dp_pending = warpgroup_mma(dout, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
        # The products finish in the order they were started: with one left, Q K^T is done.
        s = warpgroup_mma_wait(1, deps=[s_pending])
        p = gl.exp2(s * scale - lse)
        key = gl.expand_dims(i * BLOCK_N + gl.arange(0, BLOCK_N, KEY_LAYOUT), 0)
        if (i < full_first) | (i >= full_last):
            if HAS_LOW:
                p = gl.where(key >= first_key, p, 0.0)
            p = gl.where(key < end_key, p, 0.0)
        # The dependency on p keeps the assembler from moving the exponentials behind the wait for dO V^T.
        dp, p = warpgroup_mma_wait(0, deps=[dp_pending, p])
        ds = gl.convert_layout((p * (dp - delta)).to(DTYPE), DS_LAYOUT)
        dq_pending = warpgroup_mma(ds, k, dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq_pending])
        give_back(empty.index(slot))
    skip(max(0, last), tiles, full, empty, STAGES)
    # The queries are read: the gradient leaves from where they were.
    q.store((dq * (scale * LN_2)).to(DTYPE))
    fence_async_shared()
    give_back(written.index(CONSUMER))


@gluon.jit(
    do_not_specialize=[
        "stride_rows", "seqlen_q", "seqlen_k", "low", "high", "blocks", "all_heads", "section", "section_works",
    ]
)  # fmt: skip
def gluon_flash_backward_queries_kernel(
    q_desc, k_desc, v_desc, dout_desc, dq_desc, lse_ptr, delta_ptr,
    stride_rows, heads, seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works, scale,
    GROUP: gl.constexpr, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Query i sees the keys from i + low to before i + high; ``scale`` includes log2(e)."""
    q_tiles, dout_tiles = slots(q_desc, 2), slots(dout_desc, 2)
    k_tiles, v_tiles = slots(k_desc, STAGES), slots(v_desc, STAGES)
    q_full, written = barriers(2, 1), barriers(2, 1)
    full, empty = barriers(STAGES, 1), barriers(STAGES, 2)
    # The copy engine must see the barriers as they were initialised.
    fence_async_shared()
    group_barrier()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    lse_ptr, delta_ptr, q_tiles, dout_tiles, k_tiles, v_tiles, q_full, full, empty, written,
                    stride_rows, seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works,
                    scale, HAS_LOW, HAS_HIGH, STAGES, 0,
                ),
            ),
            (
                _consumer,
                (
                    lse_ptr, delta_ptr, q_tiles, dout_tiles, k_tiles, v_tiles, q_full, full, empty, written,
                    stride_rows, seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works,
                    scale, HAS_LOW, HAS_HIGH, STAGES, 1,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, dout_desc, dq_desc, q_tiles, dout_tiles, k_tiles, v_tiles,
                    q_full, full, empty, written,
                    heads, seqlen_q, seqlen_k, low, high, blocks, all_heads, section, section_works,
                    GROUP, HAS_LOW, HAS_HIGH, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
