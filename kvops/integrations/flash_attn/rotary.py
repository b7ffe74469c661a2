"""``flash_attn.layers.rotary``: rotary embedding of queries and keys (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvops import checks
from kvops.rotary import rotate

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
]


def rotate_by_positions(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x ``[..., H, D]`` with its first dimensions rotated by ``positions`` ``[...]`` of the tables ``[S, R / 2]``."""
    width = 2 * cos.shape[1]
    rotary, unchanged = x[..., :width].float(), x[..., width:]
    angles = (table[positions.long()].unsqueeze(-2).float() for table in (cos, sin))
    if interleaved:
        halves = rotate(rotary.unflatten(-1, (-1, 2)).mT.flatten(-2), *angles)
        rotated = halves.unflatten(-1, (2, -1)).mT.flatten(-2)
    else:
        rotated = rotate(rotary, *angles)
    return torch.cat((rotated.to(x.dtype), unchanged), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x ``[B, S, H, D]``, or packed ``[T, H, D]`` with ``cu_seqlens`` int32 ``[B + 1]``, rotated by its positions.

    Args:
        cos, sin: ``[S_rotary, R / 2]``. The first R dimensions of x are rotated, in float32 and rounded once.
        interleaved: rotate pairs of neighbours (GPT-J) instead of halves (GPT-NeoX).
        inplace: write the result into x and return x.
        seqlen_offsets: the position of the first token, a number or int32 or int64 ``[B]``.
        max_seqlen: not needed.

    Differentiable in x. Raises ValueError for wrong shapes and, on the CPU and with ``KVOPS_DEBUG=1``, for positions
    that the tables do not have.
    """
    checks.expect_rank("cos", cos, "[positions, rotary_dim / 2]")
    checks.expect_shape("sin", sin, "[positions, rotary_dim / 2] of cos", *cos.shape)
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(f"cos: expected at most head_dim / 2 = {x.shape[-1] // 2} columns, got {cos.shape[1]}")
    if cu_seqlens is None:
        checks.expect_rank("x", x, "[batch, seqlen, heads, head_dim]")
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        offsets = seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    else:
        checks.expect_rank("x", x, "[tokens, heads, head_dim]")
        token = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token.to(cu_seqlens.dtype), right=True)
        sequence = sequence.clamp(max=max(len(cu_seqlens) - 2, 0))
        positions = token - cu_seqlens[sequence]
        offsets = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    positions = positions + offsets
    if checks.may_look(positions):
        inside = (positions >= 0) & (positions < len(cos))
        checks.expect_data("seqlen_offsets", f"positions among the {len(cos)} of cos", inside)
    rotated = rotate_by_positions(x, cos, sin, positions, interleaved)
    return x.copy_(rotated) if inplace else rotated


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate the queries and keys of qkv ``[B, S, 3, H, D]`` in place, or, with ``num_heads_q``, of
    ``[B, S, Hq + 2 * Hkv, D]``. ``cos_k`` and ``sin_k`` are the tables of keys if they have others."""
    if qkv.dim() == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        checks.expect_rank("qkv", qkv, "[batch, seqlen, 3, heads, head_dim]" if num_heads_q is None else "[B, S, H, D]")
        assert num_heads_q is not None
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : (num_heads_q + qkv.shape[2]) // 2]
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    apply_rotary_emb(
        k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved, True, seqlen_offsets
    )
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotate the keys of kv ``[B, S, 2, H, D]`` in place."""
    checks.expect_shape("kv", kv, "[batch, seqlen, 2, heads, head_dim]", None, None, 2, None, None)
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(nn.Module):
    """Rotary embedding of queries and keys. The tables of cosines and sines are computed at every call.

    Args:
        dim: R, the dimensions that are rotated.
        base: of the frequencies ``base ** (-2 i / dim)``.
        interleaved: as in :func:`apply_rotary_emb`.
        scale_base: must be None: the scaling of xPos is not there.
        pos_idx_in_fp32: compute angles in float32 whatever the dtype; False is refused.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        pos_idx_in_fp32: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if scale_base is not None:
            raise ValueError(f"scale_base: expected None, as xPos is not supported, got {scale_base}")
        if not pos_idx_in_fp32:
            raise ValueError("pos_idx_in_fp32: expected True, as angles are computed in float32, got False")
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        inv_freq = self.base ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def tables(self, seqlen: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0 to ``seqlen`` - 1, ``[seqlen, dim / 2]`` in the dtype of ``like``."""
        angles = torch.outer(torch.arange(seqlen, device=like.device).float(), self.inv_freq.to(like.device).float())
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate qkv ``[B, S, 3, H, D]`` (with ``num_heads_q``: ``[B, S, Hq + 2 * Hkv, D]``) in place, or q ``[B, S, H,
        D]`` and kv ``[B, S, 2, H, D]``.

        ``max_seqlen`` is the number of positions; it is needed on a GPU where ``seqlen_offset`` is a tensor, which is
        read otherwise.
        """
        if max_seqlen is None:
            offset = int(seqlen_offset.max()) if isinstance(seqlen_offset, Tensor) else seqlen_offset
            max_seqlen = qkv.shape[1] + offset
        cos, sin = self.tables(max_seqlen, qkv)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, interleaved=self.interleaved, seqlen_offsets=seqlen_offset, num_heads_q=num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos, sin, self.interleaved, seqlen_offset)
