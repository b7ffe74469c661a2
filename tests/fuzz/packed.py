"""``flash_attention_varlen``, its gradient and its scores against each sequence on its own in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from oracle import attention
from rounding import rounded
from torch import Tensor

import kvops
from fuzz.inputs import (
    COUNT,
    DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    TENSOR,
    backend,
    draw_mutation,
    expect_refusal,
    laid_out,
    often,
    raised,
    without_equals,
)
from fuzz.scoring import (
    Scoring,
    bias_of,
    compare,
    draw_bias,
    draw_scoring,
    expected_gradients,
    finite,
    learned,
    make_bias,
    one_sequence,
)

_LENGTHS = ("dtype", "rank", "flat", "last", "meta", "string", "none")
MUTATIONS = {
    "q": (*TENSOR, "strided"),
    "k": (*TENSOR, "strided"),
    "v": ("dtype", "integer", "rank", "flat", "meta", "string", "none", "strided"),
    "cu_seqlens_q": _LENGTHS,
    "cu_seqlens_k": _LENGTHS,
    "max_seqlen_q": COUNT,
    "max_seqlen_k": COUNT,
    "window_left": COUNT,
    "softcap": ("nan", "inf", "negative", "string", "none"),
    "bias": ("integer", "last", "meta", "string"),
    "dropout_p": ("negative", "fraction", "nan", "inf", "string", "none"),
    "dropout_seed": ("integer", "rank", "last", "meta", "string"),
}


@dataclass(frozen=True)
class Case(Scoring):
    seed: int = 0
    backend: str = "eager"
    dtype: str = "float32"
    lengths: tuple[tuple[int, int], ...] = ()  # queries and keys of each sequence
    tail: tuple[int, int] = (0, 0)  # queries and keys behind the last sequence
    more: int = 0  # that max_seqlen is too large by
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 1
    value_dim: int = 1
    layouts: tuple[str, ...] = ()
    gradient: str = ""
    bias: str = ""  # "float" or "bool", and for heads, queries and keys "1" or "n": "float 1nn"
    scores: bool = False
    query_start: int = 0
    bad: str = ""
    nonsense: str = ""  # lengths that make no sense: refused, or at least no crash


def draw(r: Random) -> Case:
    on_triton = r.random() < 0.12
    longest = r.choice((2, 9, 40)) if on_triton else r.choice((2, 9, 40, 150))
    head_dim = r.choice(HEAD_DIMS[:10] if on_triton else HEAD_DIMS)
    case = Case(
        seed=r.randrange(2**31),
        backend="triton" if on_triton else r.choice(("eager", "numba")),
        dtype=r.choice(tuple(DTYPES)),
        lengths=tuple(
            (r.choice((r.randint(0, longest), 1, 0)), r.choice((r.randint(0, longest), longest, 0)))
            for _ in range(r.randint(0, 4))
        ),
        tail=often(r, (0, 0), (r.randint(0, 5), r.randint(0, 5)), p=0.7),
        more=often(r, 0, 1, 100, p=0.7),
        kv_heads=r.choice((1, 1, 2, 3)),
        group=often(r, 1, 2, 3, 5, 9),
        head_dim=head_dim,
        value_dim=often(r, head_dim, *HEAD_DIMS[: 10 if on_triton else None]),
        layouts=() if r.random() < 0.4 else tuple(r.choice(LAYOUTS[:-1]) for _ in range(3)),
        gradient=often(r, "", "out", "both", p=0.5),
        bias=draw_bias(r, 3),
        scores=r.random() < 0.3,
        query_start=often(r, 0, r.randint(-longest, longest)),
        bad=draw_mutation(r, MUTATIONS) if r.random() < 0.12 else "",
        nonsense=often(r, "", "descends", "beyond", "starts late", "negative", "short", p=0.94),
        **draw_scoring(r, longest, on_triton),
    )
    return without_equals(case)


def check(case: Case) -> None:
    torch.manual_seed(case.seed)
    with backend(case.backend):
        _check(case)


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _check(case: Case) -> None:
    g = torch.Generator().manual_seed(case.seed)
    dtype, heads = DTYPES[case.dtype], case.kv_heads * case.group
    batch = len(case.lengths)
    cu_q, cu_k = (_ends([pair[side] for pair in case.lengths]) for side in (0, 1))
    tokens = int(cu_q[-1]) + case.tail[0], int(cu_k[-1]) + case.tail[1]
    shapes = (
        (tokens[0], heads, case.head_dim),
        (tokens[1], case.kv_heads, case.head_dim),
        (tokens[1], case.kv_heads, case.value_dim),
    )
    q, k, v = (
        laid_out(torch.randn(shape, generator=g).to(dtype), layout)
        for shape, layout in zip(shapes, case.layouts or ("", "", ""), strict=False)
    )
    longest = [max([0, *(pair[side] for pair in case.lengths)]) + case.more for side in (0, 1)]
    options = case.tensors(heads, batch, g) | make_bias(case.bias, (heads, tokens[0], longest[1]), g)
    drops = case.drops(case.seed)
    packing = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, **packing, **case.window(), **options}
    if case.bad:
        extra = {"bias": torch.zeros(tokens[0], longest[1])} if not case.bias else {}
        extra |= drops or {"dropout_p": 0.5, "dropout_seed": torch.tensor([case.seed])}
        if case.bad != "bias:last" or (arguments | extra)["bias"].shape[-1] + 1 not in (1, longest[1]):
            expect_refusal(kvops.flash_attention_varlen, arguments | extra, case.bad)
        return
    if case.nonsense:
        arguments.pop("bias", None)  # whose shape follows from a length
        _check_nonsense(case, arguments)
        return
    if case.tail[1] and not case.layouts:
        for side in (k, v):
            side[int(cu_k[-1]) :] = float("nan")
    for tensor in (q, k, v, *learned(options)):
        tensor.requires_grad_(bool(case.gradient))
    out, lse = kvops.flash_attention_varlen(**arguments, **drops)
    options |= case.weights(case.seed, batch, heads, *longest)
    exact = _each(case, q, k, v, options)
    low = rounded(dtype, _each, case, q, k, v, finite(options))
    compare((out, lse), exact[:2], low[:2], ("out", "lse"))
    if case.gradient:
        _check_gradient(case, (q, k, v), options, out, lse, g)
    if case.scores and not case.bias:
        scoring = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()}
        scoring = {name: x for name, x in scoring.items() if name not in ("sinks", "weights")}
        actual = kvops.attention_scores_varlen(
            q.detach(), k.detach(), lse.detach(), **packing, **case.window(), **scoring, query_start=case.query_start
        )
        compare((actual,), exact[2:], low[2:], ("scores",))


def _spans(case: Case) -> list[tuple[slice, slice]]:
    spans, q_end, k_end = [], 0, 0
    for queries, keys in case.lengths:
        spans.append((slice(q_end, q_end + queries), slice(k_end, k_end + keys)))
        q_end, k_end = q_end + queries, k_end + keys
    return spans


def _each(case: Case, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and the sums of scores, sequence by sequence."""
    heads, wide = case.kv_heads * case.group, torch.float64
    out = torch.zeros(len(q), heads, case.value_dim, dtype=wide)
    lse = torch.full((heads, len(q)), -torch.inf, dtype=wide)
    scores = torch.zeros(case.kv_heads, len(k), dtype=wide)
    plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()}
    for b, (queries, keys) in enumerate(_spans(case)):
        mask = case.mask(*case.lengths[b])
        parts = (x.detach()[None, span] for x, span in ((q, queries), (k, keys), (v, keys)))
        o, s, p = attention(*parts, mask=mask, **one_sequence(plain, b, queries, keys))
        out[queries], lse[:, queries] = o[0], s[0]
        count = case.lengths[b][0]
        start = case.query_start if case.query_start >= 0 else max(count + case.query_start, 0)
        scores[:, keys] = p[0, :, start:].sum(1).unflatten(0, (case.kv_heads, case.group)).sum(1)
    return out, lse, scores


