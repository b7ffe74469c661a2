"""``verify_draft`` and ``verify_tree``: token by token in float64 Python, and in distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import speculation
import torch
from torch import Tensor

import kvops
from fuzz.inputs import DTYPES, TENSOR, backend, draw_mutation, expect_refusal, often

_PER_REQUEST = ("dtype", "integer", "rank", "flat", "last", "meta", "string")
MUTATIONS = {
    "target_logits": (*TENSOR, "strided"),
    "draft_tokens": TENSOR,
    "draft_lens": ("dtype", "integer", "rank", "flat", "last", "meta", "string"),
    "draft_probs": ("dtype", "integer", "rank", "flat", "last", "meta", "string"),
    "temperature": _PER_REQUEST,
    "seed": ("integer", "rank", "flat", "last", "meta", "string"),
    "step": ("integer", "rank", "flat", "last", "meta", "string"),
    "method": ("string", "none", "fraction"),
}
TRIALS = 20_000


@dataclass(frozen=True)
class Case:
    seed: int = 0
    backend: str = "eager"
    dtype: str = "float32"
    batch: int = 1
    drafts: int = 0
    vocab: int = 1
    spread: float = 2.0
    probs: bool = False
    lens: bool = False
    block: bool = False
    tree: bool = False
    packed: bool = False  # the rows of all requests end to end
    greedy: str = ""  # "some" or "all"
    odd: str = ""  # "out of vocabulary", "-inf", "nan" or "ties"
    distribution: bool = False
    bad: str = ""


def draw(r: Random) -> Case:
    distribution = r.random() < 0.2
    return Case(
        seed=r.randrange(2**31),
        backend=r.choice(("eager", "numba")) if distribution or r.random() < 0.85 else "triton",
        dtype=r.choice(tuple(DTYPES)),
        batch=r.choice((0, 1, 2, 3, 8)),
        drafts=r.randint(0, 3 if distribution else 6),
        vocab=r.randint(1, 5) if distribution else r.choice((1, 2, 5, 37, 257, 1024, 1030, 3000)),
        spread=often(r, 2.0, 0.0, 0.3, 10.0),
        probs=r.random() < 0.5,
        lens=r.random() < 0.4,
        block=r.random() < 0.4,
        tree=r.random() < 0.4,
        packed=r.random() < 0.4,
        greedy=often(r, "", "some", "all"),
        odd=often(r, "", "out of vocabulary", "-inf", "nan", "ties", p=0.7),
        distribution=distribution,
        bad=draw_mutation(r, MUTATIONS) if r.random() < 0.1 else "",
    )


def check(case: Case) -> None:
    with backend(case.backend):
        if case.distribution:
            _check_distribution(case)
        else:
            _check_tokens(case)


def _check_tokens(case: Case) -> None:
    g = torch.Generator().manual_seed(case.seed)
    B, N, V = case.batch, case.drafts, case.vocab
    rows = N + 1
    drafter = torch.randn(B, rows, V, generator=g) * case.spread
    logits = (drafter + torch.randn(B, rows, V, generator=g) * min(case.spread, 1.0)).to(DTYPES[case.dtype])
    if case.odd == "ties":
        logits = logits.round()
    if case.odd == "-inf":
        logits = logits.masked_fill(torch.rand(logits.shape, generator=g) < 0.4, -math.inf)
        logits[..., 0] = logits[..., 0].nan_to_num(neginf=0.0)
    if case.odd == "nan" and B:
        logits[0, int(torch.randint(rows, (), generator=g)), int(torch.randint(V, (), generator=g))] = math.nan
    probs = drafter.softmax(-1)
    width = rows if case.tree else N
    drafted = torch.randint(0, V, (B, width), generator=g)
    if B * width:
        drafted = torch.multinomial(probs[:, :width].reshape(-1, V), 1, generator=g).view(B, width)
    if case.odd == "out of vocabulary":
        drafted = torch.where(torch.rand(B, width, generator=g) < 0.2, torch.randint(-2, V + 2, (B, width)), drafted)
    temperature = torch.rand(B, generator=g) * 1.5 + 0.2
    if case.greedy:
        temperature = temperature.masked_fill(torch.rand(B, generator=g) < (0.4 if case.greedy == "some" else 2), 0.0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (B,), generator=g)
    steps = torch.randint(0, 2**40, (B,), generator=g)
    lens = torch.randint(0, N + 1, (B,), generator=g).int() if case.lens else None
    arguments: dict[str, Any] = {"target_logits": logits, "draft_tokens": drafted}
    arguments |= {"draft_probs": probs[:, :width].contiguous() if case.probs else None}
    arguments |= {"temperature": temperature, "seed": seeds, "step": steps}
    if case.tree:
        _check_tree(case, arguments, g)
        return
    arguments |= {"draft_lens": lens, "method": "block" if case.block else "token"}
    if case.bad:
        # Without drafts or draft_probs another vocabulary is as good.
        if not (case.bad == "target_logits:last" and not (case.probs and N)):
            expect_refusal(kvops.verify_draft, arguments, case.bad)
        return
    tokens, accepted = _draft_varlen(arguments) if case.packed else kvops.verify_draft(**arguments)
    for b in range(B):
        n = N if lens is None else int(lens[b])
        found = tokens[b].tolist(), int(accepted[b])
        heat = float(temperature[b])
        model = speculation.verify_block if case.block and heat else speculation.verify
        own = (
            logits[b, : n + 1].double().tolist(),
            drafted[b, :n].tolist(),
            probs[b, :n].double().tolist() if case.probs else None,
            heat,
            int(seeds[b]),
            int(steps[b]),
        )
        if _refused(logits[b, : n + 1]):
            # The drafts accepted before the refused row, then nothing.
            count = found[1]
            assert found[0][:count] == drafted[b, :count].tolist(), f"request {b}: {found}"
            assert set(found[0][count + 1 :]) <= {-1}, f"request {b}: {found}"
            continue

        def same(want: tuple[list[int], int], found: Any = found) -> bool:
            return ([*want[0], *[-1] * (N + 1 - len(want[0]))], want[1]) == found

        _expect(model, own, same, f"request {b}: {found}")


def _draft_varlen(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``verify_draft_varlen`` of what ``verify_draft`` takes; behind the last request there is a draft of none."""
    B, rows = arguments["target_logits"].shape[:2]
    lens = [rows - 1] * B if arguments["draft_lens"] is None else arguments["draft_lens"].tolist()
    packed = {name: x for name, x in arguments.items() if name != "draft_lens"}
    for name, more in (("target_logits", 1), ("draft_tokens", 0), ("draft_probs", 0)):
        if (x := arguments[name]) is not None:
            packed[name] = torch.cat([*(x[b, : n + more] for b, n in enumerate(lens)), x.new_zeros(1, *x.shape[2:])])
    ends = torch.tensor([0, *accumulate(lens)], dtype=torch.int32)
    return kvops.verify_draft_varlen(cu_seqlens=ends, max_seqlen=rows - 1, **packed)


