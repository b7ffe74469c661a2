"""``select_blocks``, ``compact`` and ``copy_blocks`` against plain Python that ranks and moves one slot at a time."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from eviction_lists import Lists, expected_choice, make_lists

import kvops
from fuzz.inputs import backend, draw_mutation, expect_refusal, often

_TENSOR = ("dtype", "integer", "rank", "flat", "meta", "string", "none")
MUTATIONS = {
    "scores": _TENSOR,
    "block_tables": _TENSOR,
    "seq_lens": (*_TENSOR, "last"),
    "budget": (*_TENSOR, "last"),
    "positions": ("dtype", "integer", "rank", "flat", "last", "meta", "string"),
    "protect_first": ("negative", "string", "fraction", "none"),
    "protect_last": ("negative", "string", "fraction", "none"),
    "min_per_head": ("negative", "string", "fraction", "none"),
    "scope": ("string", "fraction", "none"),
}


@dataclass(frozen=True)
class Case:
    seed: int = 0
    backend: str = "eager"
    batch: int = 1
    heads: int = 1
    blocks: int = 1
    size: int = 1
    values: str = "continuous"
    budget: tuple[int, ...] = ()
    positions: bool = False
    slot_scales: bool = False
    protect_first: int = 0
    protect_last: int = 0
    min_per_head: int = 0
    scope: str = "head"
    dtype: str = "float32"
    keep: str = ""  # "random", "all" or "none" in place of what select_blocks says
    copies: int = 0
    bad: str = ""


def draw(r: Random) -> Case:
    batch, heads, blocks, size = r.randint(1, 3), r.randint(1, 5), r.randint(1, 9), r.choice((1, 2, 3, 4, 7, 16, 32))
    slots = blocks * size
    return Case(
        seed=r.randrange(2**31),
        backend=r.choice(("eager", "numba")) if r.random() < 0.85 else "triton",
        batch=batch,
        heads=heads,
        blocks=blocks,
        size=size,
        values=r.choice(("continuous", "ties", "any")),
        budget=tuple(often(r, r.randint(0, heads * blocks + 1), 0, -1, 2**31 - 1, p=0.9) for _ in range(batch)),
        positions=r.random() < 0.5,
        slot_scales=r.random() < 0.4,
        protect_first=often(r, 0, r.randint(0, slots), 2**31 - 1, 2**63 - 1),
        protect_last=often(r, 0, r.randint(0, slots), 1, 2**31 - 1, 2**63 - 1),
        min_per_head=often(r, 0, r.randint(0, slots), 2**31 - 1, 2**63 - 1, p=0.7),
        scope=r.choice(("head", "sequence")),
        dtype=r.choice(("float32", "float16", "float8_e4m3fn", "int64")),
        keep=often(r, "", "random", "all", "none"),
        copies=r.randint(0, 3),
        bad=draw_mutation(r, MUTATIONS) if r.random() < 0.15 else "",
    )


def check(case: Case) -> None:
    with backend(case.backend):
        _check(case)


def _check(case: Case) -> None:
    lists = make_lists(case.batch, case.heads, case.blocks, case.size, values=case.values, seed=case.seed)
    budget = torch.tensor((*case.budget, 0, 0, 0, 0, 0)[: case.batch], dtype=torch.int32)
    protection = {name: getattr(case, name) for name in ("protect_first", "protect_last", "min_per_head")}
    arguments = {
        **{"scores": lists.scores, "block_tables": lists.tables, "seq_lens": lists.lens, "budget": budget},
        **{"positions": lists.positions if case.positions else None, **protection, "scope": case.scope},
    }
    if case.bad:
        expect_refusal(kvops.select_blocks, arguments, case.bad)
        return
    new_lens, keep = kvops.select_blocks(**arguments)
    wanted_lens, wanted = expected_choice(lists, budget, positions=case.positions, **protection, scope=case.scope)
    assert torch.equal(new_lens, wanted_lens), f"lengths {new_lens.tolist()}, expected {wanted_lens.tolist()}"
    assert torch.equal(keep, wanted), "kept slots"
    g = torch.Generator().manual_seed(case.seed)
    if case.keep == "random":
        keep = torch.rand(keep.shape, generator=g) < 0.5
    elif case.keep:
        keep = torch.full_like(keep, case.keep == "all")
    k, v = _bytes(case, lists, g, 3), _bytes(case, lists, g, 2)
    sides = {"positions": lists.positions, "scores": lists.scores}
    if case.slot_scales:
        sides |= {f"{name}_slot_scale": torch.rand(lists.scores.shape, generator=g) for name in "kv"}
    _check_copy(case, k, v, sides, g)
    _check_compact(case, lists, keep, k, v, sides)


def _bytes(case: Case, lists: Lists, g: torch.Generator, width: int) -> torch.Tensor:
    dtype = getattr(torch, case.dtype)
    raw = torch.randint(0, 256, (len(lists.scores), case.size, width * dtype.itemsize), generator=g)
    return raw.to(torch.uint8).view(dtype)


def _check_compact(
    case: Case, lists: Lists, keep: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sides: dict[str, torch.Tensor]
) -> None:
    before = [side.clone() for side in (k, v, *sides.values())]
    lens = lists.lens.clone()
    freed = kvops.compact(k, v, lists.tables, lens, keep, **sides)
    for b, h in ((b, h) for b in range(case.batch) for h in range(case.heads)):
        old = lists.slots(b, h)
        kept = [slot for i, slot in enumerate(old) if keep[b, h, i]]
        assert int(lens[b, h]) == len(kept), "length after compact"
        assert int(freed[b, h]) == -(-len(old) // case.size) - -(-len(kept) // case.size), "blocks freed"
        for side, was in zip((k, v, *sides.values()), before, strict=True):
            for to, origin in zip(old, kept, strict=False):
                one, other = (x[at].reshape(-1).view(torch.uint8) for x, at in ((side, to), (was, origin)))
                assert torch.equal(one, other), "bytes moved by compact"


def _check_copy(
    case: Case, k: torch.Tensor, v: torch.Tensor, sides: dict[str, torch.Tensor], g: torch.Generator
) -> None:
    blocks = torch.randperm(len(k), generator=g).int()
    count = min(case.copies, len(k) // 2)
    source, target = blocks[:count], blocks[count : 2 * count].clone()
    if count:
        target[0] = -1 - int(target[0])  # copies nothing
    copied = k, v, *sides.values()
    right = [side.view(torch.uint8).clone() for side in copied]
    for one, other in zip(source.tolist(), target.tolist(), strict=True):
        if other >= 0:
            for side in right:
                side[other] = side[one]
    kvops.copy_blocks(k, v, source, target, **sides)
    for side, wanted in zip(copied, right, strict=True):
        assert torch.equal(side.view(torch.uint8), wanted), "copy_blocks"
