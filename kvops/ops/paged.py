"""The ragged paged cache: schemas, fakes and the public functions of append, attention and schedule."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import paged as eager
from kvops.ops.paged_checks import (
    check_append,
    check_attention,
    check_packed_data,
    check_packed_queries,
    check_schedule,
    scale_tensor,
)
from kvops.ops.registry import LIBRARY, caller, register
from kvops.private_torch import schema_of

# Programs per multiprocessor: they fit at once with any number of registers, so that all shares run together.
_PROGRAMS_PER_SM = 2


def _check_append_data(
    k: Tensor, *args: Tensor, cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None, **given: object
) -> None:
    check_packed_data("k", k, cu_seqlens_q, max_seqlen_q)


def _fake_append(*args: object, **kwargs: object) -> None:
    return None


_append = register(
    "paged_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor block_tables, Tensor seq_lens, *, "
    "Tensor? q_lens=None, Tensor(c!)? positions=None, Tensor? token_positions=None, Tensor(d!)? scores=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None, "
    "Tensor(e!)? k_slot_scale=None, Tensor(f!)? v_slot_scale=None) -> ()",
    check=check_append,
    check_data=_check_append_data,
    data="cu_seqlens_q",
    fake=_fake_append,
    eager=eager.paged_append,
    kernel="kvops.kernels.paged_append:paged_append",
    cpu="kvops.kernels.cpu.paged_append:paged_append",
    autocast=("k", "v"),
    autocast_like=("k_cache", "v_cache"),
)


def _fake_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: object, out: Tensor | None = None, **kwargs: object
) -> tuple[Tensor, Tensor]:
    *batch, T, Hq, _ = q.shape
    result = q.new_empty(*batch, T, Hq, v_cache.shape[-1]) if out is None else q.new_empty(0)
    return result, q.new_empty(*batch, Hq, T, dtype=torch.float32)


_attention = register(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, *, "
    "Tensor? q_lens=None, bool causal=True, int window_left=-1, Tensor? positions=None, Tensor? query_positions=None, "
    "float? scale=None, float softcap=0.0, Tensor? sinks=None, Tensor? tree_mask=None, Tensor? k_scale=None, "
    'Tensor? v_scale=None, Tensor(a!)? scores=None, str score_reduce="sum", float score_decay=1.0, '
    "Tensor? schedule=None, bool batch_invariant=False, Tensor? cu_seqlens_q=None, SymInt? max_seqlen_q=None, "
    "Tensor(b!)? out=None, Tensor? alibi_slopes=None, int score_last=-1, "
    "Tensor? score_decays=None, Tensor? k_slot_scale=None, Tensor? v_slot_scale=None, "
    "Tensor? bias=None) -> (Tensor out, Tensor lse)",
    check=check_attention,
    check_data=check_packed_queries,
    data="cu_seqlens_q",
    fake=_fake_attention,
    eager=eager.paged_attention,
    kernel="kvops.kernels.paged_attention:paged_attention",
    cpu="kvops.kernels.cpu.paged_attention:paged_attention",
    autocast=("q",),
    autocast_like=("k_cache", "v_cache"),
)


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
    check=check_schedule,
    fake=_fake_schedule,
    eager=eager.paged_schedule,
    kernel="kvops.kernels.paged_schedule:paged_schedule",
    cpu="kvops.kernels.cpu.paged_schedule:paged_schedule",
)


def _append_with_numbers(k: Tensor, *args: Tensor, **kwargs: object) -> None:
    for name in ("k_scale", "v_scale"):
        kwargs[name] = scale_tensor(name, kwargs.get(name), "k", k)
    _append(k, *args, **kwargs)


def _attention_with_numbers(q: Tensor, *args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    for name in ("k_scale", "v_scale"):
        kwargs[name] = scale_tensor(name, kwargs.get(name), "q", q)
    return _attention(q, *args, **kwargs)  # type: ignore[no-any-return]


def _define_with_numbers(overload: object, function: object) -> None:
    """Overloads that take one or both of the scales of a float8 or int8 cache as plain numbers.

    The mixed overloads come first: torch would convert a tensor of one element to a number, which reads it back.
    """
    schema = str(schema_of(overload)).removeprefix("kvops::")
    name, signature = schema.split("(", 1)
    for kind, scales in (
        ("k_scale_number", ("k_scale",)),
        ("v_scale_number", ("v_scale",)),
        ("scale_number", ("k_scale", "v_scale")),
    ):
        arguments = signature
        for scale in scales:
            arguments = arguments.replace(f"Tensor? {scale}=None", f"float? {scale}=None")
        LIBRARY.define(f"{name}.{kind}({arguments}")
        LIBRARY.impl(f"{name}.{kind}", function, "CompositeImplicitAutograd")


_define_with_numbers(_append, _append_with_numbers)
_define_with_numbers(_attention, _attention_with_numbers)
_call_append, _call_attention, _call_schedule = map(caller, (_append, _attention, _schedule))


# Over 80 lines: a signature, its documentation and one call.
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
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
) -> None:
    """Write new keys and values into the last slots of each head's list.

    Lengths include the new tokens: token ``t`` of ``q_lens[b]`` (default T) goes to slot ``seq_lens - q_lens[b] + t``
    of the list. Tokens from ``q_lens[b]`` on are padding and are not written. A list that is shorter than ``q_lens[b]``
    keeps the last tokens that fit.

    With ``cu_seqlens_q`` the tokens of all sequences are packed, without padding: those of sequence ``b`` are
    ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``. Tokens of no sequence are not written.

    Under ``torch.compile(dynamic=True)`` a cache that is written must not be a view that begins inside a pool, such as
    ``pool[layer]``: inductor (PyTorch 2.13, pytorch issue 198068) loses the offset of the view, for any operator. Use a
    tensor for each layer, or one pool whose tables number the blocks of all layers.

    Args:
        k: ``[B, T, Hkv, D]``, or packed ``[tokens, Hkv, D]``; float16, bfloat16 or float32.
        v: ``[B, T, Hkv, Dv]`` or ``[tokens, Hkv, Dv]``, the same dtype.
        k_cache: written; ``[num_blocks, block_size, D]`` with one head's slots to a block, or
            ``[num_blocks, block_size, Hkv, D]`` with any strides; the dtype of ``k``, or float8_e4m3fn, float8_e5m2 or
            int8.
        v_cache: written; the same with ``Dv``. Its dtype may be another of these than that of ``k_cache``.
        block_tables: int32 ``[B, Hkv, max_blocks]`` (``[B, max_blocks]`` for a 4-D cache). Entries past a length are
            never read.
        seq_lens: int32 ``[B, Hkv]`` (``[B]``), with these tokens counted in.
        q_lens: int32 ``[B]``, how many of the T tokens are real; not with ``cu_seqlens_q``.
        positions: written with ``token_positions``; int32 ``[num_blocks, block_size]``; a 4-D cache may also have
            ``[num_blocks, block_size, Hkv]``.
        token_positions: int32 ``[B, T]`` or ``[tokens]``, the tokens' original positions; along with ``positions``.
        scores: zeroed in the new slots; float32 ``[num_blocks, block_size]`` (``[num_blocks, block_size, Hkv]``).
        k_scale: of a float8 or int8 ``k_cache``, a float or float32 ``[Hkv]``: ``k / k_scale`` is stored, rounded to
            nearest even and clamped to what the dtype holds: 448 (e4m3), 57,344 (e5m2) or 127 (int8) on both sides of
            0. NaN stays NaN in float8 and is stored as 0 in int8.
        v_scale: the same for ``v`` and ``v_cache``.
        cu_seqlens_q: int32 ``[B + 1]``, where the packed tokens of each sequence begin, and where the last ones end.
        max_seqlen_q: along with ``cu_seqlens_q``: the most new tokens of a sequence, or more.
        k_slot_scale: in place of ``k_scale``, a scale for each token and head, written: float32
            ``[num_blocks, block_size]`` (``[num_blocks, block_size, Hkv]`` for a 4-D cache). The scale of a row is its
            largest finite magnitude divided by the largest number that the dtype holds, and at least the smallest
            normal float32. Infinities are clamped to that magnitude. An int8 cache is then off by half a scale at most.
        v_slot_scale: the same for ``v`` and ``v_cache``.

    Raises:
        ValueError: wrong rank, shape, device or strides; a scale of a cache that is neither float8 nor int8, or two for
            one side; one of two arguments that belong together; on the CPU, and elsewhere with ``KVOPS_DEBUG=1``,
            invalid ``cu_seqlens_q``, and table entries and lengths out of range.
        TypeError: wrong dtype.
    """
    _call_append(
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
        k_scale=scale_tensor("k_scale", k_scale, "k", k),
        v_scale=scale_tensor("v_scale", v_scale, "k", k),
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        k_slot_scale=k_slot_scale,
        v_slot_scale=v_slot_scale,
    )


# Over 80 lines: a signature, its documentation and one call.
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
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    out: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    score_last: int = -1,
    score_decays: Tensor | None = None,
    k_slot_scale: Tensor | None = None,
    v_slot_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a paged cache in which every head has its own list and length.

    T = 1 is decoding, T > 1 draft verification or a chunk of prefill. Lengths include the T tokens, which were appended
    first. Token ``t < n = q_lens[b]`` (default T) is in slot ``seq_lens - n + t`` of each list and sees the slots up to
    its own. Rows from ``n`` on, and rows that see nothing, have out 0 and lse -inf; a score that is NaN makes its row
    NaN. Slots are counted in list order, so after eviction they are closer together than the original positions. One
    read of K and V serves all T tokens and all query heads of a group.

    With ``cu_seqlens_q`` the tokens of all sequences are packed, without padding: those of sequence ``b`` are
    ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]``, and T is ``max_seqlen_q``. Sequences that decode and sequences that
    are prefilled run in one call. Nothing is read back to the host, and no temporary is padded to
    ``[B, max_seqlen_q]``. On a GPU the longest sequence chooses the tile of query rows. If its rows fill several tiles
    and the batch fills the GPU, no list is divided among programs: where single tokens attend to very long lists beside
    a chunk of prefill, two calls are faster, with two parts of ``cu_seqlens_q`` and one ``out``.

    Args:
        q: ``[B, T, Hq, D]``, or packed ``[tokens, Hq, D]``; float16, bfloat16 or float32. Query head h reads KV head
            ``h // (Hq // Hkv)``.
        k_cache: ``[num_blocks, block_size, D]`` with one head's slots to a block, or
            ``[num_blocks, block_size, Hkv, D]`` with any strides; the dtype of ``q``, or float8_e4m3fn, float8_e5m2 or
            int8.
        v_cache: the same with ``Dv``. Its dtype may be another of these than that of ``k_cache``.
        block_tables: int32 ``[B, Hkv, max_blocks]`` (``[B, max_blocks]`` for a 4-D cache). Entries past a length are
            never read.
        seq_lens: int32 ``[B, Hkv]`` (``[B]``).
        q_lens: int32 ``[B]``, how many of the T tokens are real; they come first. Not with ``cu_seqlens_q``.
        causal: False lets every token see the whole list.
        window_left: the number of slots before its own that a token sees, -1 for no limit. With ``positions`` and
            ``query_positions`` it is measured in original positions: a slot is seen if
            ``query_position - position <= window_left``.
        positions: int32 ``[num_blocks, block_size]``, the original position of the token in a slot; a 4-D cache may
            also have ``[num_blocks, block_size, Hkv]``.
        query_positions: int32 ``[B, T]`` or ``[tokens]``; along with ``positions``. ``query_position - window_left``
            must stay within int32.
        scale: of the scores, default ``D ** -0.5``.
        softcap: c > 0 replaces a scaled score s by ``c * tanh(s / c)``.
        sinks: ``[Hq]``, a logit that joins the softmax's denominator only, and lse with it.
        tree_mask: bool ``[B, T, T]`` or ``[T, T]``; row t, column j tells whether token t sees token j. It replaces
            ``causal`` among the new tokens; every token sees all older slots. With ``cu_seqlens_q`` T is
            ``max_seqlen_q``; of a shorter sequence the first rows and columns count.
        k_scale: of a float8 or int8 ``k_cache``, a float or float32 ``[Hkv]``: the keys are ``k_scale * k_cache``.
        v_scale: the same for the values and ``v_cache``.
        scores: updated; float32 ``[num_blocks, block_size]`` (``[num_blocks, block_size, Hkv]`` for a 4-D cache).
            The score of a slot that at least one query sees becomes ``score_decay * score + reduce``. All other slots
            (outside a window, past a length, of another sequence) keep their scores, without decay. With scores, lists
            must not share blocks.
        score_reduce: over the T tokens and the group's query heads, of the exact normalised probability p:
            ``"sum"``, ``"sumsq"`` (of p squared) or ``"max"``. Where p is NaN, so is the score, or +inf with
            ``"max"`` on a GPU.
        score_decay: at least 0, finite.
        schedule: :func:`paged_schedule` of these ``seq_lens`` (one layer of it). None computes it in this call.
        batch_invariant: a sequence's results then have the same bits in any batch, for the same T and the same device.
            They do not depend on other sequences and heads, the places of blocks, the width of the tables, or the
            number of programs. The ``schedule`` must be batch invariant too. On a GPU each 256 slots of a list have a
            separate partial result, in a buffer that is as long as the tables allow. If T x group is more than a tile
            of rows (64; 32 in float32 and for D above 128), each tile reads its list separately.
        cu_seqlens_q: int32 ``[B + 1]``, where the packed tokens of each sequence begin, and where the last ones end.
        max_seqlen_q: along with ``cu_seqlens_q``: the most tokens of a sequence, or more.
        out: written and returned; the shape and dtype of the result, its last dimension contiguous (under
            ``torch.compile`` all of it). The operator ``torch.ops.kvops.paged_attention`` then returns ``[0]`` in its
            place.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``; the bias is ``-slope * |distance|`` between the slots of a token and a
            key, or between their original positions where ``positions`` and ``query_positions`` are given.
        score_last: so many of the last tokens of each sequence count in ``scores``, for the slots that they see; -1 for
            all tokens.
        score_decays: float32 ``[B]``, in place of ``score_decay`` one for each sequence.
        k_slot_scale: in place of ``k_scale``, the scale of each slot of a float8 or int8 ``k_cache``, as
            :func:`paged_append` writes it: float32 ``[num_blocks, block_size]`` (``[num_blocks, block_size, Hkv]`` for
            a 4-D cache). Not read past a length.
        v_slot_scale: the same for the values and ``v_cache``.
        bias: a bool mask (True: may attend) or a float tensor that is added to the scores behind ALiBi, of any shape
            that broadcasts to ``[B, Hq, T, S]`` or, packed, ``[Hq, tokens, S]``; float16, bfloat16 or float32, any
            strides. Column j belongs to slot j of the list that the row reads. S is 1, for the same bias in all slots,
            or at least the longest list; slots from S on are hidden. It applies beside ``causal``, windows and
            ``tree_mask``: ``causal=False`` leaves it all to the mask. -inf hides a slot like False, and so does what
            times log2(e) is below the range of float32, such as its lowest number.

    Returns:
        out ``[B, T, Hq, Dv]`` or ``[tokens, Hq, Dv]`` in the dtype of ``q``, lse float32 ``[B, Hq, T]`` or
        ``[Hq, tokens]``, natural logarithm. Packed tokens of no sequence, such as padding at the end, have out 0 and
        lse -inf; a given ``out`` keeps what it has there.

    Raises:
        ValueError: wrong rank, shape, device, strides, head ratio or value; a scale of a cache that is neither float8
            nor int8, or two for one side; one of two arguments that belong together; on the CPU, and elsewhere with
            ``KVOPS_DEBUG=1``, invalid ``cu_seqlens_q``, and table entries and lengths out of range; with
            ``KVOPS_DEBUG=1`` also lists that are longer than S.
        TypeError: wrong dtype.
        RuntimeError: an input requires a gradient.

    Temporary memory of a call on a GPU, in bytes: with ``R = T * Hq / Hkv`` rows to a list and ``N`` lists, the partial
    results of ``P`` programs take ``4 * (P + N) * R * (Dv + 2)``; batch invariant, ``P + N`` is ``N * ceil(max_blocks *
    block_size / 256)``, and above 256 MiB (``kvops.kernels.paged_parts.MAX_PARTIAL``) the sequences are served in parts
    of the batch, at least one at a time, without the ``schedule`` of the whole. ``scores`` of a tile of rows keep
    ``4 * R`` for each slot of the tables or of the pool, whichever is less. Above 256 MiB
    (``kvops.kernels.paged_plan.MAX_STASH``) they keep nothing and are computed twice.

    Scores: H2O (Zhang et al., 2023) sums p, KV-Compress (Rehg, 2024) p squared.
    """
    result, lse = _call_attention(
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
        k_scale=scale_tensor("k_scale", k_scale, "q", q),
        v_scale=scale_tensor("v_scale", v_scale, "q", q),
        scores=scores,
        score_reduce=score_reduce,
        score_decay=score_decay,
        schedule=schedule,
        batch_invariant=batch_invariant,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        out=out,
        alibi_slopes=alibi_slopes,
        score_last=score_last,
        score_decays=score_decays,
        k_slot_scale=k_slot_scale,
        v_slot_scale=v_slot_scale,
        bias=bias,
    )
    return (result if out is None else out), lse


