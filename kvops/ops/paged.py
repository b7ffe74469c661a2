"""The ragged paged cache: schemas, checks, fakes and the public functions of append, attention and schedule."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import paged as eager
from kvops.ops.dense import check_scores
from kvops.ops.registry import LIBRARY, register
from kvops.private_torch import schema_of

REDUCTIONS = ("sum", "sumsq", "max")
# Programs per multiprocessor: as many as fit at once with any number of registers, so that all shares run together.
_PROGRAMS_PER_SM = 2


def _check_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    reference_name: str,
    reference: Tensor,
    head_dim: int,
) -> int:
    """Checks of what append and attention share; returns the number of KV heads."""
    if k_cache.dim() == 4:
        layout = "[num_blocks, block_size, heads, head_dim]"
        num_heads = k_cache.shape[2]
        checks.expect_shape("k_cache", k_cache, layout, None, None, None, head_dim)
        checks.expect_shape("v_cache", v_cache, layout, *k_cache.shape[:3], None)
        checks.expect_shape("block_tables", block_tables, "[batch, max_blocks]", reference.shape[0], None)
        checks.expect_shape("seq_lens", seq_lens, "[batch]", reference.shape[0])
    else:
        layout = "[num_blocks, block_size, head_dim]"
        checks.expect_shape("k_cache", k_cache, layout, None, None, head_dim)
        checks.expect_shape("v_cache", v_cache, layout, *k_cache.shape[:2], None)
        checks.expect_shape("block_tables", block_tables, "[batch, heads, max_blocks]", reference.shape[0], None, None)
        num_heads = block_tables.shape[1]
        checks.expect_shape("seq_lens", seq_lens, "[batch, heads]", reference.shape[0], num_heads)
    checks.expect_at_least("k_cache.shape[1] (block_size)", k_cache.shape[1], 1)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.expect_at_least(f"{name}.shape[-1] (head_dim)", tensor.shape[-1], 1)
    for name, tensor in (("block_tables", block_tables), ("seq_lens", seq_lens)):
        checks.expect_dtype(name, tensor, torch.int32)
        checks.expect_same_device(name, tensor, reference_name, reference)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.expect_dtype(name, tensor, *checks.FLOAT_DTYPES, torch.float8_e4m3fn)
    if k_cache.dtype != torch.float8_e4m3fn:
        checks.expect_same_dtype(reference_name, reference, "k_cache", k_cache)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.expect_last_contiguous(name, tensor)
        checks.expect_same_device(name, tensor, reference_name, reference)
    checks.expect_same_dtype("v_cache", v_cache, "k_cache", k_cache)
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if value is None:
            continue
        if k_cache.dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name}: expected only with a float8_e4m3fn cache, got a cache of {k_cache.dtype}")
        checks.expect_dtype(name, value, torch.float32)
        if value.dim() != 0:
            checks.expect_shape(name, value, "[heads]", num_heads)
        checks.expect_same_device(name, value, reference_name, reference)
    return num_heads


def _check_slots(name: str, value: Tensor, k_cache: Tensor, dtype: torch.dtype, *, shared: bool = False) -> None:
    """A side array has one value per slot; where a block holds every head, ``shared`` allows one for all heads."""
    checks.expect_dtype(name, value, dtype)
    checks.expect_same_device(name, value, "k_cache", k_cache)
    if k_cache.dim() == 4 and not (shared and value.dim() == 2):
        checks.expect_shape(name, value, "[num_blocks, block_size, heads]", *k_cache.shape[:3])
    else:
        checks.expect_shape(name, value, "[num_blocks, block_size]", *k_cache.shape[:2])


def _check_tables_data(k_cache: Tensor, block_tables: Tensor, seq_lens: Tensor) -> None:
    """What only the device can tell: runs under KVOPS_DEBUG=1, where a synchronisation is welcome."""
    num_blocks, block_size = k_cache.shape[:2]
    capacity = block_tables.shape[-1] * block_size
    checks.expect_data("seq_lens", "lengths of at least 0", seq_lens >= 0)
    checks.expect_data("seq_lens", f"lengths up to the {capacity} slots of a table", seq_lens <= capacity)
    used = torch.arange(block_tables.shape[-1], device=block_tables.device) * block_size < seq_lens[..., None]
    inside = (block_tables >= 0) & (block_tables < num_blocks)
    checks.expect_data("block_tables", f"blocks from 0 to {num_blocks - 1} before each length", inside | ~used)


def _check_q_lens(q_lens: Tensor | None, reference_name: str, reference: Tensor) -> None:
    if q_lens is None:
        return
    checks.expect_dtype("q_lens", q_lens, torch.int32)
    checks.expect_shape("q_lens", q_lens, "[batch]", reference.shape[0])
    checks.expect_same_device("q_lens", q_lens, reference_name, reference)
    if checks.debug() and checks.has_data(q_lens):
        T = reference.shape[1]
        checks.expect_data(
            "q_lens", f"lengths from 0 to the {T} tokens of {reference_name}", (q_lens >= 0) & (q_lens <= T)
        )


def _check_append(
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
) -> None:
    checks.expect_rank("k", k, "[batch, tokens, heads, head_dim]")
    checks.expect_dtype("k", k, *checks.FLOAT_DTYPES)
    checks.expect_last_contiguous("k", k)
    num_heads = _check_cache(
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        k_scale,
        v_scale,
        reference_name="k",
        reference=k,
        head_dim=k.shape[3],
    )
    B, T, Hkv, _ = k.shape
    if num_heads != Hkv:
        raise ValueError(f"k: expected the {num_heads} heads of the cache, got {Hkv}")
    checks.expect_shape("v", v, "[batch, tokens, heads, value_dim]", B, T, Hkv, v_cache.shape[-1])
    checks.expect_same_dtype("v", v, "k", k)
    checks.expect_last_contiguous("v", v)
    checks.expect_same_device("v", v, "k", k)
    _check_q_lens(q_lens, "k", k)
    if (positions is None) != (token_positions is None):
        missing, given = ("positions", "token_positions") if positions is None else ("token_positions", "positions")
        raise ValueError(f"{missing}: expected along with {given}, got None")
    if positions is not None and token_positions is not None:
        _check_slots("positions", positions, k_cache, torch.int32, shared=True)
        checks.expect_dtype("token_positions", token_positions, torch.int32)
        checks.expect_shape("token_positions", token_positions, "[batch, tokens]", B, T)
        checks.expect_same_device("token_positions", token_positions, "k", k)
    if scores is not None:
        _check_slots("scores", scores, k_cache, torch.float32)
    if checks.debug() and checks.has_data(seq_lens):
        _check_tables_data(k_cache, block_tables, seq_lens)


def _fake_append(*args: object, **kwargs: object) -> None:
    return None


_append = register(
    "paged_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_tables, Tensor seq_lens, *, "
    "Tensor? q_lens=None, Tensor(c!)? positions=None, Tensor? token_positions=None, Tensor(d!)? scores=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    check=_check_append,
    fake=_fake_append,
    eager=eager.paged_append,
    kernel="kvops.kernels.paged_append:paged_append",
    cpu="kvops.kernels.cpu.paged_append:paged_append",
    autocast=("k", "v"),
    autocast_like="k_cache",
)


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
    scores: Tensor | None = None,
    score_reduce: str = "sum",
    score_decay: float = 1.0,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
) -> None:
    checks.expect_rank("q", q, "[batch, tokens, query_heads, head_dim]")
    checks.expect_dtype("q", q, *checks.FLOAT_DTYPES)
    checks.expect_last_contiguous("q", q)
    num_heads = _check_cache(
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        k_scale,
        v_scale,
        reference_name="q",
        reference=q,
        head_dim=q.shape[3],
    )
    B, T, Hq, _ = q.shape
    checks.expect_head_ratio("q", Hq, "k_cache" if k_cache.dim() == 4 else "block_tables", num_heads)
    _check_q_lens(q_lens, "q", q)
    checks.expect_at_least("window_left", window_left, -1)
    check_scores(scale, softcap)
    if (positions is None) != (query_positions is None):
        missing, given = ("positions", "query_positions") if positions is None else ("query_positions", "positions")
        raise ValueError(f"{missing}: expected along with {given}, got None")
    if positions is not None and query_positions is not None:
        _check_slots("positions", positions, k_cache, torch.int32, shared=True)
        checks.expect_dtype("query_positions", query_positions, torch.int32)
        checks.expect_shape("query_positions", query_positions, "[batch, tokens]", B, T)
        checks.expect_same_device("query_positions", query_positions, "q", q)
        if window_left >= 0 and checks.debug() and checks.has_data(query_positions):
            lowest = min(window_left, 2**31 - 1) - 2**31  # kernels subtract the window in int32
            expected = f"positions of at least {lowest}, from which window_left = {window_left} stays within int32"
            checks.expect_data("query_positions", expected, query_positions >= lowest)
    if sinks is not None:
        checks.expect_dtype("sinks", sinks, *checks.FLOAT_DTYPES)
        checks.expect_shape("sinks", sinks, "[query_heads]", Hq)
        checks.expect_same_device("sinks", sinks, "q", q)
    if tree_mask is not None:
        checks.expect_dtype("tree_mask", tree_mask, torch.bool)
        if tree_mask.dim() == 2:
            checks.expect_shape("tree_mask", tree_mask, "[tokens, tokens]", T, T)
        else:
            checks.expect_shape("tree_mask", tree_mask, "[batch, tokens, tokens]", B, T, T)
        checks.expect_same_device("tree_mask", tree_mask, "q", q)
    checks.expect_choice("score_reduce", score_reduce, REDUCTIONS)
    checks.expect_at_least("score_decay", score_decay, 0.0)
    checks.expect_finite("score_decay", score_decay)
    if scores is not None:
        _check_slots("scores", scores, k_cache, torch.float32)
    if schedule is not None:
        lists = B if k_cache.dim() == 4 else B * num_heads
        checks.expect_dtype("schedule", schedule, torch.int32)
        checks.expect_rank("schedule", schedule, "[entries]")
        checks.expect_at_least(f"schedule.shape[0] (of {lists} lists)", schedule.shape[0], lists + 3)
        checks.expect_last_contiguous("schedule", schedule)
        checks.expect_same_device("schedule", schedule, "q", q)
    if checks.debug() and checks.has_data(seq_lens):
        _check_tables_data(k_cache, block_tables, seq_lens)
        if schedule is not None:
            ends, _ = eager.schedule_ends(seq_lens.reshape(1, -1), k_cache.shape[1], batch_invariant)
            fits = schedule[2 : ends.shape[1] + 2] == ends[0]
            expected = f"that of paged_schedule with these lengths and batch_invariant={batch_invariant}"
            checks.expect_data("schedule", expected, fits)


def _fake_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    B, T, Hq, _ = q.shape
    return q.new_empty(B, T, Hq, v_cache.shape[-1]), q.new_empty(B, Hq, T, dtype=torch.float32)


_attention = register(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, *, "
    "Tensor? q_lens=None, bool causal=True, int window_left=-1, Tensor? positions=None, Tensor? query_positions=None, "
    "float? scale=None, float softcap=0.0, Tensor? sinks=None, Tensor? tree_mask=None, Tensor? k_scale=None, "
    'Tensor? v_scale=None, Tensor(a!)? scores=None, str score_reduce="sum", float score_decay=1.0, '
    "Tensor? schedule=None, bool batch_invariant=False) -> (Tensor out, Tensor lse)",
    check=check_attention,
    fake=_fake_attention,
    eager=eager.paged_attention,
    kernel="kvops.kernels.paged_attention:paged_attention",
    cpu="kvops.kernels.cpu.paged_attention:paged_attention",
    autocast=("q",),
    autocast_like="k_cache",
)


def _check_schedule(seq_lens: Tensor, block_size: int, *, num_programs: int = 0, batch_invariant: bool = False) -> None:
    if seq_lens.dim() not in (1, 2, 3):
        raise ValueError(
            f"seq_lens: expected shape [batch], [batch, heads] or [layers, batch, heads], got {list(seq_lens.shape)}"
        )
    checks.expect_dtype("seq_lens", seq_lens, torch.int32)
    checks.expect_at_least("block_size", block_size, 1)
    checks.expect_at_least("num_programs", num_programs, 0)
    if checks.debug() and checks.has_data(seq_lens):
        checks.expect_data("seq_lens", "lengths of at least 0", seq_lens >= 0)


def _fake_schedule(
    seq_lens: Tensor, block_size: int, *, num_programs: int = 0, batch_invariant: bool = False
) -> Tensor:
    if not num_programs:
        num_programs = eager.CPU_PROGRAMS
        if seq_lens.device.type == "cuda":
            num_programs = _PROGRAMS_PER_SM * torch.cuda.get_device_properties(seq_lens.device).multi_processor_count
    layers = seq_lens.shape[: seq_lens.dim() - 2] if seq_lens.dim() == 3 else ()
    lists = 1
    for size in seq_lens.shape[len(layers) :]:
        lists = lists * size
    return seq_lens.new_empty(*layers, 2 + lists + num_programs)


_schedule = register(
    "paged_schedule(Tensor seq_lens, int block_size, *, int num_programs=0, bool batch_invariant=False) -> Tensor",
    check=_check_schedule,
    fake=_fake_schedule,
    eager=eager.paged_schedule,
    kernel="kvops.kernels.paged_schedule:paged_schedule",
)


def _scale_tensor(name: str, scale: object, reference_name: str, reference: Tensor) -> Tensor | None:
    """A number as a 0-d tensor: filled on the device of ``reference``, so that a graph can capture it."""
    if scale is None or isinstance(scale, Tensor):
        return scale
    checks.expect_tensor(reference_name, reference)
    if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a float or a float32 tensor, got {type(scale).__name__}")
    if isinstance(scale, (int, float)):
        checks.expect_finite(name, scale)
        if scale == 0:
            raise ValueError(f"{name}: expected a number other than 0, which what is stored is divided by")
    return torch.full((), scale, dtype=torch.float32, device=reference.device)  # type: ignore[arg-type]


def _append_with_numbers(k: Tensor, *args: Tensor, **kwargs: object) -> None:
    for name in ("k_scale", "v_scale"):
        kwargs[name] = _scale_tensor(name, kwargs.get(name), "k", k)
    _append(k, *args, **kwargs)


def _attention_with_numbers(q: Tensor, *args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    for name in ("k_scale", "v_scale"):
        kwargs[name] = _scale_tensor(name, kwargs.get(name), "q", q)
    return _attention(q, *args, **kwargs)  # type: ignore[no-any-return]


def _define_with_numbers(overload: object, function: object) -> None:
    """Overloads that take one or both of the scales of a float8 cache as plain numbers.

    The mixed ones come first: torch would take a tensor of one element for a number, and read it back to do so.
    """
    schema = str(schema_of(overload)).removeprefix("kvops::")
    name, rest = schema.split("(", 1)
    for kind, scales in (
        ("k_scale_number", ("k_scale",)),
        ("v_scale_number", ("v_scale",)),
        ("scale_number", ("k_scale", "v_scale")),
    ):
        arguments = rest
        for scale in scales:
            arguments = arguments.replace(f"Tensor? {scale}=None", f"float? {scale}=None")
        LIBRARY.define(f"{name}.{kind}({arguments}")
        LIBRARY.impl(f"{name}.{kind}", function, "CompositeImplicitAutograd")


_define_with_numbers(_append, _append_with_numbers)
_define_with_numbers(_attention, _attention_with_numbers)


def paged_append(
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
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
) -> None:
    """Write new keys and values into the last slots of each head's list.

    Lengths include the new tokens: token ``t`` of ``q_lens[b]`` (default T) goes to slot ``seq_lens - q_lens[b] + t``
    of the list; tokens from ``q_lens[b]`` on are padding and go nowhere. A list that is shorter than ``q_lens[b]``
    keeps the last tokens that fit.

    Under ``torch.compile(dynamic=True)`` a cache that is written must not be a view that begins inside a pool, such as
    ``pool[layer]``: inductor (PyTorch 2.13, pytorch issue 198068) forgets where it begins, of this operator as of any
    other. A tensor for each layer is written right, and so is one pool whose tables number the blocks of all layers.

    Args:
        k: ``[B, T, Hkv, D]`` float16, bfloat16 or float32.
        v: ``[B, T, Hkv, Dv]``, the same dtype.
        k_cache: written; ``[num_blocks, block_size, D]`` with one head's slots to a block, or
            ``[num_blocks, block_size, Hkv, D]`` with any strides; the dtype of ``k``, or float8_e4m3fn.
        v_cache: written; the same with ``Dv``.
        block_tables: int32 ``[B, Hkv, max_blocks]`` (``[B, max_blocks]`` for a 4-D cache). Entries past a length are
            never read.
        seq_lens: int32 ``[B, Hkv]`` (``[B]``), with these tokens counted in.
        q_lens: int32 ``[B]``, how many of the T tokens are real.
        positions: written with ``token_positions``; int32 ``[num_blocks, block_size]``; a 4-D cache may also have
            ``[num_blocks, block_size, Hkv]``.
        token_positions: int32 ``[B, T]``, the tokens' original positions; along with ``positions``.
        scores: zeroed in the new slots; float32 ``[num_blocks, block_size]`` (``[num_blocks, block_size, Hkv]``).
        k_scale: of a float8 cache, a float or float32 ``[Hkv]``: ``k / k_scale`` is stored, rounded to nearest and
            clamped to the 448 that float8 e4m3 can hold.
        v_scale: the same for ``v``.

    Raises:
        ValueError: wrong rank, shape, device or strides; a scale without a float8 cache; ``positions`` without
            ``token_positions`` or the reverse; with ``KVOPS_DEBUG=1`` also table entries and lengths out of range.
        TypeError: wrong dtype.
    """
    _append(
        k,
        v,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        q_lens=q_lens,
        positions=positions,
        token_positions=token_positions,
        scores=scores,
        k_scale=_scale_tensor("k_scale", k_scale, "k", k),
        v_scale=_scale_tensor("v_scale", v_scale, "k", k),
    )


def paged_attention(
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
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    scores: Tensor | None = None,
    score_reduce: Literal["sum", "sumsq", "max"] = "sum",
    score_decay: float = 1.0,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a paged cache in which every head has its own list and length.

    T = 1 is decoding, T > 1 draft verification or a chunk of prefill. Lengths include the T tokens, which were appended
    first. Token ``t < n = q_lens[b]`` (default T) stands in slot ``seq_lens - n + t`` of each list and sees the slots
    up to its own; rows from ``n`` on give out 0 and lse -inf, as does every row that sees nothing. Slots are counted in
    list order, so after eviction they lie closer together than the original positions. One read of K and V
    serves all T tokens and all query heads of a group.

    Args:
        q: ``[B, T, Hq, D]`` float16, bfloat16 or float32; query head h reads KV head ``h // (Hq // Hkv)``.
        k_cache: ``[num_blocks, block_size, D]`` with one head's slots to a block, or
            ``[num_blocks, block_size, Hkv, D]`` with any strides; the dtype of ``q``, or float8_e4m3fn.
        v_cache: the same with ``Dv``.
        block_tables: int32 ``[B, Hkv, max_blocks]`` (``[B, max_blocks]`` for a 4-D cache). Entries past a length are
            never read.
        seq_lens: int32 ``[B, Hkv]`` (``[B]``).
        q_lens: int32 ``[B]``, how many of the T tokens are real; they come first.
        causal: False lets every token see the whole list.
        window_left: how many slots before its own a token sees, -1 for no limit. With ``positions`` and
            ``query_positions`` it is measured in original positions: a slot is seen if
            ``query_position - position <= window_left``.
        positions: int32 ``[num_blocks, block_size]``, the original position of the token in a slot; a 4-D cache may
            also have ``[num_blocks, block_size, Hkv]``.
        query_positions: int32 ``[B, T]``; along with ``positions``. ``query_position - window_left`` must stay within
            int32.
        scale: of the scores, default ``D ** -0.5``.
        softcap: c > 0 replaces a scaled score s by ``c * tanh(s / c)``.
        sinks: ``[Hq]``, a logit that joins the softmax's denominator only, and lse with it.
        tree_mask: bool ``[B, T, T]`` or ``[T, T]``; row t, column j tells whether token t sees token j. It replaces
            ``causal`` among the new tokens; every token sees all older slots.
        k_scale: of a float8 cache, a float or float32 ``[Hkv]``: the keys are ``k_scale * k_cache``.
        v_scale: the same for the values.
        scores: updated; float32 ``[num_blocks, block_size]`` (``[num_blocks, block_size, Hkv]`` for a 4-D cache).
            A slot of these lists that at least one query sees becomes ``score_decay * score + reduce``; every
            other slot, whether behind a window, past a length or of another sequence, keeps its score and does not
            decay. Lists must not share blocks then.
        score_reduce: over the T tokens and the group's query heads, of the exact normalised probability p:
            ``"sum"``, ``"sumsq"`` (of p squared) or ``"max"``.
        score_decay: at least 0, finite.
        schedule: :func:`paged_schedule` of these ``seq_lens`` (one layer of it). None computes it on the way.
        batch_invariant: the bits of a sequence's results then follow from its own queries, list and options alone,
            for the same T and the same device: not from the other sequences and heads, nor from where blocks lie, how
            wide the tables are or how many programs share the work. The ``schedule`` must be batch invariant too.
            On a GPU each 256 slots of a list have a partial result of their own, in a buffer as long as the tables
            allow; where T x group is more than a tile of rows (64, in float32 32), each tile walks its list alone.

    Returns:
        out ``[B, T, Hq, Dv]`` in the dtype of ``q``, lse float32 ``[B, Hq, T]``, natural logarithm.

    Raises:
        ValueError: wrong rank, shape, device, strides, head ratio or value; a scale without a float8 cache;
            ``positions`` without ``query_positions`` or the reverse; with ``KVOPS_DEBUG=1`` also table entries
            and lengths out of range.
        TypeError: wrong dtype.
        RuntimeError: an input requires a gradient.

    Scores: H2O (Zhang et al., 2023) sums p, KV-Compress (Rehg, 2024) p squared.
    """
    return _attention(  # type: ignore[no-any-return]
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        q_lens=q_lens,
        causal=causal,
        window_left=window_left,
        positions=positions,
        query_positions=query_positions,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        tree_mask=tree_mask,
        k_scale=_scale_tensor("k_scale", k_scale, "q", q),
        v_scale=_scale_tensor("v_scale", v_scale, "q", q),
        scores=scores,
        score_reduce=score_reduce,
        score_decay=score_decay,
        schedule=schedule,
        batch_invariant=batch_invariant,
    )


