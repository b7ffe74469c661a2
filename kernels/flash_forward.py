"""Flash attention, forward (Dao et al., 2022, 2023): each program owns a tile of queries and loops over keys.

Dense [batch, seqlen, heads, head_dim] and packed [total_tokens, heads, head_dim] inputs run the same kernel. A packed
call passes cumulative lengths; without them the kernel compiles to the dense case. K and V are read through tensor
descriptors (TMA) if the configuration asks for it and the tensors allow it (``kvops.kernels.dense.describable``), else
through pointers: the same kernel with ``k_desc`` and ``v_desc`` None.

On Hopper its warp-specialised twin (``kvops.kernels.gluon_flash_forward``) runs instead if a measurement on that GPU
found the twin faster.
"""

from functools import cache
from types import ModuleType

import torch
import triton
import triton.language as tl

from kvops.autotune.lookup import choose, choose_proven
from kvops.kernels.dense import (
    beside_others,
    bias_arguments,
    dense_problem,
    describable,
    descriptor,
    dropout_arguments,
    longest,
    mask_bounds,
    padded,
    row_strides,
    slope_stride,
    token_strides,
)
from kvops.kernels.device import current_device
from kvops.kernels.flash_tiles import (
    add_bias,
    alibi_slope,
    block_at,
    block_range,
    dropout_keeps,
    dropout_of_head,
    in_window,
    key_blocks,
    load_tile,
    row_products,
    sequence_tokens,
)
from kvops.kernels.primitives import (
    LARGEST,
    LN_2,
    LOG2_E,
    dot,
    load_rows,
    log2_scores,
    online_softmax_step,
    program_tile,
    store_rows,
)


