"""Flash attention, backward: P is recomputed from lse, and no gradient is summed with atomics.

Three kernels: delta = rowsum(dO * O) - dlse; dK and dV, where a program owns a tile of keys and walks the queries of
every head of its group; dQ, where a program owns a tile of queries and walks the keys. That is seven matrix products
where a fused kernel needs five, and the same bits every time.

On Hopper, warp-specialised kernels (``kvops.kernels.gluon_flash_backward``) take the place of the last two where they
were measured there and found faster.
"""

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvops.autotune.config import AttentionConfig, GluonFlashBackwardConfig
from kvops.autotune.lookup import choose, choose_proven
from kvops.kernels.dense import dense_problem, padded, row_strides, slope_stride, token_strides
from kvops.kernels.device import current_device
from kvops.kernels.primitives import (
    LOG2_E,
    alibi_slope,
    block_at,
    block_range,
    dot,
    in_window,
    load_rows,
    log2_scores,
    program_tile,
    sequence_tokens,
    store_rows,
    window_blocks,
)


@triton.jit(do_not_specialize=["seqlen_q"])
def flash_delta_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    lse_log2_ptr,
    stride_ob,
    stride_om,
    stride_oh,
    stride_dob,
    stride_dom,
    stride_doh,
    stride_lb,
    stride_lh,
    stride_dlb,
    stride_dlh,
    stride_db,
    stride_dh,
    heads,
    seqlen_q,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta, and lse in units of log2 with +inf for an empty row, so that exp2(s - lse) is 0 there."""
    start_m, head, batch = program_tile(seqlen_q, heads, BLOCK_M, LAST_FIRST=False)
    rows = tl.arange(0, BLOCK_M)
    left = seqlen_q - start_m
    start_m = start_m.to(tl.int64)
    out_ptr += batch * stride_ob + head * stride_oh + start_m * stride_om
    dout_ptr += batch * stride_dob + head * stride_doh + start_m * stride_dom
    out = load_rows(out_ptr, rows, stride_om, left, HEAD_DIM_V, BLOCK_DV, True).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
    dout = load_rows(dout_ptr, rows, stride_dom, left, HEAD_DIM_V, BLOCK_DV, True).to(tl.float32)
    delta = tl.sum(out * dout, 1)  # [BLOCK_M]
    lse = tl.load(lse_ptr + batch * stride_lb + head * stride_lh + start_m + rows, mask=rows < left, other=0.0)
    if dlse_ptr is not None:
        delta -= tl.load(
            dlse_ptr + batch * stride_dlb + head * stride_dlh + start_m + rows, mask=rows < left, other=0.0
        )
    empty = lse == float("-inf")
    place = batch * stride_db + head * stride_dh + start_m + rows
    tl.store(delta_ptr + place, tl.where(empty, 0.0, delta), mask=rows < left)
    tl.store(lse_log2_ptr + place, tl.where(empty, float("inf"), lse * LOG2_E), mask=rows < left)


@triton.jit
def _gather_key_gradients(
    dk,
    dv,
    k,
    v,
    keys,
    q_ptr,
    dout_ptr,
    lse_log2_ptr,
    delta_ptr,
    stride_qm,
    stride_dom,
    start,
    end,
    seqlen_q,
    offset,
    window_left,
    window_right,
    scale,
    softcap,
    slope,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Add what the query blocks from ``start`` to ``end`` of one head give to dK and dV.

    Rows past the end need no mask: their lse reads as +inf, which makes P 0.

    Scores are computed transposed, [keys, queries], so that P^T and dS^T are left operands as they stand.
    """
    rows = tl.arange(0, BLOCK_M)
    for start_m in tl.range(start, end, BLOCK_M):
        first = tl.cast(start_m, tl.int64)
        left = seqlen_q - start_m
        q = load_rows(  # [BLOCK_M, BLOCK_D]
            q_ptr + first * stride_qm, rows, stride_qm, left, HEAD_DIM, BLOCK_D, True
        )
        lse = tl.load(lse_log2_ptr + start_m + rows, mask=rows < left, other=float("inf"))
        delta = tl.load(delta_ptr + start_m + rows, mask=rows < left, other=0.0)
        s = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))  # [BLOCK_N, BLOCK_M]
        distance = (start_m + rows + offset)[None, :] - keys[:, None]
        s, slope_of_cap = log2_scores(s, distance, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
        p = tl.exp2(s - lse[None, :])
        if MASKED:
            p = tl.where(in_window(distance, window_left, window_right, HAS_LEFT, HAS_RIGHT), p, 0.0)
        dout = load_rows(  # [BLOCK_M, BLOCK_DV]
            dout_ptr + first * stride_dom, rows, stride_dom, left, HEAD_DIM_V, BLOCK_DV, True
        )
        dv = dot(p.to(dout.dtype), dout, dv)
        dp = dot(v, tl.trans(dout), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        ds = p * (dp - delta[None, :])
        if HAS_SOFTCAP:
            ds *= slope_of_cap
        dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window_left", "window_right"])
def flash_backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_log2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_dob,
    stride_dom,
    stride_doh,
    stride_lb,
    stride_lh,
    stride_dkb,
    stride_dkn,
    stride_dkh,
    stride_dvb,
    stride_dvn,
    stride_dvh,
    stride_slopes_b,
    kv_heads,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    HAS_ALIBI: tl.constexpr = slopes_ptr is not None
    # Under a causal mask the first keys are seen by the most queries: they start first.
    start_n, kv_head, batch = program_tile(seqlen_k, kv_heads, BLOCK_N, LAST_FIRST=False)
    first_q, seqlen_q = sequence_tokens(cu_seqlens_q_ptr, batch, seqlen_q)
    first_k, seqlen_k = sequence_tokens(cu_seqlens_k_ptr, batch, seqlen_k)
    if start_n >= seqlen_k:
        return
    first_k += start_n
    q_ptr += batch * stride_qb + first_q * stride_qm
    dout_ptr += batch * stride_dob + first_q * stride_dom
    lse_log2_ptr += batch * stride_lb + first_q
    delta_ptr += batch * stride_lb + first_q
    k_ptr += batch * stride_kb + kv_head * stride_kh + first_k * stride_kn
    v_ptr += batch * stride_vb + kv_head * stride_vh + first_k * stride_vn
    dk_ptr += batch * stride_dkb + kv_head * stride_dkh + first_k * stride_dkn
    dv_ptr += batch * stride_dvb + kv_head * stride_dvh + first_k * stride_dvn
    columns = tl.arange(0, BLOCK_N)
    keys = start_n + columns
    left = seqlen_k - start_n
    k = load_rows(k_ptr, columns, stride_kn, left, HEAD_DIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, columns, stride_vn, left, HEAD_DIM_V, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # A key j is seen by the queries at positions j - right ... j + left.
    offset = seqlen_k - seqlen_q
    last_key = tl.minimum(start_n + BLOCK_N, seqlen_k) - 1
    start, full_start, _, end = window_blocks(
        start_n - offset, last_key - offset, window_right, window_left, seqlen_q, HAS_RIGHT, HAS_LEFT, BLOCK_M
    )
    # A window on the left masks every block (a second loop beside it spills on sm_120 and gfx950), the boundary on the
    # right its own.
    if HAS_LEFT:
        full_start = end
    elif not HAS_RIGHT:
        full_start = start
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        slope = alibi_slope(slopes_ptr, batch, head, stride_slopes_b)
        qh_ptr = q_ptr + head * stride_qh
        douth_ptr = dout_ptr + head * stride_doh
        lseh_ptr = lse_log2_ptr + head * stride_lh
        deltah_ptr = delta_ptr + head * stride_lh
        if HAS_LEFT or HAS_RIGHT:
            dk, dv = _gather_key_gradients(
                dk, dv, k, v, keys, qh_ptr, douth_ptr, lseh_ptr, deltah_ptr, stride_qm, stride_dom, start, full_start,
                seqlen_q, offset, window_left, window_right, scale, softcap, slope, HEAD_DIM, HEAD_DIM_V, HAS_LEFT,
                HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        if not HAS_LEFT:
            dk, dv = _gather_key_gradients(
                dk, dv, k, v, keys, qh_ptr, douth_ptr, lseh_ptr, deltah_ptr, stride_qm, stride_dom, full_start, end,
                seqlen_q, offset, window_left, window_right, scale, softcap, slope, HEAD_DIM, HEAD_DIM_V, HAS_LEFT,
                HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip

    store_rows(dk_ptr, columns, stride_dkn, left, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, columns, stride_dvn, left, dv, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def _gather_query_gradient(
    dq,
    q,
    dout,
    lse,
    delta,
    position,
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
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Add what the key blocks that need a mask (if MASKED, else the others) give to dQ."""
    columns = tl.arange(0, BLOCK_N)
    low, high = block_range(start, full_start, full_end, end, HAS_LEFT, MASKED)
    for place in tl.range(low, high, BLOCK_N):
        start_n = block_at(place, full_start, full_end, HAS_LEFT, MASKED)
        first = tl.cast(start_n, tl.int64)
        left = seqlen_k - start_n
        k = load_rows(  # [BLOCK_N, BLOCK_D]
            k_ptr + first * stride_kn, columns, stride_kn, left, HEAD_DIM, BLOCK_D, MASKED
        )
        v = load_rows(  # [BLOCK_N, BLOCK_DV]
            v_ptr + first * stride_vn, columns, stride_vn, left, HEAD_DIM_V, BLOCK_DV, MASKED
        )
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))  # [BLOCK_M, BLOCK_N]
        distance = position[:, None] - (start_n + columns)[None, :]
        s, slope_of_cap = log2_scores(s, distance, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            seen = in_window(distance, window_left, window_right, HAS_LEFT, HAS_RIGHT) & (columns < left)[None, :]
            p = tl.where(seen, p, 0.0)
        dp = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        ds = p * (dp - delta[:, None])
        if HAS_SOFTCAP:
            ds *= slope_of_cap
        dq = dot(ds.to(k.dtype), k, dq)  # [BLOCK_M, BLOCK_D]
    return dq


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window_left", "window_right"])
def flash_backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_log2_ptr,
    delta_ptr,
    dq_ptr,
    slopes_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_dob,
    stride_dom,
    stride_doh,
    stride_lb,
    stride_lh,
    stride_dqb,
    stride_dqm,
    stride_dqh,
    stride_slopes_b,
    heads,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    HAS_ALIBI: tl.constexpr = slopes_ptr is not None
    start_m, head, batch = program_tile(seqlen_q, heads, BLOCK_M, LAST_FIRST=True)
    first_q, seqlen_q = sequence_tokens(cu_seqlens_q_ptr, batch, seqlen_q)
    first_k, seqlen_k = sequence_tokens(cu_seqlens_k_ptr, batch, seqlen_k)
    if cu_seqlens_q_ptr is not None:  # noqa: SIM102 - asked of dense inputs, it spills float32 (sm_80)
        if start_m >= seqlen_q:
            return
    first_q += start_m
    q_ptr += batch * stride_qb + head * stride_qh + first_q * stride_qm
    dout_ptr += batch * stride_dob + head * stride_doh + first_q * stride_dom
    dq_ptr += batch * stride_dqb + head * stride_dqh + first_q * stride_dqm
    lse_log2_ptr += batch * stride_lb + head * stride_lh + first_q
    delta_ptr += batch * stride_lb + head * stride_lh + first_q
    k_ptr += batch * stride_kb + head // GROUP * stride_kh + first_k * stride_kn
    v_ptr += batch * stride_vb + head // GROUP * stride_vh + first_k * stride_vn
    slope = alibi_slope(slopes_ptr, batch, head, stride_slopes_b)

    rows = tl.arange(0, BLOCK_M)
    left = seqlen_q - start_m
    offset = seqlen_k - seqlen_q
    position = start_m + rows + offset
    q = load_rows(q_ptr, rows, stride_qm, left, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr, rows, stride_dom, left, HEAD_DIM_V, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
    lse = tl.load(lse_log2_ptr + rows, mask=rows < left, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=rows < left, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    last_position = tl.minimum(start_m + BLOCK_M, seqlen_q) - 1 + offset
    start, full_start, full_end, end = window_blocks(
        start_m + offset, last_position, window_left, window_right, seqlen_k, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    dq = _gather_query_gradient(
        dq, q, dout, lse, delta, position, k_ptr, v_ptr, stride_kn, stride_vn, start, full_start, full_end, end,
        seqlen_k, window_left, window_right, scale, softcap, slope, HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT,
        HAS_SOFTCAP, HAS_ALIBI, False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    dq = _gather_query_gradient(
        dq, q, dout, lse, delta, position, k_ptr, v_ptr, stride_kn, stride_vn, start, full_start, full_end, end,
        seqlen_k, window_left, window_right, scale, softcap, slope, HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT,
        HAS_SOFTCAP, HAS_ALIBI, True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    store_rows(dq_ptr, rows, stride_dqm, left, dq * scale, HEAD_DIM, BLOCK_D)


class Backward(NamedTuple):
    """What the kernels read: a causal mask has ``window_right`` 0, packed sequences have cumulative lengths."""

    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lse_log2: torch.Tensor
    delta: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    batch: int
    seqlen_q: int
    seqlen_k: int
    window_left: int
    window_right: int
    scale: float
    softcap: float
    alibi_slopes: torch.Tensor | None

    @property
    def problem(self) -> tuple[int, ...]:
        """What the configurations are chosen by."""
        return dense_problem(
            self.q, self.v, self.batch, self.seqlen_q, self.seqlen_k, self.window_left, self.window_right
        )


def flash_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the dense kernels; see ``kvops.flash_attention_backward``."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call = prepare(
        dout, q, k, v, out, lse, None, None, q.shape[0], q.shape[1], k.shape[1],
        causal, window_left, window_right, scale, softcap, alibi_slopes, dlse,
    )  # fmt: skip
    launch_keys(call, dk, dv)
    launch_queries(call, dq)
    return dq, dk, dv, sink_gradients(call, sinks)


def flash_backward_varlen(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
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
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels on packed sequences; see ``kvops.flash_attention_varlen_backward``."""
    # Tokens after the last sequence belong to nobody: their gradient is 0.
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call = prepare(
        dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k,
        causal, window_left, window_right, scale, softcap, alibi_slopes, dlse,
    )  # fmt: skip
    launch_keys(call, dk, dv)
    launch_queries(call, dq)
    return dq, dk, dv, sink_gradients(call, sinks)


def prepare(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, batch, seqlen_q, seqlen_k,
    causal, window_left, window_right, scale, softcap, alibi_slopes, dlse,
) -> Backward:  # fmt: skip
    """Launch the first kernel, for delta and lse in units of log2."""
    *outer, rows = lse.shape
    # The rows of a head begin at multiples of 16 bytes, as TMA asks of those who copy them.
    stored = torch.empty((2, *outer, triton.cdiv(rows, 4) * 4), dtype=torch.float32, device=lse.device)
    delta, lse_log2 = stored[..., :rows]
    heads, head_dim_v = out.shape[-2:]
    block_dv = padded(head_dim_v)
    # delta does not care where a sequence ends: packed rows are one long sequence.
    block_m = max(16, min(128, 4096 // block_dv))
    programs = triton.cdiv(rows, block_m) * heads * (lse.shape[0] if lse.dim() == 3 else 1)
    if programs > 0:
        flash_delta_kernel[(programs,)](
            out,
            dout,
            lse,
            dlse,
            delta,
            lse_log2,
            *token_strides(out),
            *token_strides(dout),
            *row_strides(lse),
            *(row_strides(dlse) if dlse is not None else (0, 0)),
            *row_strides(delta),
            heads,
            rows,
            HEAD_DIM_V=head_dim_v,
            BLOCK_M=block_m,
            BLOCK_DV=block_dv,
            num_warps=4,
        )
    return Backward(
        dout, q, k, v, lse_log2, delta, cu_seqlens_q, cu_seqlens_k, batch, seqlen_q, seqlen_k,
        window_left, 0 if causal else window_right, q.shape[-1] ** -0.5 if scale is None else scale, softcap,
        alibi_slopes,
    )  # fmt: skip


def sink_gradients(call: Backward, sinks: torch.Tensor | None) -> torch.Tensor:
    """[heads] of the dtype of ``sinks``, or empty without sinks."""
    if sinks is None:
        return call.q.new_empty(0, dtype=torch.float32)
    # lse counts the sink: its probability is exp(sink - lse), and 0 in an empty row.
    p = torch.exp2(sinks.float()[:, None] * LOG2_E.value - call.lse_log2)
    return -(p * call.delta).sum(-1 if call.lse_log2.dim() == 2 else (0, 2)).to(sinks.dtype)


@cache
def _hopper() -> ModuleType:
    """The kernels' twins, imported where they run: elsewhere Gluon's parts for Hopper need not even be there."""
    import kvops.kernels.gluon_flash_backward as hopper

    return hopper


def _for_hopper(op: str, call: Backward, problem: tuple[int, ...]) -> GluonFlashBackwardConfig | None:
    """What a kernel's twin would run with, where it was measured and found faster."""
    if call.cu_seqlens_q is not None:
        return None
    tensors = call.dout, call.q, call.k, call.v
    options = {"softcap": call.softcap, "alibi_slopes": call.alibi_slopes}
    return choose_proven(op, current_device(), *problem, refusal=lambda: _hopper().launchable(*tensors, **options))


def _arguments(call: Backward, heads: int, config: AttentionConfig) -> tuple[tuple, tuple]:
    """The end of the list of arguments that both kernels have: scalars, then constants."""
    head_dim, head_dim_v = call.q.shape[-1], call.v.shape[-1]
    scalars = heads, call.seqlen_q, call.seqlen_k, call.window_left, call.window_right, call.scale, call.softcap
    constants = (
        call.q.shape[-2] // call.k.shape[-2], head_dim, head_dim_v, call.window_left >= 0, call.window_right >= 0,
        call.softcap > 0, config.block_m, config.block_n, padded(head_dim), padded(head_dim_v),
    )  # fmt: skip
    return scalars, constants


def launch_keys(call: Backward, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """Launch the kernel for dK and dV, or its twin for Hopper."""
    problem = call.problem
    proven = _for_hopper("gluon_flash_backward_keys", call, problem)
    if proven is not None:
        _hopper().launch_keys(call, dk, dv, proven)
        return
    config = choose("flash_backward_keys", current_device(), *problem)
    kv_heads = call.k.shape[-2]
    programs = triton.cdiv(call.seqlen_k, config.block_n) * kv_heads * call.batch
    if programs == 0:
        return
    scalars, constants = _arguments(call, kv_heads, config)
    flash_backward_keys_kernel[(programs,)](
        call.q,
        call.k,
        call.v,
        call.dout,
        call.lse_log2,
        call.delta,
        dk,
        dv,
        call.alibi_slopes,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        *token_strides(call.q),
        *token_strides(call.k),
        *token_strides(call.v),
        *token_strides(call.dout),
        *row_strides(call.delta),
        *token_strides(dk),
        *token_strides(dv),
        slope_stride(call.alibi_slopes),
        *scalars,
        *constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def launch_queries(call: Backward, dq: torch.Tensor) -> None:
    """Launch the kernel for dQ, or its twin for Hopper."""
    problem = call.problem
    proven = _for_hopper("gluon_flash_backward_queries", call, problem)
    if proven is not None:
        _hopper().launch_queries(call, dq, proven)
        return
    config = choose("flash_backward_queries", current_device(), *problem)
    heads = call.q.shape[-2]
    programs = triton.cdiv(call.seqlen_q, config.block_m) * heads * call.batch
    if programs == 0:
        return
    scalars, constants = _arguments(call, heads, config)
    flash_backward_queries_kernel[(programs,)](
        call.q,
        call.k,
        call.v,
        call.dout,
        call.lse_log2,
        call.delta,
        dq,
        call.alibi_slopes,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        *token_strides(call.q),
        *token_strides(call.k),
        *token_strides(call.v),
        *token_strides(call.dout),
        *row_strides(call.delta),
        *token_strides(dq),
        slope_stride(call.alibi_slopes),
        *scalars,
        *constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