def paged_schedule(
    seq_lens: Tensor, block_size: int, *, num_programs: int = 0, batch_invariant: bool = False
) -> Tensor:
    """Cut the total work of ragged lists into equal contiguous shares, one for each program of :func:`paged_attention`.

    All lists are laid in one line (a prefix sum over their lengths, in units of about a block) and the line is cut
    without regard to where lists begin: no program waits for the longest head. Good for every call with these lengths;
    one launch serves all layers of a step.

    Args:
        seq_lens: int32 ``[B, Hkv]``, ``[B]`` for a 4-D cache, or ``[L, B, Hkv]`` for all layers at once.
        block_size: of the cache.
        num_programs: how many shares; 0 chooses by the device.
        batch_invariant: cut lists at every 256th slot of their own, for ``paged_attention(batch_invariant=True)``.

    Returns:
        int32 ``[2 + lists + num_programs]``, with a leading ``L`` for three-dimensional lengths; its content is for
        :func:`paged_attention` alone.

    Raises:
        ValueError: wrong shape or value; with ``KVOPS_DEBUG=1`` also negative lengths.
        TypeError: wrong dtype.
    """
    checks.expect_tensor("seq_lens", seq_lens)  # without a tensor the dispatcher knows no device to ask
    return _schedule(  # type: ignore[no-any-return]
        seq_lens, block_size, num_programs=num_programs, batch_invariant=batch_invariant
    )
