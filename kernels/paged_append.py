"""Write new keys and values into the last slots of each head's list of blocks."""

from typing import Any

import torch
import triton
import triton.language as tl

from kvops.autotune.config import PagedAppendConfig
from kvops.autotune.lookup import choose
from kvops.kernels.device import current_device
from kvops.kernels.paged import (
    as_bytes,
    in_every_row,
    list_strides,
    padded,
    positional,
    scale_stride,
    slot_scale_strides,
    slot_strides,
    strides,
)
from kvops.kernels.paged_tiles import READ_AS_SCALARS, UNSPECIALISED, new_tokens
from kvops.kernels.primitives import as_uint8_pointer, float32_to_float8, float32_to_int8, page_address
from kvops.prepared import prepared


@triton.jit
def row_scales(rows, mask, element: tl.constexpr):
    """The scale of each row [BLOCK_T, PADDED] for a cache of this element type: its largest finite magnitude becomes
    the largest number of the type. Not below the smallest normal float32, by which zeros are divided."""
    magnitude = tl.abs(rows)
    magnitude = tl.where(mask & (magnitude < float("inf")), magnitude, 0.0)
    if element == tl.int8:
        largest: tl.constexpr = 127.0
    elif element == tl.float8e5:
        largest: tl.constexpr = 57344.0
    else:
        largest: tl.constexpr = 448.0
    return tl.maximum(tl.div_rn(tl.max(magnitude, 1), largest), 1.1754943508222875e-38)


