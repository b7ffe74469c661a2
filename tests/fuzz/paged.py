"""``paged_append`` and ``paged_attention`` over ragged lists and over pages, list by list in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from paged_lists import POISON_BLOCK, QUANTISED, Lists, expected, quantise, quantise_by_slot
from rounding import rounded
from torch import Tensor

import kvops
from fuzz.inputs import (
    COUNT,
    DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    SIDES,
    TENSOR,
    backend,
    close,
    draw_mutation,
    expect_refusal,
    laid_out,
    often,
)
from fuzz.scoring import draw_bias, finite, make_bias

_INDEX = ("dtype", "integer", "rank", "flat", "meta", "string", "none")
MUTATIONS = {
    "q": (*TENSOR, "strided"),
    "k_cache": (*TENSOR, "strided"),
    "v_cache": ("integer", "rank", "flat", "meta", "string", "none", "strided"),
    "block_tables": _INDEX,
    "seq_lens": (*_INDEX, "last"),
    "q_lens": ("dtype", "integer", "rank", "flat", "last", "meta", "string"),
    "window_left": COUNT,
    "softcap": ("nan", "inf", "negative", "string", "none"),
    "scale": ("nan", "inf", "string"),
    "scores": ("dtype", "integer", "rank", "flat", "last", "meta", "string"),
    "score_reduce": ("string", "fraction", "none"),
    "score_decay": ("negative", "nan", "string", "none"),
    "k_scale": ("list", "dtype"),
    "bias": ("integer", "meta", "string"),
    "k_slot_scale": ("dtype", "integer", "rank", "flat", "last", "meta", "string"),
}


@dataclass(frozen=True)
class Case:
    seed: int = 0
    backend: str = "eager"
    dtype: str = "float32"
    lengths: tuple[tuple[int, ...], ...] = ()  # of each row, of each head, with the new tokens
    tokens: int = 1
    q_lens: tuple[int, ...] = ()
    group: int = 1
    head_dim: int = 1
    value_dim: int = 1
    block_size: int = 1
    pages: bool = False  # a 4-D cache, one table for all heads
    append: bool = False  # the new tokens come in first
    layouts: tuple[str, ...] = ()
    causal: bool = True
    window_left: int = -1
    positions: bool = False
    scale: float | None = None
    softcap: float = 0.0
    sinks: str = ""
    tree: str = ""  # tree_mask for "all" sequences or for "each"
    bias: str = ""  # "float" or "bool", and for batch, heads, tokens and slots "1" or "n": "float 1nn1"
    float8: str = ""  # "number", "heads", "slots" or "none" scales; then at least one side is float8 or int8
    sides: tuple[str, str] = ("float8_e4m3fn", "float8_e4m3fn")  # dtypes of K and V; "" for that of q
    scores: str = ""
    decay: float = 1.0
    schedule: int = -1  # programs; 0 chooses
    batch_invariant: bool = False
    bad: str = ""


def draw(r: Random) -> Case:
    on_triton = r.random() < 0.15
    longest = r.choice((3, 20, 60)) if on_triton else r.choice((3, 20, 60, 300))
    heads, tokens = r.choice((1, 1, 2, 3)), r.choice((1, 1, 1, 0, 2, 3, 5, 9))
    batch = r.choice((0, 1, 1, 2, 3))
    head_dim = r.choice(HEAD_DIMS[:10] if on_triton else HEAD_DIMS)
    pages = r.random() < 0.3

    def row() -> tuple[int, ...]:
        lens = [r.choice((r.randint(0, longest), longest, tokens, 0)) for _ in range(heads)]
        return (lens[0],) * heads if pages else tuple(lens)

    return Case(
        seed=r.randrange(2**31),
        backend="triton" if on_triton else r.choice(("eager", "numba")),
        dtype=r.choice(tuple(DTYPES)),
        lengths=tuple(row() for _ in range(batch)),
        tokens=tokens,
        q_lens=() if r.random() < 0.6 else tuple(r.randint(0, tokens) for _ in range(batch)),
        group=often(r, 1, 2, 3, 4, 7, 9),
        head_dim=head_dim,
        value_dim=often(r, head_dim, *HEAD_DIMS[: 10 if on_triton else None]),
        block_size=r.choice((1, 2, 3, 8, 16, 16, 32)),
        pages=pages,
        append=r.random() < 0.5,
        layouts=() if r.random() < 0.5 else tuple(r.choice(LAYOUTS[:5]) for _ in range(3)),
        causal=r.random() < 0.8,
        window_left=often(r, -1, 0, 1, r.randint(0, longest), 2**31 - 2, 2**31 - 1, 2**63 - 1),
        positions=r.random() < 0.4,
        scale=often(r, None, 0.0, -0.3, 0.2, 3.0, p=0.7),
        softcap=often(r, 0.0, 0.5, 2.0, 30.0, p=0.7),
        # The kernels give NaN for a sink of +inf, and for one of -inf beside an empty list; eager code gives 0.
        sinks=often(r, "", "random", *(() if on_triton else ("-inf", "inf")), p=0.7),
        tree=often(r, "", "all", "each", p=0.8),
        bias=draw_bias(r, 4),
        float8=often(r, "", "number", "heads", "slots", "none", p=0.7),
        sides=r.choice([(k, v) for k in (*SIDES, "") for v in (*SIDES, "") if k or v]),
        scores=often(r, "", "sum", "sumsq", "max", p=0.5),
        decay=often(r, 1.0, 0.0, 0.5, 2.0),
        schedule=r.choice((-1, -1, 0, 1, 2, 7, 40)),
        batch_invariant=r.random() < 0.2,
        bad=draw_mutation(r, MUTATIONS) if r.random() < 0.12 else "",
    )


def check(case: Case) -> None:
    with backend(case.backend):
        _check(case)


def _shuffled(case: Case, g: torch.Generator, dtype: torch.dtype) -> tuple[Lists, dict[str, Tensor]]:
    """Lists in a shuffled pool, NaN wherever no list is, and the scales of their slots, if they have some."""
    size, heads = case.block_size, len(case.lengths[0]) if case.lengths else 1
    lens = torch.tensor(case.lengths, dtype=torch.int32).view(-1, heads)
    used = (lens + size - 1) // size
    width = int(used.max()) + 1 if used.numel() else 1
    total = int(used.sum()) + 2
    order = torch.randperm(total, generator=g).int().tolist()
    tables = torch.full((*lens.shape, width), POISON_BLOCK, dtype=torch.int32)
    k = torch.full((total, size, case.head_dim), math.nan)
    v = torch.full((total, size, case.value_dim), math.nan)
    positions = torch.full((total, size), -(2**31), dtype=torch.int32)
    scores = torch.full((total, size), math.nan)
    lists = Lists(k, v, tables, lens, positions, scores)
    for b, h in ((b, h) for b in range(len(lens)) for h in range(heads)):
        count = int(used[b, h])
        tables[b, h, :count] = torch.tensor(order[:count], dtype=torch.int32)
        del order[:count]
        where = lists.slots(b, h)
        n = int(lens[b, h])
        k[where], v[where] = (torch.randn(n, width, generator=g) for width in (case.head_dim, case.value_dim))
        positions[where] = torch.randint(1, 4, (n,), generator=g).cumsum(0).int()
        scores[where] = torch.rand(n, generator=g)
    caches, slot_scales = [], {}
    for name, x, side in zip("kv", (k, v), case.sides if case.float8 else ("", ""), strict=True):
        if case.float8 == "slots" and side:
            stored, scale = quantise_by_slot(x, SIDES[side])
            caches.append(stored)
            slot_scales[f"{name}_slot_scale"] = scale.masked_fill(x.isnan().any(-1), math.nan)
        else:
            caches.append(quantise(x, SIDES.get(side, dtype)))
    return Lists(*caches, tables, lens, positions, scores), slot_scales


def _check(case: Case) -> None:
    g = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    lists, slot_scales = _shuffled(case, g, dtype)
    batch, heads = lists.seq_lens.shape
    Hq, T = heads * case.group, case.tokens
    layouts = case.layouts or ("", "", "")
    q = laid_out(torch.randn(batch, T, Hq, case.head_dim, generator=g).to(dtype), layouts[0])
    q_lens = torch.tensor(case.q_lens, dtype=torch.int32) if len(case.q_lens) == batch else None
    scales = _scales(case, heads, g)
    query_positions = torch.randint(0, 2 * max([1, *map(max, case.lengths)]), (batch, T), generator=g).int()
    tree = None
    if case.tree and T:
        tree = torch.rand(*(batch,) * (case.tree == "each"), T, T, generator=g) < 0.5
    pool = _Pool(case, lists, layouts, slot_scales)
    if case.append:
        _check_append(case, pool, lists, q_lens, scales, slot_scales, g)
    options: dict[str, Any] = {
        "q_lens": q_lens,
        "causal": case.causal,
        "window_left": case.window_left,
        "scale": case.scale,
        "softcap": case.softcap,
        "sinks": _sinks(case, Hq, g),
        "tree_mask": tree,
        # One column more than there are slots, every other time.
        **make_bias(case.bias, (batch, Hq, T, max([1, *map(max, case.lengths)]) + case.seed % 2), g),
    }
    schedule = None
    if case.schedule >= 0:
        schedule = kvops.paged_schedule(
            pool.seq_lens, case.block_size, num_programs=case.schedule, batch_invariant=case.batch_invariant
        )
    arguments = {
        **{"q": q, "k_cache": pool.k, "v_cache": pool.v, "block_tables": pool.tables, "seq_lens": pool.seq_lens},
        **options,
        **scales,
        **pool.slot_scales,
        "positions": pool.positions if case.positions else None,
        "query_positions": query_positions if case.positions else None,
        "scores": pool.scores if case.scores else None,
        "score_reduce": case.scores or "sum",
        "score_decay": case.decay,
        "schedule": schedule,
        "batch_invariant": case.batch_invariant,
    }
    if case.bad:
        _check_refusal(case, arguments)
        return
    out, lse = kvops.paged_attention(**arguments)
    reference = Lists(*(getattr(lists, name) for name in Lists.__dataclass_fields__))
    reference.k_cache, reference.v_cache = _dequantised(lists, scales)
    right = {
        **options,
        **slot_scales,
        "window_left": min(case.window_left, 2**40),
        "query_positions": query_positions.long() if case.positions else None,
        "score_reduce": case.scores if T and case.scores else "sum",
        "score_decay": case.decay,
    }
    exact, low = expected(q, reference, **right), rounded(dtype, expected, q, reference, **finite(right))
    close(out, exact[0], low[0], "out")
    close(lse, exact[1], low[1], "lse")
    if case.scores:
        found, held = pool.scores_by_slot(), ~lists.scores.isnan()
        assert torch.equal(found.isnan(), ~held), "scores outside of the lists"
        close(found[held], exact[2][held], low[2][:, held], "scores")


class _Pool:
    """The lists as the operators take them: in other memory, or as pages that hold every head."""

    def __init__(self, case: Case, lists: Lists, layouts: tuple[str, ...], slot_scales: dict[str, Tensor]) -> None:
        self.pages = case.pages and all(len(set(row)) == 1 for row in case.lengths)
        self.lists = lists
        heads = lists.seq_lens.shape[1]
        k, v, positions, scores = lists.k_cache, lists.v_cache, lists.positions, lists.scores
        self.tables, self.seq_lens = lists.block_tables, lists.seq_lens
        self.slot_scales = {name: scale.clone() for name, scale in slot_scales.items()}
        if self.pages:
            # The blocks of the first head number the pages; the other heads' blocks go beside them.
            self.of_page = {}
            for b in range(lists.seq_lens.shape[0]):
                used = -(-int(lists.seq_lens[b, 0]) // case.block_size)
                for column in range(used):
                    first = int(lists.block_tables[b, 0, column])
                    self.of_page[first] = [int(lists.block_tables[b, h, column]) for h in range(heads)]

            def beside(side: Tensor, fill: float) -> Tensor:
                whole = side.float() if side.dtype.itemsize == 1 else side
                pages = torch.full((len(side), case.block_size, heads, *side.shape[2:]), fill, dtype=whole.dtype)
                for page, blocks in self.of_page.items():
                    for h, block in enumerate(blocks):
                        pages[page, :, h] = whole[block]
                return quantise(pages, side.dtype)

            k, v, scores = beside(k, math.nan), beside(v, math.nan), beside(scores, math.nan)
            positions = beside(positions, 0)
            self.slot_scales = {name: beside(scale, math.nan) for name, scale in slot_scales.items()}
            self.tables, self.seq_lens = self.tables[:, 0], self.seq_lens[:, 0]
        self.k, self.v = (_laid_out(x, layout) for x, layout in zip((k, v), layouts[1:], strict=False))
        self.positions, self.scores = positions.clone(), scores.clone()

    def by_block(self, side: Tensor) -> Tensor:
        """A side of the cache as it lies in the lists' own blocks; NaN where none of them is."""
        if not self.pages:
            return side
        whole = side.float() if side.dtype.itemsize == 1 else side
        fill = math.nan if whole.dtype.is_floating_point else 0
        blocks = torch.full((len(side), side.shape[1], *side.shape[3:]), fill, dtype=whole.dtype)
        for page, own in self.of_page.items():
            for h, block in enumerate(own):
                blocks[block] = whole[page, :, h]
        return quantise(blocks, side.dtype)

    def scores_by_slot(self) -> Tensor:
        return self.by_block(self.scores)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if x.dtype.itemsize != 1:
        return laid_out(x, layout)
    return laid_out(x.view(torch.uint8), layout).view(x.dtype)  # torch fills no float8


