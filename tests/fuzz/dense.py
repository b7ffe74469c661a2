"""``flash_attention``, its gradient and ``attention_scores`` against the whole matrix in float64."""

from __future__ import annotations

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
    close,
    draw_mutation,
    expect_refusal,
    laid_out,
    often,
    without_equals,
)
from fuzz.scoring import (
    Scoring,
    compare,
    draw_bias,
    draw_scoring,
    expected_gradients,
    finite,
    learned,
    make_bias,
)

MUTATIONS = {
    "q": (*TENSOR, "strided"),
    "k": (*TENSOR, "strided"),
    "v": ("dtype", "integer", "rank", "flat", "meta", "string", "none", "strided"),
    "causal": ("string",),
    "window_left": COUNT,
    "window_right": COUNT,
    "scale": ("nan", "inf", "string"),
    "softcap": ("nan", "inf", "negative", "string", "none"),
    "sinks": ("integer", "dtype", "rank", "last", "meta", "string"),
    "alibi_slopes": ("integer", "dtype", "flat", "last", "meta", "string"),
    "bias": ("integer", "last", "meta", "string"),
    "dropout_p": ("negative", "fraction", "nan", "inf", "string", "none"),
    "dropout_seed": ("integer", "rank", "last", "meta", "string"),
}


@dataclass(frozen=True)
class Case(Scoring):
    seed: int = 0
    backend: str = "eager"
    dtype: str = "float32"
    batch: int = 1
    queries: int = 1
    keys: int = 1
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 1
    value_dim: int = 1
    layouts: tuple[str, ...] = ()  # of q, k and v
    magnitude: float = 1.0
    poison: str = ""  # "nan" or "inf" in a key that some query does not see
    gradient: str = ""  # through "out", "lse" or "both"
    bias: str = ""  # "float" or "bool", and for batch, heads, queries and keys "1" or "n": "float 1nn1"
    scores: str = ""  # reduce and group of attention_scores
    query_start: int = 0
    skip_recent: int = 0
    bad: str = ""


def draw(r: Random) -> Case:
    on_triton = r.random() < 0.12
    longest = r.choice((2, 9, 40, 70)) if on_triton else r.choice((2, 9, 40, 150, 150, 400))
    head_dim = r.choice(HEAD_DIMS[:10] if on_triton else HEAD_DIMS)
    keys = r.choice((r.randint(0, longest), longest))
    queries = r.choice((r.randint(0, longest), r.randint(0, 3), keys))
    reduce, group = r.choice(("sum", "sumsq", "max")), r.choice(("sum", "mean", "max"))
    case = Case(
        seed=r.randrange(2**31),
        backend="triton" if on_triton else r.choice(("eager", "numba")),
        dtype=r.choice(tuple(DTYPES)),
        batch=often(r, 1, 0, 2, 3),
        queries=queries,
        keys=keys,
        kv_heads=r.choice((1, 1, 2, 3)),
        group=often(r, 1, 2, 3, 4, 5, 7, 9),
        head_dim=head_dim,
        value_dim=often(r, head_dim, *HEAD_DIMS[: 10 if on_triton else None]),
        layouts=() if r.random() < 0.4 else tuple(r.choice(LAYOUTS) for _ in range(3)),
        magnitude=often(r, 1.0, 0.0, 0.01, 10.0, p=0.8),
        poison=often(r, "", "nan", "inf", p=0.8),
        gradient=often(r, "", "out", "lse", "both", p=0.4),
        bias=draw_bias(r, 4),
        scores=often(r, "", f"{reduce} {group}", p=0.6),
        query_start=often(r, 0, r.randint(-longest, longest)),
        skip_recent=often(r, 0, r.randint(0, longest), 2**31 - 1, p=0.7),
        bad=draw_mutation(r, MUTATIONS) if r.random() < 0.15 else "",
        **draw_scoring(r, longest, on_triton),
    )
    return without_equals(case)


def check(case: Case) -> None:
    torch.manual_seed(case.seed)
    with backend(case.backend):
        _check(case)


