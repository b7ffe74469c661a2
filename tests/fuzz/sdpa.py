"""``kvops.scaled_dot_product_attention`` beside torch's own in float64, gradients included."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from oracle import attention
from rounding import rounded
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

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
    without_equals,
)
from fuzz.scoring import expected_gradients

MUTATIONS = {
    "query": tuple(how for how in TENSOR if how != "rank"),  # which any input may have
    "key": tuple(how for how in TENSOR if how != "rank"),
    "value": ("dtype", "integer", "flat", "meta", "string", "none"),
    "attn_mask": ("dtype", "last"),
    "dropout_p": ("negative", "nan"),
    "scale": ("nan", "inf", "string"),
}


@dataclass(frozen=True)
class Case:
    seed: int = 0
    backend: str = "eager"
    dtype: str = "float32"
    batch: int = 1
    queries: int = 1
    keys: int = 1
    kv_heads: int = 1  # 0: tensors without a dimension of heads
    group: int = 1
    head_dim: int = 1
    value_dim: int = 1
    # "causal", "upper", "lower", "padding", "one padding", "gaps", "all padding", or "bool" or "float" with "1" or "n"
    # for batch, heads, queries and keys: "float 1nn1"
    mask: str = ""
    scale: float | None = None
    layouts: tuple[str, ...] = ()
    gradient: bool = False
    bad: str = ""


def draw(r: Random) -> Case:
    on_triton = r.random() < 0.1
    longest = r.choice((2, 9, 40)) if on_triton else r.choice((2, 9, 40, 130))
    head_dim = r.choice(HEAD_DIMS[:10] if on_triton else HEAD_DIMS)
    keys = r.randint(0, longest)
    kv_heads = r.choice((0, 1, 2, 3))
    shaped = f"{r.choice(('float', 'bool'))} {''.join(r.choice('1n') for _ in range(4))}"
    case = Case(
        seed=r.randrange(2**31),
        backend="triton" if on_triton else "eager",
        dtype=r.choice(tuple(DTYPES)),
        batch=r.choice((1, 1, 2, 3, 0)),
        queries=r.choice((keys, r.randint(0, longest), 1)),
        keys=keys,
        kv_heads=kv_heads,
        group=often(r, 1, 2, 3, 8) if kv_heads else 1,
        head_dim=head_dim,
        value_dim=often(r, head_dim, *HEAD_DIMS[: 10 if on_triton else None]),
        mask=r.choice(
            (*("", "causal", "upper", "lower", "padding", "one padding", "gaps", "all padding"), *(shaped,) * 6)
        ),
        scale=often(r, None, 0.0, -0.5, 0.3),
        layouts=() if r.random() < 0.4 else tuple(r.choice(LAYOUTS) for _ in range(3)),
        gradient=r.random() < 0.5,
        bad=draw_mutation(r, MUTATIONS) if r.random() < 0.1 else "",
    )
    return without_equals(case)


def check(case: Case) -> None:
    with backend(case.backend):
        _check(case)


def _check(case: Case) -> None:
    g = torch.Generator().manual_seed(case.seed)
    dtype, layouts = DTYPES[case.dtype], case.layouts or ("", "", "")
    group = case.group if case.kv_heads else 1
    heads = [(case.kv_heads * group,), (case.kv_heads,), (case.kv_heads,)] if case.kv_heads else [()] * 3
    sizes = (case.queries, case.head_dim), (case.keys, case.head_dim), (case.keys, case.value_dim)
    q, k, v = (
        laid_out(torch.randn(case.batch, *head, *size, generator=g).to(dtype), layout)
        for head, size, layout in zip(heads, sizes, layouts, strict=False)
    )
    mask, added = _mask(case, g)
    options = {"is_causal": case.mask == "causal", "scale": case.scale, "enable_gqa": group > 1}
    arguments = {"query": q, "key": k, "value": v, "attn_mask": mask, "dropout_p": 0.0, **options}
    if case.bad:
        if case.bad == "attn_mask:last" and mask is not None and mask.shape[-1] + 1 in (1, case.keys):
            return  # it broadcasts all the same
        if "attn_mask" not in case.bad or type(mask) is Tensor:  # a CausalBias is a tensor of another kind
            expect_refusal(kvops.scaled_dot_product_attention, arguments, case.bad)
        return
    for tensor in (q, k, v):
        tensor.requires_grad_(case.gradient)
    out = kvops.scaled_dot_product_attention(**arguments)
    dout = torch.randn(out.shape, generator=g).to(dtype)
    found = (out, *(torch.autograd.grad(out, (q, k, v), dout) if case.gradient else ()))
    given = q.detach(), k.detach(), v.detach(), dout, added, case
    exact, low = _torch(*given), rounded(dtype, _flash, *given)
    for one, right, same, name in zip(found, exact, low, ("out", "dq", "dk", "dv"), strict=False):
        close(one, right, same, name)


def _mask(case: Case, g: torch.Generator) -> tuple[Tensor | None, Tensor]:
    """``attn_mask``, and what it adds to the scores [(batch or 1, 1 or heads,) queries, keys]: -inf hides a key."""
    if case.mask[:4] in ("bool", "floa"):
        kind, code = case.mask.split()
        heads = case.kv_heads * case.group if case.kv_heads else 1
        sizes = case.batch, heads, case.queries, case.keys
        shape = [1 if letter == "1" else size for letter, size in zip(code, sizes, strict=True)]
        keep = torch.rand(shape, generator=g) < 0.7
        added = torch.zeros(shape) if kind == "bool" else torch.randn(shape, generator=g)
        added = added.masked_fill(~keep, -torch.inf)
        mask = keep if kind == "bool" else added
        added = added.double().expand(-1, -1, case.queries, case.keys)
        return (mask, added) if case.kv_heads else (mask.squeeze(1), added.squeeze(1))
    mask, seen = _lengths(case, g)
    return mask, torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)


def _lengths(case: Case, g: torch.Generator) -> tuple[Tensor | None, Tensor]:
    """The same for masks of causality and padding, as bool."""
    queries, keys = case.queries, case.keys
    query, key = torch.arange(queries)[:, None], torch.arange(keys)
    if case.mask in ("causal", "upper"):
        return causal_upper_left(queries, keys) if case.mask == "upper" else None, key <= query
    if case.mask == "lower":
        return causal_lower_right(queries, keys), key <= query + keys - queries
    if not case.mask:
        return None, torch.ones(queries, keys, dtype=torch.bool)
    batch = 1 if case.mask == "one padding" else case.batch
    first, last = torch.randint(0, keys + 1, (2, batch, 1), generator=g).sort(0).values
    real = (key >= first) & (key < last)
    if case.mask == "gaps":
        real = torch.rand(batch, keys, generator=g) < 0.5
    if case.mask == "all padding":
        real = torch.zeros(batch, keys, dtype=torch.bool)
    mask = real[:, None, None] if case.kv_heads else real[:, None]
    return mask, mask.expand(*mask.shape[:-2], queries, keys)


def _torch(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, added: Tensor, case: Case) -> tuple[Tensor, ...]:
    """torch's answer; a query that sees nothing gives 0, which torch does not promise."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    real = (added > -torch.inf).any(-1, keepdim=True)
    # One key of zeros more, which the empty rows see: torch needs one, and what it gives there is masked out.
    more_k, more_v = (torch.cat([x, x.new_zeros(*x.shape[:-2], 1, x.shape[-1])], -2) for x in (k, v))
    mask, gqa = (
        torch.cat([added, added.new_zeros(real.shape).masked_fill(real, -torch.inf)], -1),
        case.group > 1 and case.kv_heads > 0,
    )
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, more_k, more_v, attn_mask=mask, scale=case.scale, enable_gqa=gqa)
    out = out.masked_fill(~real, 0.0)
    if not case.gradient:
        return (out.detach(),)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())


def _flash(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, added: Tensor, case: Case) -> tuple[Tensor, ...]:
    """The same as flash attention computes it, whose backward starts from rounded results."""
    if q.dim() == 3:
        q, k, v, dout = (x.unsqueeze(1) for x in (q, k, v, dout))
        added = added.unsqueeze(1) if added.dim() == 3 else added
    q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
    options = {"scale": case.scale, "bias": added}
    results = [attention(q, k, v, **options)[0]]
    if case.gradient:
        results += expected_gradients(q, k, v, dout, None, None, options, DTYPES[case.dtype])[:3]
    results = [x.transpose(1, 2) for x in results]
    return tuple(results if case.kv_heads else (x.squeeze(1) for x in results))
