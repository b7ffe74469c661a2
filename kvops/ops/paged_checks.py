"""The ragged paged cache: checks of the arguments of append, attention and schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from kvops import checks
from kvops.eager.paged import schedule_ends
from kvops.ops.dense import check_bias, check_ends, check_scores, check_slopes

REDUCTIONS = ("sum", "sumsq", "max")


def check_lists(
    name: str,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    reference_name: str,
    reference: Tensor,
    batch: int,
) -> int:
    """Check the shape of a cache whose slots are as wide as the last dimension of ``reference``, and the lists of its
    blocks; returns the number of KV heads."""
    head_dim = reference.shape[-1]
    if cache.dim() == 4:
        num_heads = cache.shape[2]
        checks.expect_shape(name, cache, "[num_blocks, block_size, heads, head_dim]", None, None, None, head_dim)
        checks.expect_shape("block_tables", block_tables, "[batch, max_blocks]", batch, None)
        checks.expect_shape("seq_lens", seq_lens, "[batch]", batch)
    else:
        checks.expect_shape(name, cache, "[num_blocks, block_size, head_dim]", None, None, head_dim)
        checks.expect_shape("block_tables", block_tables, "[batch, heads, max_blocks]", batch, None, None)
        num_heads = block_tables.shape[1]
        checks.expect_shape("seq_lens", seq_lens, "[batch, heads]", batch, num_heads)
    checks.expect_at_least(f"{name}.shape[1] (block_size)", cache.shape[1], 1)
    checks.expect_at_least(f"{name}.shape[-1] (head_dim)", cache.shape[-1], 1)
    for list_name, tensor in (("block_tables", block_tables), ("seq_lens", seq_lens)):
        checks.expect_dtype(list_name, tensor, torch.int32)
        checks.expect_same_device(list_name, tensor, reference_name, reference)
    return num_heads


def _check_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_slot_scale: Tensor | None,
    v_slot_scale: Tensor | None,
    *,
    reference_name: str,
    reference: Tensor,
    batch: int,
) -> int:
    """Checks of the arguments that append and attention share; returns the number of KV heads."""
    num_heads = check_lists(
        "k_cache", k_cache, block_tables, seq_lens, reference_name=reference_name, reference=reference, batch=batch
    )
    layout = "[num_blocks, block_size, heads, head_dim]" if k_cache.dim() == 4 else "[num_blocks, block_size, head_dim]"
    checks.expect_shape("v_cache", v_cache, layout, *k_cache.shape[:-1], None)
    checks.expect_at_least("v_cache.shape[-1] (head_dim)", v_cache.shape[-1], 1)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.expect_dtype(name, tensor, *checks.FLOAT_DTYPES, *checks.QUANTISED_DTYPES)
    quantised = [cache.dtype in checks.QUANTISED_DTYPES for cache in (k_cache, v_cache)]
    if not any(quantised):
        checks.expect_same_dtype("v_cache", v_cache, "k_cache", k_cache)
    if not quantised[0]:
        checks.expect_same_dtype(reference_name, reference, "k_cache", k_cache)
    elif not quantised[1]:
        checks.expect_same_dtype(reference_name, reference, "v_cache", v_cache)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.expect_last_contiguous(name, tensor)
        checks.expect_same_device(name, tensor, reference_name, reference)
    check_scale("k_scale", k_scale, "k_cache", k_cache, num_heads, reference_name, reference)
    check_scale("v_scale", v_scale, "v_cache", v_cache, num_heads, reference_name, reference)
    for name, slot_scale, scale, cache in (
        ("k_slot_scale", k_slot_scale, k_scale, k_cache),
        ("v_slot_scale", v_slot_scale, v_scale, v_cache),
    ):
        if slot_scale is None:
            continue
        if cache.dtype not in checks.QUANTISED_DTYPES:
            raise ValueError(f"{name}: expected only with a float8 or int8 {name[0]}_cache, got {cache.dtype}")
        if scale is not None:
            raise ValueError(f"{name}: expected None with {name[0]}_scale, as each slot has one scale, got both")
        _check_slots(name, slot_scale, k_cache, torch.float32)
    return num_heads


def check_scale(
    name: str,
    scale: Tensor | None,
    cache_name: str,
    cache: Tensor,
    num_heads: int,
    reference_name: str,
    reference: Tensor,
) -> None:
    if scale is None:
        return
    if cache.dtype not in checks.QUANTISED_DTYPES:
        raise ValueError(f"{name}: expected only with a float8 or int8 {cache_name}, got {cache.dtype}")
    checks.expect_dtype(name, scale, torch.float32)
    if scale.dim() != 0:
        checks.expect_shape(name, scale, "[heads]", num_heads)
    checks.expect_same_device(name, scale, reference_name, reference)


def _check_slots(name: str, value: Tensor, k_cache: Tensor, dtype: torch.dtype, *, shared: bool = False) -> None:
    """A side array has one value per slot. For a 4-D cache ``shared`` also allows one value for all heads."""
    checks.expect_dtype(name, value, dtype)
    checks.expect_same_device(name, value, "k_cache", k_cache)
    if k_cache.dim() == 4 and not (shared and value.dim() == 2):
        checks.expect_shape(name, value, "[num_blocks, block_size, heads]", *k_cache.shape[:3])
    else:
        checks.expect_shape(name, value, "[num_blocks, block_size]", *k_cache.shape[:2])


def check_q_lens(q_lens: Tensor | None, reference_name: str, reference: Tensor) -> None:
    if q_lens is None:
        return
    checks.expect_dtype("q_lens", q_lens, torch.int32)
    checks.expect_shape("q_lens", q_lens, "[batch]", reference.shape[0])
    checks.expect_same_device("q_lens", q_lens, reference_name, reference)
    if checks.debug() and checks.has_data(q_lens):
        checks.expect_counts("q_lens", q_lens, reference.shape[1], reference_name)


def _check_positions(
    positions: Tensor | None,
    k_cache: Tensor,
    token_name: str,
    token_positions: Tensor | None,
    reference_name: str,
    reference: Tensor,
) -> None:
    """Positions of the slots and of the tokens, ``[batch, tokens]`` or packed: both or neither."""
    if (positions is None) != (token_positions is None):
        missing, given = ("positions", token_name) if positions is None else (token_name, "positions")
        raise ValueError(f"{missing}: expected along with {given}, got None")
    if positions is not None and token_positions is not None:
        _check_slots("positions", positions, k_cache, torch.int32, shared=True)
        checks.expect_dtype(token_name, token_positions, torch.int32)
        tokens = reference.shape[:-2]
        checks.expect_shape(token_name, token_positions, "[batch, tokens]" if len(tokens) == 2 else "[tokens]", *tokens)
        checks.expect_same_device(token_name, token_positions, reference_name, reference)


def check_packed(
    name: str,
    tokens: Tensor,
    layout: str,
    q_lens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
) -> tuple[int, int]:
    """Check how the tokens of q or k lie; returns the number of sequences and the most tokens of one."""
    if cu_seqlens_q is None or max_seqlen_q is None:
        if (cu_seqlens_q is None) != (max_seqlen_q is None):
            missing, given = ("max_seqlen_q", "cu_seqlens_q")[:: 1 if max_seqlen_q is None else -1]
            raise ValueError(f"{missing}: expected along with {given}, got None")
        checks.expect_rank(name, tokens, f"[batch, tokens, {layout}]")
        return tokens.shape[0], tokens.shape[1]
    checks.expect_rank(name, tokens, f"[tokens, {layout}]")
    if q_lens is not None:
        raise ValueError("q_lens: expected None with cu_seqlens_q, which has the lengths")
    checks.expect_rank("cu_seqlens_q", cu_seqlens_q, "[batch + 1]")
    checks.expect_dtype("cu_seqlens_q", cu_seqlens_q, torch.int32)
    checks.expect_same_device("cu_seqlens_q", cu_seqlens_q, name, tokens)
    checks.expect_at_least("cu_seqlens_q.shape[0] (batch + 1)", cu_seqlens_q.shape[0], 1)
    checks.expect_at_least("max_seqlen_q", max_seqlen_q, 0)
    return cu_seqlens_q.shape[0] - 1, max_seqlen_q


def _check_tree_mask(tree_mask: Tensor, q: Tensor, B: int, T: int) -> None:
    checks.expect_dtype("tree_mask", tree_mask, torch.bool)
    if tree_mask.dim() == 2:
        checks.expect_shape("tree_mask", tree_mask, "[tokens, tokens]", T, T)
    else:
        checks.expect_shape("tree_mask", tree_mask, "[batch, tokens, tokens]", B, T, T)
    checks.expect_same_device("tree_mask", tree_mask, "q", q)


def _check_bias(bias: Tensor, q: Tensor) -> None:
    """As of dense attention, with a key for each slot that the bias has."""
    slots = bias.shape[-1] if bias.dim() else 1
    check_bias(bias, q, slots)
    checks.expect_at_least("bias.shape[-1] (slots)", slots, 1)


def _check_bias_data(bias: Tensor, seq_lens: Tensor) -> None:
    """Runs under KVOPS_DEBUG=1."""
    if bias.dim() and bias.shape[-1] > 1:
        slots = bias.shape[-1]
        checks.expect_data("seq_lens", f"lengths up to the {slots} slots of bias", seq_lens <= slots)


def check_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    q_lens: Tensor | None = None,
    positions: Tensor | None = None,
    token_positions: Tensor | None = None,
    scores: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> None:
    batch, _ = check_packed("k", k, "heads, head_dim", q_lens, cu_seqlens_q, max_seqlen_q)
    checks.expect_dtype("k", k, *checks.FLOAT_DTYPES)
    checks.expect_last_contiguous("k", k)
    num_heads = _check_cache(
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        k_scale,
        v_scale,
        k_slot_scale,
        v_slot_scale,
        reference_name="k",
        reference=k,
        batch=batch,
    )
    if num_heads != k.shape[-2]:
        raise ValueError(f"k: expected the {num_heads} heads of the cache, got {k.shape[-2]}")
    layout = "[batch, tokens, heads, value_dim]" if k.dim() == 4 else "[tokens, heads, value_dim]"
    checks.expect_shape("v", v, layout, *k.shape[:-1], v_cache.shape[-1])
    checks.expect_same_dtype("v", v, "k", k)
    checks.expect_last_contiguous("v", v)
    checks.expect_same_device("v", v, "k", k)
    check_q_lens(q_lens, "k", k)
    _check_positions(positions, k_cache, "token_positions", token_positions, "k", k)
    if scores is not None:
        _check_slots("scores", scores, k_cache, torch.float32)
    if checks.debug() and checks.has_data(seq_lens):
        checks.expect_inside(block_tables, seq_lens, *k_cache.shape[:2])


def check_packed_data(
    name: str, tokens: Tensor, cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None
) -> None:
    """Check where packed sequences begin. Synchronises, so on a GPU under KVOPS_DEBUG=1 only. The first one need not
    begin at 0: a call may have some of the sequences of a batch."""
    if cu_seqlens_q is None or max_seqlen_q is None:
        return
    ends = cu_seqlens_q.tolist()
    if ends[0] < 0:
        raise ValueError(f"cu_seqlens_q: expected places of at least 0, got {ends[0]}")
    check_ends("_q", name, len(tokens), ends, max_seqlen_q)


def check_packed_queries(
    q: Tensor, *args: Tensor, cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None, **given: object
) -> None:
    """:func:`check_packed_data` with the arguments of an operator of attention."""
    check_packed_data("q", q, cu_seqlens_q, max_seqlen_q)


# Over 80 lines: 34 are the signature.
def check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    q_lens: Tensor | None = None,
    causal: bool = True,
    window_left: int = -1,
    positions: Tensor | None = None,
    query_positions: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
    scores: Tensor | None = None,
    score_reduce: str = "sum",
    score_decay: float = 1.0,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    score_last: int = -1,
    score_decays: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    B, T = check_packed("q", q, "query_heads, head_dim", q_lens, cu_seqlens_q, max_seqlen_q)
    checks.expect_dtype("q", q, *checks.FLOAT_DTYPES)
    checks.expect_last_contiguous("q", q)
    num_heads = _check_cache(
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        k_scale,
        v_scale,
        k_slot_scale,
        v_slot_scale,
        reference_name="q",
        reference=q,
        batch=B,
    )
    Hq = q.shape[-2]
    checks.expect_head_ratio("q", Hq, "k_cache" if k_cache.dim() == 4 else "block_tables", num_heads)
    check_q_lens(q_lens, "q", q)
    checks.expect_at_least("window_left", window_left, -1)
    check_scores(scale, softcap)
    _check_positions(positions, k_cache, "query_positions", query_positions, "q", q)
    if query_positions is not None and window_left >= 0 and checks.debug() and checks.has_data(query_positions):
        lowest = min(window_left, 2**31 - 1) - 2**31  # kernels subtract the window in int32
        expected = f"positions of at least {lowest}, from which window_left = {window_left} stays within int32"
        checks.expect_data("query_positions", expected, query_positions >= lowest)
    if sinks is not None:
        checks.expect_dtype("sinks", sinks, *checks.FLOAT_DTYPES)
        checks.expect_shape("sinks", sinks, "[query_heads]", Hq)
        checks.expect_same_device("sinks", sinks, "q", q)
    check_slopes(alibi_slopes, B, q)
    if bias is not None:
        _check_bias(bias, q)
    if tree_mask is not None:
        _check_tree_mask(tree_mask, q, B, T)
    check_out(out, q, v_cache.shape[-1])
    checks.expect_choice("score_reduce", score_reduce, REDUCTIONS)
    checks.expect_at_least("score_decay", score_decay, 0.0)
    checks.expect_finite("score_decay", score_decay)
    checks.expect_at_least("score_last", score_last, -1)
    if score_decays is not None:
        checks.expect_dtype("score_decays", score_decays, torch.float32)
        checks.expect_shape("score_decays", score_decays, "[batch]", B)
        checks.expect_last_contiguous("score_decays", score_decays)
        checks.expect_same_device("score_decays", score_decays, "q", q)
        if score_decay != 1.0:
            raise ValueError(f"score_decay: expected only one of score_decay and score_decays, got {score_decay}")
    if scores is not None:
        _check_slots("scores", scores, k_cache, torch.float32)
    if schedule is not None:
        check_given_schedule(schedule, B if k_cache.dim() == 4 else B * num_heads, "q", q)
    if checks.debug() and checks.has_data(seq_lens):
        checks.expect_inside(block_tables, seq_lens, *k_cache.shape[:2])
        if bias is not None:
            _check_bias_data(bias, seq_lens)
        if schedule is not None:
            check_schedule_data(schedule, seq_lens, k_cache.shape[1], batch_invariant)


def check_out(out: Tensor | None, q: Tensor, value_dim: int) -> None:
    if out is None:
        return
    checks.expect_dtype("out", out, q.dtype)
    layout = "[batch, tokens, query_heads, value_dim]" if q.dim() == 4 else "[tokens, query_heads, value_dim]"
    checks.expect_shape("out", out, layout, *q.shape[:-1], value_dim)
    checks.expect_last_contiguous("out", out)
    checks.expect_same_device("out", out, "q", q)


def check_given_schedule(schedule: Tensor, lists: int, reference_name: str, reference: Tensor) -> None:
    checks.expect_dtype("schedule", schedule, torch.int32)
    checks.expect_rank("schedule", schedule, "[entries]")
    checks.expect_at_least(f"schedule.shape[0] (of {lists} lists)", schedule.shape[0], lists + 3)
    checks.expect_last_contiguous("schedule", schedule)
    checks.expect_same_device("schedule", schedule, reference_name, reference)


def check_schedule_data(schedule: Tensor, seq_lens: Tensor, block_size: int, batch_invariant: bool) -> None:
    """Hold a given schedule to the lengths of this call; runs under KVOPS_DEBUG=1."""
    ends, _ = schedule_ends(seq_lens.reshape(1, -1), block_size, batch_invariant)
    fits = schedule[2 : ends.shape[1] + 2] == ends[0]
    expected = f"that of paged_schedule with these lengths and batch_invariant={batch_invariant}"
    checks.expect_data("schedule", expected, fits)


def check_schedule(seq_lens: Tensor, block_size: int, *, num_programs: int = 0, batch_invariant: bool = False) -> None:
    if seq_lens.dim() not in (1, 2, 3):
        raise ValueError(
            f"seq_lens: expected shape [batch], [batch, heads] or [layers, batch, heads], got {list(seq_lens.shape)}"
        )
    checks.expect_dtype("seq_lens", seq_lens, torch.int32)
    checks.expect_at_least("block_size", block_size, 1)
    checks.expect_at_least("num_programs", num_programs, 0)
    if checks.debug() and checks.has_data(seq_lens):
        checks.expect_data("seq_lens", "lengths of at least 0", seq_lens >= 0)


def scale_tensor(name: str, scale: object, reference_name: str, reference: Tensor) -> Tensor | None:
    """``scale`` as a tensor. A number becomes 0-d, filled on the device of ``reference``: a graph can capture that."""
    if scale is None or isinstance(scale, Tensor):
        return scale
    checks.expect_tensor(reference_name, reference)
    if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a float or a float32 tensor, got {type(scale).__name__}")
    if isinstance(scale, (int, float)):
        checks.expect_finite(name, scale)
        if scale == 0:
            raise ValueError(f"{name}: expected a number other than 0 (stored values are divided by it), got {scale}")
    return torch.full((), scale, dtype=torch.float32, device=reference.device)  # type: ignore[arg-type]