def _scales(case: Case, heads: int, g: torch.Generator) -> dict[str, Any]:
    scales: tuple[Any, Any] = (None, None)
    if case.float8 == "number":
        scales = 0.5, 2.0
    elif case.float8 == "heads":
        scales = tuple(torch.rand(2, heads, generator=g) + 0.5)
    return {
        f"{name}_scale": scale if side else None for name, side, scale in zip("kv", case.sides, scales, strict=True)
    }


def _sinks(case: Case, heads: int, g: torch.Generator) -> Tensor | None:
    if not case.sinks:
        return None
    return torch.randn(heads, generator=g) if case.sinks == "random" else torch.full((heads,), float(case.sinks))


def _dequantised(lists: Lists, scales: dict[str, Any]) -> tuple[Tensor, Tensor]:
    result = []
    for side, scale in ((lists.k_cache, scales["k_scale"]), (lists.v_cache, scales["v_scale"])):
        if side.dtype not in QUANTISED:
            result.append(side)
            continue
        side = side.double()
        for b, h in ((b, h) for b in range(len(lists.seq_lens)) for h in range(lists.seq_lens.shape[1])):
            where = lists.slots(b, h)
            factor = 1.0 if scale is None else float(scale[h]) if isinstance(scale, Tensor) else scale
            side[where] = side[where] * factor
        result.append(side)
    return result[0], result[1]