@triton.jit
def _copy_rows(
    source_ptr, stride_source, tokens, cache_ptr, cell, written, scale_ptr, slot_scale_ptrs,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Rows ``tokens`` of the source to the offsets ``cell`` of the cache, in the format that its pointer tells (see
    ``load_slots``). A float8 or int8 cache gets them divided by its scale, or each by a scale of its own, which is
    written to ``slot_scale_ptrs``."""
    element: tl.constexpr = cache_ptr.dtype.element_ty
    columns = tl.arange(0, PADDED)
    mask = written[:, None] & (columns < WIDTH)[None, :]
    rows = tl.load(source_ptr + tokens[:, None] * stride_source + columns[None, :], mask=mask)  # [BLOCK_T, PADDED]
    if element == tl.uint8 or element == tl.float8e5 or element == tl.int8:
        rows = rows.to(tl.float32)
        if scale_ptr is not None:
            rows = rows / tl.load(scale_ptr)
        if slot_scale_ptrs is not None:
            scale = row_scales(rows, mask, element)
            tl.store(slot_scale_ptrs, scale, mask=written)
            rows = rows / scale[:, None]
        if element == tl.int8:
            rows = float32_to_int8(rows)
        elif element == tl.float8e5:
            rows = float32_to_float8(rows, 2, 15, 57344.0)
        else:  # the bytes of e4m3
            rows = float32_to_float8(rows, 3, 7, 448.0)
    tl.store(as_uint8_pointer(cache_ptr) + cell[:, None] + columns[None, :], rows, mask=mask)


# Over 80 lines: 60 are the signature.
@triton.jit(do_not_specialize=[*UNSPECIALISED, "heads"], do_not_specialize_on_alignment=READ_AS_SCALARS)
def paged_append_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    seq_lens_ptr,
    q_lens_ptr,
    positions_ptr,
    token_positions_ptr,
    scores_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_slot_scale_ptr,
    v_slot_scale_ptr,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_kcb,
    stride_kcs,
    stride_kch,
    stride_vcb,
    stride_vcs,
    stride_vch,
    stride_tb,
    stride_th,
    stride_tn,
    stride_lb,
    stride_lh,
    stride_nb,
    stride_pb,
    stride_ps,
    stride_ph,
    stride_qpb,
    stride_qpt,
    stride_sb,
    stride_ss,
    stride_sh,
    stride_k_scale,
    stride_v_scale,
    stride_k_slot_b,
    stride_k_slot_s,
    stride_k_slot_h,
    stride_v_slot_b,
    stride_v_slot_s,
    stride_v_slot_h,
    heads,
    num_tokens,
    max_blocks,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    tiles = tl.cdiv(num_tokens, BLOCK_T)
    pid = tl.program_id(0).to(tl.int64)
    tokens = pid % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    head = pid // tiles % heads
    batch = pid // tiles // heads
    first_token, count, _ = new_tokens(batch, q_lens_ptr, stride_nb, num_tokens, PACKED)
    slots = tl.load(seq_lens_ptr + batch * stride_lb + head * stride_lh) - count + tokens
    written = (tokens < count) & (slots >= 0) & (slots < max_blocks.to(tl.int64) * BLOCK_SIZE)
    table_ptr += batch * stride_tb + head * stride_th
    block, offset = page_address(table_ptr, slots, written, stride_tn, BLOCK_SIZE)

    k_cell = block * stride_kcb + offset * stride_kcs + head * stride_kch
    v_cell = block * stride_vcb + offset * stride_vcs + head * stride_vch
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    if k_scale_ptr is not None:
        k_scale_ptr += head * stride_k_scale
    if v_scale_ptr is not None:
        v_scale_ptr += head * stride_v_scale
    places = first_token + tokens  # in this row of k and v
    if k_slot_scale_ptr is not None:
        k_slot_scale_ptr += block * stride_k_slot_b + offset * stride_k_slot_s + head * stride_k_slot_h
    if v_slot_scale_ptr is not None:
        v_slot_scale_ptr += block * stride_v_slot_b + offset * stride_v_slot_s + head * stride_v_slot_h
    _copy_rows(k_ptr, stride_kt, places, k_cache_ptr, k_cell, written, k_scale_ptr, k_slot_scale_ptr, HEAD_DIM, BLOCK_D)
    _copy_rows(
        v_ptr, stride_vt, places, v_cache_ptr, v_cell, written, v_scale_ptr, v_slot_scale_ptr, VALUE_DIM, BLOCK_DV
    )
    if positions_ptr is not None:
        position = tl.load(token_positions_ptr + batch * stride_qpb + places * stride_qpt, mask=written)
        tl.store(positions_ptr + block * stride_pb + offset * stride_ps + head * stride_ph, position, mask=written)
    if scores_ptr is not None:
        cell = block * stride_sb + offset * stride_ss + head * stride_sh
        tl.store(scores_ptr + cell, tl.zeros([BLOCK_T], tl.float32), mask=written)


class AppendKind:
    """What the launch follows from besides data: shapes, strides, dtypes and which tensors are given."""

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        q_lens: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        token_positions: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        k_slot_scale: torch.Tensor | None = None,
        v_slot_scale: torch.Tensor | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
    ) -> None:
        if cu_seqlens_q is not None:
            k, v, token_positions = in_every_row(cu_seqlens_q, k, v, token_positions)
            q_lens = cu_seqlens_q
        batch, tokens, heads, head_dim = k.shape
        self.num_tokens = tokens if max_seqlen_q is None else max_seqlen_q
        value_dim = v.shape[-1]
        block_d, block_dv = padded(head_dim), padded(value_dim)
        self.lists = batch * heads
        self.problem = max(block_d, block_dv), k.element_size(), self.num_tokens, self.lists
        self.as_bytes = torch.float8_e4m3fn in (k_cache.dtype, v_cache.dtype)
        self.numbers: dict[str, Any] = {  # by the kernel's parameter names
            **strides("stride_k", "bth", k.stride()[:3]),
            **strides("stride_v", "bth", v.stride()[:3]),
            **strides("stride_kc", "bsh", slot_strides(k_cache[..., 0])),
            **strides("stride_vc", "bsh", slot_strides(v_cache[..., 0])),
            **strides("stride_t", "bhn", (*list_strides(block_tables, k_cache), block_tables.stride(-1))),
            **strides("stride_l", "bh", list_strides(seq_lens, k_cache)),
            "stride_nb": 0 if q_lens is None else q_lens.stride(0),
            **strides("stride_p", "bsh", slot_strides(positions)),
            **strides("stride_qp", "bt", (0, 0) if token_positions is None else token_positions.stride()),
            **strides("stride_s", "bsh", slot_strides(scores)),
            "stride_k_scale": scale_stride(k_scale),
            "stride_v_scale": scale_stride(v_scale),
            **slot_scale_strides("k", k_slot_scale),
            **slot_scale_strides("v", v_slot_scale),
            "heads": heads,
            "num_tokens": self.num_tokens,
            "max_blocks": block_tables.shape[-1],
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_SIZE": k_cache.shape[1],
            "PACKED": cu_seqlens_q is not None,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
        }
        self._plan: tuple[PagedAppendConfig | None, int, tuple[Any, ...]] = None, 0, ()

    def plan(self, config: PagedAppendConfig) -> tuple[int, tuple[Any, ...]]:
        """The number of programs, and what follows the tensors of a launch."""
        if self._plan[0] is not config:
            programs = triton.cdiv(self.num_tokens, config.block_t) * self.lists
            numbers = positional(paged_append_kernel, "stride_kb", self.numbers | {"BLOCK_T": config.block_t})
            self._plan = config, programs, numbers
        return self._plan[1:]


@prepared(AppendKind)
def paged_append(
    kind: AppendKind,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    q_lens: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    token_positions: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_slot_scale: torch.Tensor | None = None,
    v_slot_scale: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    **numbers: object,
) -> None:
    """Launch the kernel; see ``kvops.paged_append``. ``kind`` has the arguments that are not data."""
    config = choose("paged_append", current_device(), *kind.problem)
    programs, plan = kind.plan(config)
    if programs == 0:
        return
    if kind.as_bytes:
        k_cache, v_cache = as_bytes(k_cache), as_bytes(v_cache)
    paged_append_kernel[(programs,)](
        k,
        v,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        q_lens if cu_seqlens_q is None else cu_seqlens_q,
        positions,
        token_positions,
        scores,
        k_scale,
        v_scale,
        k_slot_scale,
        v_slot_scale,
        *plan,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