def _check_gradient(
    case: Case, inputs: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], out: Tensor, lse: Tensor, g
) -> None:
    dout, dlse = torch.randn(out.shape, generator=g).to(out.dtype), torch.randn(lse.shape, generator=g)
    others = learned(options)
    if case.gradient == "both":
        actual = torch.autograd.grad([out, lse], [*inputs, *others], [dout, dlse])
    else:
        actual = torch.autograd.grad(out, [*inputs, *others], dout)
    plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()}

    q, k, v = (x.detach() for x in inputs)

    def expected(options: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        total = [torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v)]
        of_others = [torch.zeros(x.shape, dtype=torch.float64) for x in others]
        for b, (queries, keys) in enumerate(_spans(case)):
            parts = (x[None, span] for x, span in ((q, queries), (k, keys), (v, keys), (dout, queries)))
            of_lse = dlse[None, :, queries] if case.gradient == "both" else None
            mask = case.mask(*case.lengths[b])
            found = expected_gradients(*parts, of_lse, mask, one_sequence(options, b, queries, keys), dtype)
            for x, span, part in zip(total, (queries, keys, keys), found, strict=False):
                x[span] = part[0]
            for x, part in zip(of_others, found[3:], strict=True):
                own = x if x.dim() == 1 else bias_of(x, queries, keys)
                own += part
        return *total, *of_others

    low = rounded(out.dtype, expected, finite(plain), out.dtype)
    names = [f"d{name}" for name in ("sinks", "bias") if name in options]
    compare(actual, expected(plain), low, ("dq", "dk", "dv", *names[: len(others)]))


def _check_nonsense(case: Case, arguments: dict[str, Any]) -> None:
    """On the CPU looking costs nothing: lengths that make no sense are refused by name."""
    if not case.lengths:
        return
    for side, tokens in (("q", len(arguments["q"])), ("k", len(arguments["k"]))):
        cu = arguments[f"cu_seqlens_{side}"].clone()
        longest = arguments[f"max_seqlen_{side}"]
        if case.nonsense == "descends":
            cu[-1] = -1 if len(cu) == 2 else cu[-2] - 1
        elif case.nonsense == "beyond":
            cu[-1] = tokens + 1
            longest = tokens + 1
        elif case.nonsense == "starts late":
            cu[0] = 1
        elif case.nonsense == "negative":
            cu[0] = -1
        elif case.nonsense == "short":
            longest = int(cu.diff().max()) - 1
            if longest < 0:
                continue
        wrong = {**arguments, f"cu_seqlens_{side}": cu, f"max_seqlen_{side}": longest}
        error = raised(lambda wrong=wrong: kvops.flash_attention_varlen(**wrong))
        assert isinstance(error, ValueError), f"{case.nonsense} on the side of {side}: {error or 'accepted'}"
        assert str(error).startswith((f"cu_seqlens_{side}", f"max_seqlen_{side}")), str(error)
