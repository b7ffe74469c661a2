"""``merge_attention`` of any two parts, and of attentions over parts of the keys, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from oracle import attention
from rounding import rounded
from torch import Tensor

import kvops
from fuzz.inputs import (
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
)

_LSE = ("dtype", "integer", "rank", "flat", "last", "meta", "string", "none")
MUTATIONS = {"out_a": (*TENSOR, "strided"), "out_b": (*TENSOR, "strided"), "lse_a": _LSE, "lse_b": _LSE}


@dataclass(frozen=True)
class Case:
    seed: int = 0
    backend: str = "eager"
    dtype: str = "float32"
    batch: int = 1  # -1: packed
    tokens: int = 1
    heads: int = 1
    head_dim: int = 1
    magnitude: float = 1.0  # of lse
    apart: float = 1.0  # how far lse_b is from lse_a
    empty: str = ""  # "a", "b" or "both" in some rows
    layouts: tuple[str, ...] = ()
    gradient: bool = False
    keys: tuple[int, ...] = ()  # of parts that are attended to and merged
    bad: str = ""


def draw(r: Random) -> Case:
    on_triton = r.random() < 0.2
    return Case(
        seed=r.randrange(2**31),
        backend="triton" if on_triton else r.choice(("eager", "numba")),
        dtype=r.choice(tuple(DTYPES)),
        batch=r.choice((-1, -1, 0, 1, 1, 2)),
        tokens=r.choice((0, 1, 3, r.randint(0, 60))),
        heads=r.choice((1, 2, 3, 8)),
        head_dim=r.choice(HEAD_DIMS),
        magnitude=often(r, 1.0, 0.0, 100.0, 1e4, 1e5, 1e7),
        apart=often(r, 1.0, 0.0, 20.0, 200.0, 1e5),
        empty=often(r, "", "a", "b", "both"),
        layouts=() if r.random() < 0.5 else tuple(r.choice(LAYOUTS) for _ in range(2)),
        gradient=r.random() < 0.5,
        keys=() if r.random() < 0.6 else tuple(r.randint(0, 40) for _ in range(r.randint(2, 4))),
        bad=draw_mutation(r, MUTATIONS) if r.random() < 0.12 else "",
    )


def check(case: Case) -> None:
    with backend(case.backend):
        _check_parts(case) if case.keys else _check_any(case)


def _merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The formula."""
    out_a, lse_a, out_b, lse_b = (x.double() for x in (out_a, lse_a, out_b, lse_b))
    largest = torch.maximum(lse_a, lse_b)
    shift = largest.masked_fill(largest == -math.inf, 0.0)
    a, b = (lse_a - shift).exp(), (lse_b - shift).exp()
    total = a + b
    lse = shift + total.log()
    share_a, share_b = (torch.where(total > 0, w / total.masked_fill(total == 0, 1.0), 0.0) for w in (a, b))

    def beside(share: Tensor) -> Tensor:
        return share.transpose(-1, -2)[..., None]

    return beside(share_a) * out_a + beside(share_b) * out_b, lse


def _check_any(case: Case) -> None:
    g = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    lead = () if case.batch < 0 else (case.batch,)
    shape, rows = (*lead, case.tokens, case.heads, case.head_dim), (*lead, case.heads, case.tokens)
    lse_a = torch.randn(rows, generator=g) * case.magnitude
    lse_b = lse_a + torch.randn(rows, generator=g) * case.apart
    some = torch.rand(rows, generator=g) < 0.3
    if case.empty in ("a", "both"):
        lse_a = lse_a.masked_fill(some, -math.inf)
    if case.empty in ("b", "both"):
        lse_b = lse_b.masked_fill(some, -math.inf)
    layouts = case.layouts or ("", "")
    out_a, out_b = (laid_out(torch.randn(shape, generator=g).to(dtype), layout) for layout in (layouts[0], layouts[-1]))
    # A part without keys has out 0 there.
    if not any(layout.startswith("expanded") for layout in layouts):
        for out, lse in ((out_a, lse_a), (out_b, lse_b)):
            out.masked_fill_((lse == -math.inf).transpose(-1, -2)[..., None], 0.0)
    arguments = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    if case.bad:
        expect_refusal(kvops.merge_attention, arguments, case.bad)
        return
    inputs = tuple(x.requires_grad_(case.gradient) for x in arguments.values())
    actual = kvops.merge_attention(*inputs)
    given = [x.detach() for x in inputs]
    exact, low = _merged(*given), rounded(dtype, _merged, *given)
    close(actual[0], exact[0], low[0], "out")
    close(actual[1], exact[1], low[1], "lse")
    if case.gradient:
        dout, dlse = torch.randn(shape, generator=g).to(dtype), torch.randn(rows, generator=g)
        found = torch.autograd.grad(actual, inputs, (dout, dlse))
        exact, low = _gradients(*given, dout, dlse), rounded(dtype, _gradients, *given, dout, dlse)
        for one, right, same, name in zip(found, exact, low, arguments, strict=True):
            close(one, right, same, f"d{name}")


def _gradients(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, dout: Tensor, dlse: Tensor) -> list[Tensor]:
    """Written out: the weights are a softmax of two, and lse its logarithm's sum."""
    out_a, lse_a, out_b, lse_b, dout, dlse = (x.double() for x in (out_a, lse_a, out_b, lse_b, dout, dlse))
    largest = torch.maximum(lse_a, lse_b)
    shift = largest.masked_fill(largest == -math.inf, 0.0)
    a, b = (lse_a - shift).exp(), (lse_b - shift).exp()
    total = (a + b).masked_fill(a + b == 0, 1.0)
    a, b = a / total, b / total

    def beside(share: Tensor) -> Tensor:
        return share.transpose(-1, -2)[..., None]

    along_a, along_b = ((dout * out).sum(-1).transpose(-1, -2) for out in (out_a, out_b))
    difference = a * b * (along_a - along_b)
    return [beside(a) * dout, a * dlse + difference, beside(b) * dout, b * dlse - difference]


def _check_parts(case: Case) -> None:
    """Attention to parts of the keys, merged one after another, is attention to all of them."""
    g = torch.Generator().manual_seed(case.seed)
    dtype, batch = DTYPES[case.dtype], max(case.batch, 0)
    q = torch.randn(batch, case.tokens, case.heads, case.head_dim, generator=g).to(dtype)
    parts = [torch.randn(2, batch, n, 1, case.head_dim, generator=g).to(dtype) for n in case.keys]
    out, lse = kvops.flash_attention(q, *parts[0])
    for part in parts[1:]:
        out, lse = kvops.merge_attention(out, lse, *kvops.flash_attention(q, *part))
    k, v = torch.cat(parts, 2)
    exact = attention(q, k, v)

    def merged(q: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = attention(q, *parts[0])
        for part in parts[1:]:
            out, lse = _merged(
                out.to(dtype), lse, *(x.to(dtype) if x.dim() == 4 else x for x in attention(q, *part)[:2])
            )
        return out, lse

    same = rounded(dtype, merged, q, *parts)
    close(out, exact[0], same[0], "out of the parts")
    close(lse, exact[1], same[1], "lse of the parts")