# Over 80 lines: 46 are the signature.
@triton.jit
def _attend(
    acc,
    m,
    l,
    q,
    position,
    k_desc,
    v_desc,
    entry,
    first_k,
    kv_head,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    start,
    full_start,
    full_end,
    end,
    seqlen_k,
    window_left,
    window_right,
    scale,
    softcap,
    slope,
    bias_ptr,
    stride_bias_m,
    stride_bias_n,
    start_m,
    seqlen_q,
    seed,
    drop_below,
    plane,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Attend to the key blocks that need a mask if MASKED, else to those between them (see ``window_blocks``)."""
    columns = tl.arange(0, BLOCK_N)
    first, last = block_range(start, full_start, full_end, end, HAS_LEFT, MASKED)
    # The masked loop of packed sequences would spill in two stages (3.6.0, 3.7.1), and is short.
    for place in tl.range(first, last, BLOCK_N, num_stages=1 if MASKED and PACKED else None):
        start_n = block_at(place, full_start, full_end, HAS_LEFT, MASKED)
        left = seqlen_k - start_n
        k = load_tile(  # [BLOCK_N, BLOCK_D]
            k_desc, entry, first_k, kv_head, k_ptr, start_n, columns, stride_kn, left, HEAD_DIM, BLOCK_D, MASKED
        )
        s = row_products(q, k)  # [BLOCK_M, BLOCK_N]
        if FOLD_SCALE and not MASKED:
            # The product with the scale and the subtraction of the maximum are one fused multiply-add.
            m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2_E))
            p = tl.exp2(s * (scale * LOG2_E) - m_new[:, None])
            rescale = tl.exp2(m - m_new)
            l = l * rescale + tl.sum(p, 1)
            m = m_new
        else:
            distance = position[:, None] - (start_n + columns)[None, :]
            s, _ = log2_scores(s, distance, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
            if bias_ptr is not None:
                queries = (start_m + tl.arange(0, q.shape[0]))[:, None]
                keys = (start_n + columns)[None, :]
                s = add_bias(s, bias_ptr, queries, keys, stride_bias_m, stride_bias_n, seqlen_q, seqlen_k)
            if MASKED:
                seen = in_window(distance, window_left, window_right, HAS_LEFT, HAS_RIGHT)
                s = tl.where(seen & (start_n + columns < seqlen_k)[None, :], s, float("-inf"))
            p, rescale, m, l = online_softmax_step(s, m, l)
        if HAS_DROPOUT:
            p = tl.where(dropout_keeps(seed, drop_below, plane, start_m, start_n, q.shape[0], BLOCK_N), p, 0.0)
        v = load_tile(  # [BLOCK_N, BLOCK_DV]
            v_desc, entry, first_k, kv_head, v_ptr, start_n, columns, stride_vn, left, HEAD_DIM_V, BLOCK_DV, MASKED
        )
        if MASKED and PACKED and v_desc is not None:
            # A descriptor reads the next sequence past the end of this one: 0 * NaN must not come of it.
            v = tl.where((columns < left)[:, None], v, 0.0)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None])  # [BLOCK_M, BLOCK_DV]
    return acc, m, l


@triton.jit
def _join_sink(acc, m, l, sink):
    """Add a sink (in units of log2) to rows that have seen all of their keys; empty rows stay 0. Also which are empty.

    Only here is it known which rows see a key under a bias.
    """
    empty = l == 0.0
    top = tl.where(empty, 0.0, tl.maximum(m, sink))
    rescale = tl.exp2(m - top)
    return acc * rescale[:, None], top, l * rescale + tl.exp2(sink - top), empty


# Over 80 lines: 49 are the signature; the loops with and without a mask share all accumulators.
@triton.jit(
    do_not_specialize=["stride_lb", "stride_lh", "seqlen_q", "seqlen_k", "window_left", "window_right", "drop_below"]
)
def flash_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    k_desc,
    v_desc,
    sinks_ptr,
    slopes_ptr,
    bias_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seed_ptr,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_om,
    stride_oh,
    stride_lb,
    stride_lh,
    stride_slopes_b,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    heads,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    scale,
    softcap,
    drop_below,
    kept_share,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    HAS_ALIBI: tl.constexpr = slopes_ptr is not None
    HAS_DROPOUT: tl.constexpr = seed_ptr is not None
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    start_m, head, batch = program_tile(seqlen_q, heads, BLOCK_M, LAST_FIRST=True)
    first_q, seqlen_q = sequence_tokens(cu_seqlens_q_ptr, batch, seqlen_q)
    first_k, seqlen_k = sequence_tokens(cu_seqlens_k_ptr, batch, seqlen_k)
    if start_m >= seqlen_q:
        return
    first_row = first_q
    first_q += start_m
    q_ptr += batch * stride_qb + head * stride_qh + first_q * stride_qm
    k_ptr += batch * stride_kb + head // GROUP * stride_kh + first_k * stride_kn
    v_ptr += batch * stride_vb + head // GROUP * stride_vh + first_k * stride_vn
    out_ptr += batch * stride_ob + head * stride_oh + first_q * stride_om
    lse_ptr += batch * stride_lb + head * stride_lh + first_q
    slope = alibi_slope(slopes_ptr, batch, head, stride_slopes_b)
    if bias_ptr is not None:
        bias_ptr += batch * stride_bias_b + head * stride_bias_h + first_row * stride_bias_m
    seed, plane = dropout_of_head(seed_ptr, batch, heads, head)

    rows = tl.arange(0, BLOCK_M)
    offset = seqlen_k - seqlen_q
    position = start_m + rows + offset
    q = load_rows(q_ptr, rows, stride_qm, seqlen_q - start_m, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
    if sinks_ptr is not None and bias_ptr is None:
        # The sink is a key whose value is 0: the softmax starts with it.
        # +inf cannot be subtracted from itself: the largest number beside any score is as good.
        m = tl.zeros([BLOCK_M], tl.float32) + tl.where(sink > LARGEST, LARGEST, sink)
        l = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)

    start, full_start, full_end, end = key_blocks(
        start_m, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    # Where a descriptor finds this sequence: packed ones are all in its first batch entry.
    entry = batch if not PACKED else 0
    # First the blocks that every query sees whole, then those that need a mask.
    for MASKED in tl.static_range(2):
        acc, m, l = _attend(
            acc, m, l, q, position, k_desc, v_desc, entry, first_k, head // GROUP, k_ptr, v_ptr, stride_kn, stride_vn,
            start, full_start, full_end, end, seqlen_k, window_left, window_right, scale, softcap, slope, bias_ptr,
            stride_bias_m, stride_bias_n, start_m, seqlen_q, seed, drop_below, plane, HEAD_DIM, HEAD_DIM_V, HAS_LEFT,
            HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, FOLD_SCALE, MASKED, PACKED, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    if sinks_ptr is not None and bias_ptr is not None:
        acc, m, l, empty = _join_sink(acc, m, l, tl.where(sink > LARGEST, LARGEST, sink))
    total = tl.where(l == 0.0, 1.0, l)
    lse = (m + tl.log2(total)) * LN_2
    if sinks_ptr is not None:
        # A row without keys is empty, whatever its sink.
        sees_a_key = seqlen_k > 0
        if bias_ptr is not None:
            sees_a_key = empty == 0
        elif HAS_RIGHT:
            sees_a_key = (position + window_right >= 0) & sees_a_key
        lse = tl.where(sees_a_key, tl.where(sink > LARGEST, sink, lse), float("-inf"))
    tl.store(lse_ptr + rows, lse, mask=start_m + rows < seqlen_q)
    if HAS_DROPOUT:
        total *= kept_share
    acc = acc / total[:, None]
    store_rows(out_ptr, rows, stride_om, seqlen_q - start_m, acc, HEAD_DIM_V, BLOCK_DV)


@cache
def _hopper() -> ModuleType:
    """The module of the twin, imported at its first launch: other GPUs do not need Gluon's parts for Hopper."""
    import kvops.kernels.gluon_flash_forward as hopper

    return hopper


def flash_forward(
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
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the dense kernel, or its twin for Hopper; see ``kvops.flash_attention``."""
    batch, seqlen_q, heads, _ = q.shape
    window_left, window_right = mask_bounds(causal, window_left, window_right)
    problem = dense_problem(q, v, batch, seqlen_q, k.shape[1], window_left, window_right)

    proven = choose_proven(
        "gluon_flash_forward",
        current_device(),
        *problem,
        refusal=lambda: _hopper().launchable(
            q, k, v, scale=scale, alibi_slopes=alibi_slopes, bias=bias, dropout_p=dropout_p
        ),
    )
    if proven is not None:
        return _hopper().launch(
            q, k, v, None, None, batch, seqlen_q, k.shape[1], window_left, window_right, scale, softcap, sinks, proven
        )
    out = q.new_empty(batch, seqlen_q, heads, v.shape[3])
    lse = q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    _launch(
        q, k, v, out, lse, None, None, problem, batch, seqlen_q, k.shape[1],
        window_left, window_right, scale, softcap, sinks, alibi_slopes, bias,
        dropout_arguments(dropout_p, dropout_seed),
    )  # fmt: skip
    return out, lse


def flash_forward_varlen(
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
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel, or its twin for Hopper, on packed sequences; see ``kvops.flash_attention_varlen``."""
    batch = cu_seqlens_q.shape[0] - 1
    window_left, window_right = mask_bounds(causal, window_left, window_right)
    max_seqlen_q, max_seqlen_k = longest(max_seqlen_q, q), longest(max_seqlen_k, k)
    problem = dense_problem(q, v, batch, max_seqlen_q, max_seqlen_k, window_left, window_right)
    proven = choose_proven(
        "gluon_flash_forward_varlen",
        current_device(),
        *problem,
        refusal=lambda: _hopper().launchable(
            q, k, v, scale=scale, alibi_slopes=alibi_slopes, bias=bias, dropout_p=dropout_p
        ),
    )
    if proven is not None:
        return _hopper().launch(
            q, k, v, cu_seqlens_q, cu_seqlens_k, batch, max_seqlen_q, max_seqlen_k, window_left, window_right, scale,
            softcap, sinks, proven,
        )  # fmt: skip
    # Tokens after the last sequence belong to no sequence and see no key.
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    _launch(
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, problem, batch, max_seqlen_q, max_seqlen_k,
        window_left, window_right, scale, softcap, sinks, alibi_slopes, bias,
        dropout_arguments(dropout_p, dropout_seed),
    )  # fmt: skip
    return out, lse


def _launch(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, problem, batch, seqlen_q, seqlen_k,
    window_left, window_right, scale, softcap, sinks, alibi_slopes, bias, dropout,
):  # fmt: skip
    heads, head_dim = q.shape[-2:]
    head_dim_v = v.shape[-1]
    block_d, block_dv = padded(head_dim), padded(head_dim_v)
    seed, drop_below, kept_share = dropout
    config = beside_others(choose("flash_forward", current_device(), *problem), "block_n", v, bias, seed)
    programs = triton.cdiv(seqlen_q, config.block_m) * heads * batch
    if programs == 0:
        return
    bias, *bias_strides = bias_arguments(bias, q, k)
    scale = head_dim**-0.5 if scale is None else scale
    k_desc = v_desc = None
    if config.descriptors and describable(k) and describable(v):
        k_desc, v_desc = descriptor(k, config.block_n, block_d), descriptor(v, config.block_n, block_dv)
    flash_forward_kernel[(programs,)](
        q,
        k,
        v,
        out,
        lse,
        k_desc,
        v_desc,
        sinks,
        alibi_slopes,
        bias,
        cu_seqlens_q,
        cu_seqlens_k,
        seed,
        *token_strides(q),
        *token_strides(k),
        *token_strides(v),
        *token_strides(out),
        *row_strides(lse),
        slope_stride(alibi_slopes),
        *bias_strides,
        heads,
        seqlen_q,
        seqlen_k,
        window_left,
        window_right,
        scale,
        softcap,
        drop_below,
        kept_share,
        GROUP=heads // k.shape[-2],
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        HAS_LEFT=window_left >= 0,
        HAS_RIGHT=window_right >= 0,
        HAS_SOFTCAP=softcap > 0,
        # Scaling after the maximum is correct for a positive scale only.
        FOLD_SCALE=scale > 0 and softcap == 0 and alibi_slopes is None and bias is None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
