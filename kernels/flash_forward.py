"""Flash attention, forward (Dao et al., 2022 and 2023): a program owns a tile of one head's queries and walks the keys.

Dense [batch, seqlen, heads, head_dim] and packed [total_tokens, heads, head_dim] inputs run the same kernel: a packed
call passes the cumulative lengths, and their absence compiles to the dense case.
"""

import torch
import triton
import triton.language as tl

from kvops.autotune.lookup import choose
from kvops.kernels.dense import mask_kind, padded, row_strides, slope_stride, token_strides
from kvops.kernels.device import current_device
from kvops.kernels.primitives import (
    LN_2,
    LOG2_E,
    dot,
    in_window,
    load_rows,
    log2_scores,
    online_softmax_step,
    store_rows,
    window_blocks,
)


@triton.jit
def _attend(
    acc,
    m,
    l,
    q,
    position,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    start,
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
    FOLD_SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Attend to the key blocks from ``start`` to ``end``; only where MASKED may some of their keys be unseen."""
    columns = tl.arange(0, BLOCK_N)
    for start_n in tl.range(start, end, BLOCK_N):
        first = tl.cast(start_n, tl.int64)
        k = load_rows(  # [BLOCK_N, BLOCK_D]
            k_ptr + first * stride_kn, columns, stride_kn, seqlen_k - start_n, HEAD_DIM, BLOCK_D, MASKED
        )
        s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))  # [BLOCK_M, BLOCK_N]
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
            if MASKED:
                seen = in_window(distance, window_left, window_right, HAS_LEFT, HAS_RIGHT)
                s = tl.where(seen & (start_n + columns < seqlen_k)[None, :], s, float("-inf"))
            p, rescale, m, l = online_softmax_step(s, m, l)
        v = load_rows(  # [BLOCK_N, BLOCK_DV]
            v_ptr + first * stride_vn, columns, stride_vn, seqlen_k - start_n, HEAD_DIM_V, BLOCK_DV, MASKED
        )
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None])  # [BLOCK_M, BLOCK_DV]
    return acc, m, l


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "window_left", "window_right"])
def flash_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
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
    stride_ob,
    stride_om,
    stride_oh,
    stride_lb,
    stride_lh,
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
    FOLD_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    HAS_ALIBI: tl.constexpr = slopes_ptr is not None
    blocks = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    # Under a causal mask the last rows see the most keys: they start first, so that no long program starts late.
    start_m = (blocks - 1 - pid % blocks) * BLOCK_M
    head = (pid // blocks % heads).to(tl.int64)
    batch = (pid // blocks // heads).to(tl.int64)
    if cu_seqlens_q_ptr is not None:
        first_q = tl.load(cu_seqlens_q_ptr + batch).to(tl.int64)
        first_k = tl.load(cu_seqlens_k_ptr + batch).to(tl.int64)
        seqlen_q = (tl.load(cu_seqlens_q_ptr + batch + 1) - first_q).to(tl.int32)
        seqlen_k = (tl.load(cu_seqlens_k_ptr + batch + 1) - first_k).to(tl.int32)
        if start_m >= seqlen_q:
            return
        q_ptr += first_q * stride_qm
        k_ptr += first_k * stride_kn
        v_ptr += first_k * stride_vn
        out_ptr += first_q * stride_om
        lse_ptr += first_q
    else:
        q_ptr += batch * stride_qb
        k_ptr += batch * stride_kb
        v_ptr += batch * stride_vb
        out_ptr += batch * stride_ob
        lse_ptr += batch * stride_lb
    q_ptr += head * stride_qh + start_m.to(tl.int64) * stride_qm
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    out_ptr += head * stride_oh + start_m.to(tl.int64) * stride_om
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + batch * stride_slopes_b + head).to(tl.float32)

    rows = tl.arange(0, BLOCK_M)
    offset = seqlen_k - seqlen_q
    position = start_m + rows + offset
    q = load_rows(q_ptr, rows, stride_qm, seqlen_q - start_m, HEAD_DIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if sinks_ptr is not None:
        # The sink is a key whose value is 0: the softmax starts with it.
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        l = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)

    last_position = tl.minimum(start_m + BLOCK_M, seqlen_q) - 1 + offset
    start, full_start, full_end, end = window_blocks(
        start_m + offset, last_position, window_left, window_right, seqlen_k, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    if HAS_LEFT:
        acc, m, l = _attend(
            acc, m, l, q, position, k_ptr, v_ptr, stride_kn, stride_vn, start, full_start, seqlen_k,
            window_left, window_right, scale, softcap, slope, HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT,
            HAS_SOFTCAP, HAS_ALIBI, FOLD_SCALE, True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q, position, k_ptr, v_ptr, stride_kn, stride_vn, full_start, full_end, seqlen_k,
        window_left, window_right, scale, softcap, slope, HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT,
        HAS_SOFTCAP, HAS_ALIBI, FOLD_SCALE, False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q, position, k_ptr, v_ptr, stride_kn, stride_vn, full_end, end, seqlen_k,
        window_left, window_right, scale, softcap, slope, HEAD_DIM, HEAD_DIM_V, HAS_LEFT, HAS_RIGHT,
        HAS_SOFTCAP, HAS_ALIBI, FOLD_SCALE, True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    total = tl.where(l == 0.0, 1.0, l)
    lse = (m + tl.log2(total)) * LN_2
    if sinks_ptr is not None:
        # A row without keys is empty, whatever its sink.
        sees_a_key = seqlen_k > 0
        if HAS_RIGHT:
            sees_a_key = (position + window_right >= 0) & sees_a_key
        lse = tl.where(sees_a_key, lse, float("-inf"))
    tl.store(lse_ptr + head * stride_lh + start_m + rows, lse, mask=start_m + rows < seqlen_q)
    acc = acc / total[:, None]
    store_rows(out_ptr, rows, stride_om, seqlen_q - start_m, acc, HEAD_DIM_V, BLOCK_DV)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the dense kernel; see ``kvops.flash_attention``."""
    batch, seqlen_q, heads, _ = q.shape
    out = q.new_empty(batch, seqlen_q, heads, v.shape[3])
    lse = q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)
    _launch(
        q, k, v, out, lse, None, None, batch, seqlen_q, k.shape[1],
        causal, window_left, window_right, scale, softcap, sinks, alibi_slopes,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel on packed sequences; see ``kvops.flash_attention_varlen``."""
    # Tokens after the last sequence belong to nobody: they see no key.
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)
    _launch(
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k,
        causal, window_left, window_right, scale, softcap, sinks, alibi_slopes,
    )  # fmt: skip
    return out, lse


def _launch(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, batch, seqlen_q, seqlen_k,
    causal, window_left, window_right, scale, softcap, sinks, alibi_slopes,
):  # fmt: skip
    heads, head_dim = q.shape[-2:]
    head_dim_v = v.shape[-1]
    block_d, block_dv = padded(head_dim), padded(head_dim_v)
    if causal:
        window_right = 0
    mask = mask_kind(window_left, window_right)
    config = choose(
        "flash_forward",
        current_device(),
        max(block_d, block_dv),
        q.element_size(),
        mask,
        batch * heads,
        seqlen_q,
        seqlen_k,
    )
    programs = triton.cdiv(seqlen_q, config.block_m) * heads * batch
    if programs == 0:
        return
    scale = head_dim**-0.5 if scale is None else scale
    flash_forward_kernel[(programs,)](
        q,
        k,
        v,
        out,
        lse,
        sinks,
        alibi_slopes,
        cu_seqlens_q,
        cu_seqlens_k,
        *token_strides(q),
        *token_strides(k),
        *token_strides(v),
        *token_strides(out),
        *row_strides(lse),
        slope_stride(alibi_slopes),
        heads,
        seqlen_q,
        seqlen_k,
        window_left,
        window_right,
        scale,
        softcap,
        GROUP=heads // k.shape[-2],
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        HAS_LEFT=window_left >= 0,
        HAS_RIGHT=window_right >= 0,
        HAS_SOFTCAP=softcap > 0,
        # Multiplying after the maximum is right for a positive scale only.
        FOLD_SCALE=scale > 0 and softcap == 0 and alibi_slopes is None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