def _tree_varlen(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """``verify_tree_varlen`` of what ``verify_tree`` takes."""
    B, nodes = arguments["draft_tokens"].shape
    names = "target_logits", "draft_tokens", "parents", "draft_probs"
    packed = {name: x.flatten(0, 1) if name in names and x is not None else x for name, x in arguments.items()}
    ends = nodes * torch.arange(B + 1, dtype=torch.int32)
    return kvops.verify_tree_varlen(cu_seqlens=ends, max_seqlen=nodes, **packed)


def _check_tree(case: Case, arguments: dict[str, Any], g: torch.Generator) -> None:
    B, nodes = arguments["draft_tokens"].shape
    parents = torch.full((B, nodes), -1, dtype=torch.int32)
    for b in range(B):
        for node in range(1, nodes):
            parents[b, node] = int(torch.randint(-1 if case.odd else 0, node, (), generator=g))
    tree = {"parents": parents, **arguments}
    if case.bad:
        if case.bad.split(":")[0] in tree and not (case.bad == "target_logits:last" and not case.probs):
            expect_refusal(kvops.verify_tree, tree, case.bad)
        return
    path, tokens, accepted = _tree_varlen(tree) if case.packed else kvops.verify_tree(**tree)
    for b in range(B):
        if _refused(arguments["target_logits"][b]):
            continue
        own = (
            arguments["target_logits"][b].double().tolist(),
            arguments["draft_tokens"][b].tolist(),
            parents[b].tolist(),
            None if arguments["draft_probs"] is None else arguments["draft_probs"][b].double().tolist(),
            float(arguments["temperature"][b]),
            int(arguments["seed"][b]),
            int(arguments["step"][b]),
        )
        found = path[b].tolist(), tokens[b].tolist(), int(accepted[b])

        def same(want: tuple[list[int], list[int]], found: Any = found) -> bool:
            padded = ([*part, *[-1] * (nodes - len(part))] for part in want)
            return (*padded, len(want[0]) - 1) == found

        _expect(speculation.verify_tree, own, same, f"request {b}: {found}")


def _refused(logits: Tensor) -> bool:
    return not bool(logits.amax(-1).isfinite().all())


def _expect(model: Callable[..., Any], own: tuple[Any, ...], same: Callable[[Any], bool], found: str) -> None:
    """The model's outcome; or one that it has when float32 rounds its numbers otherwise, so close was the decision."""
    want = model(*own)
    if same(want):
        return
    logits, *rest = own
    jitter = Random(0)
    for _ in range(40):
        moved = [[x + jitter.uniform(-2e-5, 2e-5) * (1 + abs(x)) for x in row] for row in logits]
        place = len(rest) - 3
        if rest[place] != 0.0 and same(model(moved, *rest)):
            return
    raise AssertionError(f"{found}; the model says {want}")


def _check_distribution(case: Case) -> None:
    """What is emitted, and then drawn from the target, has the target's distribution over all texts of that length."""
    g = torch.Generator().manual_seed(case.seed)
    N, V = case.drafts, case.vocab
    target = torch.randn(N + 1, V, generator=g) * case.spread
    drafter = (target[:N] + torch.randn(N, V, generator=g)).softmax(-1)
    p = target.softmax(-1)
    fixed = torch.randint(0, V, (1, N), generator=g).expand(TRIALS, N)
    independent = torch.stack(
        [torch.multinomial(row, TRIALS, replacement=True, generator=g) for row in drafter]
        or [torch.empty(TRIALS, dtype=torch.int64)] * 0
        or [torch.zeros(TRIALS, dtype=torch.int64)],
        1,
    )[:, :N]
    drafts = independent if case.probs else fixed
    common = {
        "temperature": torch.ones(TRIALS),
        "seed": torch.randint(-(2**63), 2**63 - 1, (TRIALS,), generator=g),
    }
    if case.tree and N:
        # Siblings of the root, N of them, drawn independently from one row, each of which may have the next below it.
        tokens = torch.zeros(TRIALS, N + 1, dtype=torch.int64)
        row = drafter[:1]
        tokens[:, 1:] = drafts if not case.probs else torch.multinomial(row.expand(TRIALS, V), N, True, generator=g)
        parents = torch.zeros(TRIALS, N + 1, dtype=torch.int32)
        parents[:, 0] = -1
        logits = target[:1].expand(TRIALS, N + 1, V).contiguous()
        logits[:, 1:] = target[1]
        shared = row[None].expand(TRIALS, N + 1, V).contiguous() if case.probs else None
        _, emitted, _ = kvops.verify_tree(logits, tokens, parents, draft_probs=shared, **common)
        emitted, depth = emitted[:, :2], 2
        rows = p[:2]
    else:
        emitted, _ = kvops.verify_draft(
            target[None].expand(TRIALS, N + 1, V),
            drafts.contiguous(),
            draft_probs=drafter[None].expand(TRIALS, N, V).contiguous() if case.probs else None,
            method="block" if case.block else "token",
            **common,
        )
        depth, rows = N + 1, p
    rest = torch.stack([torch.multinomial(row, TRIALS, replacement=True, generator=g) for row in rows], 1)
    text = torch.where(emitted >= 0, emitted, rest)
    cell, wanted = torch.zeros(TRIALS, dtype=torch.int64), torch.ones(1)
    for t in range(depth):
        cell = cell * V + text[:, t]
        wanted = (wanted[:, None] * rows[t]).flatten()
    chance = speculation.chi_square(cell, wanted)
    assert math.isnan(chance) or chance > 1e-8, f"distribution: probability {chance:.1e}"