def _check_append(
    case: Case,
    pool: _Pool,
    lists: Lists,
    q_lens: Tensor | None,
    scales: dict[str, Any],
    slot_scales: dict[str, Tensor],
    g: torch.Generator,
) -> None:
    """New tokens go into the last slots, all else stays as it is, bit by bit; the lists then hold them, too."""
    batch, heads = lists.seq_lens.shape
    dtype, T = DTYPES[case.dtype], case.tokens
    k, v = (torch.randn(batch, T, heads, width, generator=g).to(dtype) for width in (case.head_dim, case.value_dim))
    token_positions = torch.randint(0, 1000, (batch, T), generator=g).int()
    kvops.paged_append(
        *(k, v, pool.k, pool.v, pool.tables, pool.seq_lens),
        q_lens=q_lens,
        positions=pool.positions if case.positions else None,
        token_positions=token_positions if case.positions else None,
        scores=pool.scores if case.scores else None,
        **scales,
        **pool.slot_scales,
    )

    def stored(x: Tensor, scale: Any, h: int, side: torch.dtype) -> Tensor:
        if side not in QUANTISED:
            return x
        factor = 1.0 if scale is None else float(scale[h]) if isinstance(scale, Tensor) else scale
        return quantise(x.float() / factor, side)

    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        count = T if q_lens is None else int(q_lens[b])
        block, offset = lists.slots(b, h)
        kept = min(count, len(block))
        if not kept:
            continue
        where = block[-kept:], offset[-kept:]
        new = slice(count - kept, count)
        for side, x, name in ((lists.k_cache, k, "k"), (lists.v_cache, v, "v")):
            by_slot = slot_scales.get(f"{name}_slot_scale")
            if by_slot is not None:
                values, by_slot[where] = quantise_by_slot(x[b, new, h].float(), side.dtype)
            else:
                values = stored(x[b, new, h], scales[f"{name}_scale"], h, side.dtype)
            side.view(torch.uint8).view(*side.shape[:2], -1)[where] = (
                values.contiguous().view(torch.uint8).view(kept, -1)
            )
        if case.positions:
            lists.positions[where] = token_positions[b, new]
        if case.scores:
            lists.scores[where] = 0.0
    sides = [("k_cache", pool.k), ("v_cache", pool.v), ("scores", pool.scores), *pool.slot_scales.items()]
    for name, side in sides:
        right = slot_scales[name] if name in slot_scales else getattr(lists, name)
        right, found = right.float(), pool.by_block(side).float()
        assert torch.equal(right.nan_to_num(-1e30), found.nan_to_num(-1e30)), f"{name} after paged_append"


def _check_refusal(case: Case, arguments: dict[str, Any]) -> None:
    name, how = case.bad.split(":")
    if name == "bias" and "bias" not in arguments:
        arguments["bias"] = torch.zeros(case.tokens, 1)
    if name == "k_slot_scale" and name not in arguments:
        return
    if name == "k_scale" and how == "dtype":
        arguments["k_scale"] = torch.ones(())
        if case.float8 and case.sides[0]:  # is what a float8 cache takes, but not in float64
            return
    elif name in ("k_cache", "v_cache") and case.float8 and how in ("dtype", "last", "strided", "integer", "flat"):
        return  # torch makes no such float8
    if name == "scores" and how == "integer" and arguments["scores"] is not None:
        how = "dtype"
    expect_refusal(kvops.paged_attention, arguments, f"{name}:{how}")