def paged_schedule(
    seq_lens: Tensor, block_size: int, *, num_programs: int = 0, batch_invariant: bool = False
) -> Tensor:
    """Cut the total work of ragged lists into equal contiguous shares, one for each program of :func:`paged_attention`.

    All lists are laid end to end (by a prefix sum over their lengths, in units of about a block) and cut into equal
    shares, which may begin inside a list. No program waits for the longest head. The schedule is valid for every call
    with these lengths; one launch serves all layers of a step.

    Args:
        seq_lens: int32 ``[B, Hkv]``, ``[B]`` for a 4-D cache, or ``[L, B, Hkv]`` for all layers at once.
        block_size: of the cache.
        num_programs: the number of shares; 0 chooses by the device.
        batch_invariant: cut lists at every 256th slot of their own, for ``paged_attention(batch_invariant=True)``.

    Returns:
        int32 ``[2 + lists + num_programs]``, with a leading ``L`` for three-dimensional lengths; its content is for
        :func:`paged_attention` alone.

    Raises:
        ValueError: wrong shape or value; with ``KVOPS_DEBUG=1`` also negative lengths.
        TypeError: wrong dtype.
    """
    checks.expect_tensor("seq_lens", seq_lens)  # without a tensor the dispatcher does not know the device
    return _call_schedule(  # type: ignore[no-any-return]
        seq_lens, block_size, num_programs=num_programs, batch_invariant=batch_invariant
    )