def _check(case: Case) -> None:
    g = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    heads = case.kv_heads * case.group
    shapes = (
        (case.batch, case.queries, heads, case.head_dim),
        (case.batch, case.keys, case.kv_heads, case.head_dim),
        (case.batch, case.keys, case.kv_heads, case.value_dim),
    )
    layouts = case.layouts or ("", "", "")
    q, k, v = (
        laid_out((torch.randn(shape, generator=g) * case.magnitude).to(dtype), layout)
        for shape, layout in zip(shapes, layouts, strict=False)
    )
    sizes = case.batch, heads, case.queries, case.keys
    options = case.tensors(heads, case.batch, g) | make_bias(case.bias, sizes, g)
    drops = case.drops(case.seed)
    if case.bad:
        name = case.bad.split(":")[0]
        optional = {"sinks": (heads,), "alibi_slopes": (heads,), "bias": (case.queries, case.keys)}
        extra = {name: torch.zeros(optional[name])} if name in optional and name not in options else {}
        extra |= drops or {"dropout_p": 0.5, "dropout_seed": torch.tensor([case.seed])}
        if case.bad == "bias:last" and (options | extra)["bias"].shape[-1] + 1 in (1, case.keys):
            return  # it broadcasts all the same
        expect_refusal(kvops.flash_attention, {"q": q, "k": k, "v": v, **case.window(), **options, **extra}, case.bad)
        return
    mask, weights = case.mask(case.queries, case.keys), case.weights(case.seed, *sizes)
    exact = attention(q, k, v, mask=mask, **options, **weights)
    low = rounded(dtype, attention, q, k, v, mask=mask, **finite(options), **weights)
    rows = _poison(case, k, mask, g)
    gradient = case.gradient if not case.poison else ""
    for tensor in (q, k, v, *learned(options)):
        tensor.requires_grad_(bool(gradient))
    out, lse = kvops.flash_attention(q, k, v, **case.window(), **options, **drops)
    assert out.shape == (case.batch, case.queries, heads, case.value_dim), out.shape
    close(out[:, rows], exact[0][:, rows], low[0][:, :, rows], "out")
    close(lse[..., rows], exact[1][..., rows], low[1][..., rows], "lse")
    if gradient:
        _check_gradient(gradient, (q, k, v), options, weights, mask, (out, lse), g)
    if case.scores and not case.poison and not case.bias:
        _check_scores(case, q.detach(), k.detach(), v.detach(), lse.detach(), mask, options)


def _poison(case: Case, k: Tensor, mask: Tensor, g: torch.Generator) -> Tensor:
    """Spoil one key; returns the queries, bool [Sq], that do not see it."""
    everyone = torch.ones(case.queries, dtype=torch.bool)
    expanded = any(layout.startswith("expanded") for layout in case.layouts)
    if not case.poison or expanded or k.numel() == 0:
        return everyone
    hidden = (~mask.any(0)).nonzero()[:, 0]
    place = int(hidden[0]) if len(hidden) else int(torch.randint(case.keys, (), generator=g))
    k[:, place] = float(case.poison)
    return everyone & ~mask[:, place]


def _check_gradient(
    gradient: str,
    inputs: tuple[Tensor, Tensor, Tensor],
    options: dict[str, Any],
    weights: dict[str, Tensor],
    mask: Tensor,
    results: tuple[Tensor, Tensor],
    g: torch.Generator,
) -> None:
    out, lse = results
    dout = torch.randn(out.shape, generator=g).to(out.dtype) if gradient != "lse" else None
    dlse = torch.randn(lse.shape, generator=g) if gradient != "out" else None
    with_gradient = [(x, d) for x, d in ((out, dout), (lse, dlse)) if d is not None]
    leaves = (*inputs, *learned(options))
    actual = torch.autograd.grad([x for x, _ in with_gradient], leaves, [d for _, d in with_gradient])
    q, k, v = (x.detach() for x in inputs)
    plain = {name: x.detach() if isinstance(x, Tensor) else x for name, x in options.items()} | weights
    dout = torch.zeros_like(out) if dout is None else dout
    given = q, k, v, dout.detach(), dlse, mask
    exact = expected_gradients(*given, plain)
    low = rounded(out.dtype, expected_gradients, *given, finite(plain), out.dtype)
    names = ["dq", "dk", "dv", *(f"d{name}" for name in ("sinks", "bias") if name in options)]
    compare(actual, exact, low, tuple(names[: len(leaves)]))


def _check_scores(
    case: Case, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mask: Tensor, options: dict[str, Any]
) -> None:
    reduce, group = case.scores.split()
    scoring = {name: value.detach() if isinstance(value, Tensor) else value for name, value in options.items()}
    scoring.pop("sinks", None)
    actual = kvops.attention_scores(
        q,
        k,
        lse,
        **case.window(),
        **scoring,
        query_start=case.query_start,
        skip_recent=case.skip_recent,
        reduce=reduce,
        group=group,
    )
    start = case.query_start if case.query_start >= 0 else max(case.queries + case.query_start, 0)
    query, key = torch.arange(case.queries)[:, None], torch.arange(case.keys)
    counted = mask & (query >= start)
    if case.skip_recent:
        counted &= query + case.keys - case.queries - key >= case.skip_recent

    plain = {name: value.detach() if isinstance(value, Tensor) else value for name, value in options.items()}

    def expected(options: dict[str, Any]) -> Tensor:
        p = torch.where(counted, attention(q, k, v, mask=mask, **options)[2], 0.0)
        if reduce == "max":
            columns = p.amax(2) if p.shape[2] else p.new_zeros(p.shape[0], p.shape[1], p.shape[3])
        else:
            columns = (p * p if reduce == "sumsq" else p).sum(2)
        columns = columns.unflatten(1, (case.kv_heads, case.group))
        return {"sum": columns.sum(2), "mean": columns.mean(2), "max": columns.amax(2)}[group]

    close(actual, expected(plain), rounded(q.dtype, expected, finite(plain)), "scores")
