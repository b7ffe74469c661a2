"""Draft verification: chains and trees, greedy and sampled, without and with the drafter's distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise, takewhile

import torch
from torch import Tensor

import kvops
from bench.case import (
    GEMMA_3,
    LLAMA_8B,
    MISTRAL_7B,
    SMOLLM,
    Case,
    Inputs,
    Model,
    Outputs,
    Peer,
    Scale,
    UnavailableError,
)
from kvops.eager.philox import ACCEPT, GROUP_WIDTH, race_exponentials, uniform

_MODES: tuple[dict[str, bool], ...] = ({"sampled": True, "probs": True}, {"sampled": True}, {})
_KEYWORDS = ("draft_probs", "temperature", "seed", "step")


def _keywords(inputs: Inputs) -> dict[str, Tensor]:
    return {name: inputs[name] for name in _KEYWORDS if name in inputs}


def _walk(inputs: Inputs, b: int, parents: list[int]) -> tuple[list[int], list[int]]:
    """One request in float64, one node after another: the path and the tokens. A chain is a tree of single children.

    Only the random numbers are the library's own, as they are part of the contract.
    """
    logits, drafts = inputs["logits"][b].double(), inputs["drafts"][b]
    probs = inputs.get("draft_probs")
    chain = len(drafts) < len(parents)  # a chain's drafts begin behind its root
    sampled = "temperature" in inputs
    path, tokens = [0], []
    while True:
        node = path[-1]
        left = (logits[node] / inputs["temperature"][b]).softmax(-1) if sampled else logits[node].softmax(-1)
        taken = None
        for child in (child for child, parent in enumerate(parents) if parent == node):
            place = child - 1 if chain else child
            token = int(drafts[place])
            if not sampled:
                accepted = token == int(logits[node].argmax())
            else:
                q = torch.zeros_like(left) if probs is None else probs[b, place].double()
                q[token] = 1.0 if probs is None else q[token]
                where = torch.tensor(child - 1, device=logits.device)
                u = uniform(ACCEPT, where, inputs["seed"][b], inputs["step"][b]).double()
                accepted = bool(u * q[token] < left[token])
            if accepted:
                taken = child, token
                break
            if sampled:
                left = (left - q).clamp(min=0)
                left = left / left.sum()
        if taken is None:
            return path, [*tokens, _draw(inputs, b, node, left) if sampled else int(logits[node].argmax())]
        path.append(taken[0])
        tokens.append(taken[1])


def _draw(inputs: Inputs, b: int, node: int, weights: Tensor) -> int:
    groups = weights.split(GROUP_WIDTH)
    position = torch.tensor([node], device=weights.device)
    state = inputs["seed"][b : b + 1], inputs["step"][b : b + 1]
    group_race, race = race_exponentials(position, *state, len(groups), len(groups[0]))
    best = 0
    if len(groups) > 1:
        best = int((torch.stack([group.sum() for group in groups]) / group_race[0].double()).argmax())
    return best * GROUP_WIDTH + int((groups[best] / race[0, : len(groups[best])].double()).argmax())


def _padded(rows: list[list[int]], width: int, like: Tensor) -> Tensor:
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=like.dtype, device=like.device)


def _chain_truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    drafts = inputs["drafts"]
    B, T = drafts.shape
    tokens = [_walk(inputs, b, list(range(-1, T)))[1] for b in range(B)]
    accepted = torch.tensor([len(row) - 1 for row in tokens], dtype=torch.int32, device=drafts.device)
    return _padded(tokens, T + 1, drafts), accepted


def _tree_truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    drafts, parents = inputs["drafts"], inputs["parents"]
    N = drafts.shape[1]
    walks = [_walk(inputs, b, row) for b, row in enumerate(parents.tolist())]
    accepted = torch.tensor([len(path) - 1 for path, _ in walks], dtype=torch.int32, device=drafts.device)
    return _padded([path for path, _ in walks], N, parents), _padded([row for _, row in walks], N, drafts), accepted


def _random(
    batch: int, rows: int, vocab: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Logits with one large entry in each row, and its index, which a good draft guesses."""
    logits = torch.randn(batch, rows, vocab, device=device, generator=generator)
    best = torch.randint(vocab, (batch, rows), device=device, generator=generator)
    logits.scatter_add_(2, best[..., None], torch.full((batch, rows, 1), 15.0, device=device))
    return logits.to(dtype), best


def _guesses(best: Tensor, vocab: int, generator: torch.Generator) -> Tensor:
    """Three of four guesses are right."""
    replacement = torch.randint(vocab, best.shape, device=best.device, generator=generator)
    right = torch.rand(best.shape, device=best.device, generator=generator) < 0.75
    return torch.where(right, best, replacement)


def _sampling(batch: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "temperature": torch.full((batch,), 0.8, device=device),
        "seed": torch.arange(batch, device=device) + 7,
        "step": torch.arange(batch, device=device),
    }


def _plain(inputs: Inputs) -> Callable[[], Outputs]:
    """Speculative sampling in plain torch.

    It samples from the generator of the process. The operator's numbers follow from the seed and step of each request,
    the same on every device, which takes visible time for a small vocabulary.
    """
    logits, drafts = inputs["logits"], inputs["drafts"]
    T = drafts.shape[1]
    place = torch.arange(T + 1, device=drafts.device)

    def finish(accepted: Tensor, last: Tensor) -> Tensor:
        tokens = torch.cat([drafts, drafts[:, :1]], 1).masked_fill(place >= accepted[:, None], -1)
        return tokens.scatter(1, accepted[:, None], last[:, None])

    def greedy() -> Outputs:
        best = logits.argmax(-1)
        accepted = (best[:, :T] == drafts).long().cumprod(1).sum(1)
        return finish(accepted, best.gather(1, accepted[:, None])[:, 0]), accepted.int()

    def sampled() -> Outputs:
        p = (logits.float() / inputs["temperature"][:, None, None]).softmax(-1)
        p_draft = p[:, :T].gather(2, drafts[..., None])[..., 0]
        probs = inputs.get("draft_probs")
        q_draft = torch.ones_like(p_draft) if probs is None else probs.gather(2, drafts[..., None])[..., 0]
        accepted = (torch.rand_like(p_draft) * q_draft < p_draft).long().cumprod(1).sum(1)
        row = p.gather(1, accepted[:, None, None].expand(-1, 1, p.shape[2]))[:, 0]
        refused = accepted.clamp(max=T - 1)[:, None]
        if probs is None:
            left = row.scatter(1, drafts.gather(1, refused), 0.0)
        else:
            left = (row - probs.gather(1, refused[..., None].expand(-1, 1, p.shape[2]))[:, 0]).clamp(min=0)
        left = torch.where(accepted[:, None] < T, left, row)
        finish(accepted, torch.multinomial(left, 1)[:, 0])
        return None, None

    return sampled if "temperature" in inputs else greedy


def _transformers(inputs: Inputs) -> Callable[[], Outputs]:
    from transformers.generation import utils

    if "draft_probs" not in inputs or len(inputs["drafts"]) > 1:
        raise UnavailableError("verifies one request, with the drafter's logits")
    drafts, logits = inputs["drafts"], inputs["logits"] / inputs["temperature"]
    theirs = inputs["draft_probs"].log()

    def call() -> Outputs:
        utils._speculative_sampling(drafts, theirs, drafts.shape[1], logits)
        return None, None

    return call


def _flashinfer(inputs: Inputs) -> Callable[[], Outputs]:
    """It takes probabilities, so the softmax is part of its time."""
    import flashinfer

    if "draft_probs" not in inputs:
        raise UnavailableError("needs the drafter's probabilities")
    drafts = inputs["drafts"].int()

    def call() -> Outputs:
        target = (inputs["logits"].float() / inputs["temperature"][:, None, None]).softmax(-1)
        flashinfer.sampling.chain_speculative_sampling(inputs["draft_probs"], drafts, target)
        return None, None

    return call


def chain(model: Model, batch: int, drafts: int, *, sampled: bool = False, probs: bool = False) -> Case:
    """``probs``: the drafter's distribution is known; otherwise a draft is a point mass."""
    V, rows = model.vocab, drafts + 1

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        logits, best = _random(batch, rows, V, device, dtype, generator)
        inputs: Inputs = {"logits": logits, "drafts": _guesses(best[:, :drafts], V, generator)}
        inputs |= _sampling(batch, device) if sampled else {}
        if probs:
            noise = torch.randn(batch, drafts, V, device=device, generator=generator)
            inputs["draft_probs"] = (logits[:, :drafts].float() + 0.3 * noise).softmax(-1)
        return inputs

    mode = "greedy" if not sampled else "sampled, draft probabilities" if probs else "sampled"
    return Case(
        op="verify_draft",
        model=model.name,
        shape={"batch": batch, "drafts": drafts, "vocab": V, "mode": mode},
        make_inputs=make,
        run=lambda inputs: kvops.verify_draft(inputs["logits"], inputs["drafts"], **_keywords(inputs)),
        oracle=_chain_truth,
        flops=0,
        # One row of the drafter's distribution is needed for a residual; the logits are read once, and a row again.
        bytes=lambda size: batch * (rows * V * size + ((V * size if sampled else 0) + (4 * V if probs else 0))),
        peers=(
            Peer("plain torch", _plain),
            Peer("transformers", _transformers, "transformers"),
            Peer("FlashInfer", _flashinfer, "flashinfer-python"),
        ),
    )


def _packed_plain(inputs: Inputs) -> Callable[[], Outputs]:
    """Greedy: the argmax of each packed row, then one request after another on the host."""
    ends = inputs["ends"].tolist()

    def call() -> Outputs:
        best, drafts = inputs["logits"].argmax(-1).tolist(), inputs["drafts"].tolist()
        rows = []
        for b, (start, end) in enumerate(pairwise(ends)):
            own, wanted = drafts[start:end], best[start + b : end + b + 1]
            accepted = sum(1 for _ in takewhile(bool, map(int.__eq__, own, wanted)))
            rows.append(wanted[: accepted + 1])
        device = inputs["drafts"].device
        accepted = torch.tensor([len(row) - 1 for row in rows], dtype=torch.int32, device=device)
        return _padded(rows, inputs["longest"] + 1, inputs["drafts"]), accepted

    return call


def _packed_truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    return _packed_plain({**inputs, "logits": inputs["logits"].double()})()


def packed(model: Model, batch: int, longest: int) -> Case:
    """Greedy requests with 0 to ``longest`` drafts, packed without padding."""
    lens = [request * longest // max(1, batch - 1) for request in range(batch)]
    ends, V = [0, *accumulate(lens)], model.vocab

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        logits, best = _random(1, ends[-1] + batch, V, device, dtype, generator)
        drafted = [row for b, (start, end) in enumerate(pairwise(ends)) for row in range(start + b, end + b)]
        drafts = _guesses(best[0, drafted], V, generator).int()
        starts = torch.tensor(ends, dtype=torch.int32, device=device)
        return {"logits": logits[0], "drafts": drafts, "ends": starts, "longest": longest}

    return Case(
        op="verify_draft_varlen",
        model=model.name,
        shape={"batch": batch, "drafts": f"0 to {longest} packed", "vocab": V, "mode": "greedy"},
        make_inputs=make,
        run=lambda inputs: kvops.verify_draft_varlen(
            *(inputs[name] for name in ("logits", "drafts", "ends", "longest"))
        ),
        oracle=_packed_truth,
        flops=0,
        bytes=lambda size: (ends[-1] + batch) * V * size,
        peers=(Peer("torch + Python", _packed_plain),),
    )


def _tree_plain(inputs: Inputs) -> Callable[[], Outputs]:
    """Greedy: argmax on the device and a walk over the tree on the host, as in engines in Python."""
    if "temperature" in inputs:
        raise UnavailableError("greedy only")

    def call() -> Outputs:
        best, drafts, parents = (x.tolist() for x in (inputs["logits"].argmax(-1), inputs["drafts"], inputs["parents"]))
        paths, tokens = [], []
        for wanted, offered, above in zip(best, drafts, parents, strict=True):
            path = [0]
            for node in range(1, len(above)):
                if above[node] == path[-1] and offered[node] == wanted[path[-1]]:
                    path.append(node)
            paths.append(path)
            tokens.append([offered[node] for node in path[1:]] + [wanted[path[-1]]])
        N, device = len(best[0]), inputs["drafts"].device
        accepted = torch.tensor([len(path) - 1 for path in paths], dtype=torch.int32, device=device)
        return _padded(paths, N, inputs["parents"]), _padded(tokens, N, inputs["drafts"]), accepted

    return call


def _tree_multinomial(inputs: Inputs) -> Callable[[], Outputs]:
    """Sampled: the softmax of every node, then a walk of many small operations, with other random numbers."""
    if "temperature" not in inputs:
        raise UnavailableError("sampled only")

    def call() -> Outputs:
        p = (inputs["logits"].float() / inputs["temperature"][:, None, None]).softmax(-1)
        for row, offered, above in zip(p, inputs["drafts"].tolist(), inputs["parents"].tolist(), strict=True):
            at, left = 0, row[0].clone()
            for node in range(1, len(above)):
                if above[node] == at and float(torch.rand(())) < float(left[offered[node]] / left.sum()):
                    at, left = node, row[node].clone()
                elif above[node] == at:
                    left[offered[node]] = 0.0
            torch.multinomial(left, 1)
        return None, None, None

    return call


def tree(model: Model, batch: int, nodes: int, *, sampled: bool = False) -> Case:
    """A tree in which node n hangs below (n - 1) // 2, and the first child is most often right."""
    V = model.vocab
    parents = torch.tensor([-1] + [(node - 1) // 2 for node in range(1, nodes)], dtype=torch.int32)

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        logits, best = _random(batch, nodes, V, device, dtype, generator)
        drafts = _guesses(best[:, parents.clamp(min=0).to(device)], V, generator)
        # Siblings differ: the second one is not the most likely token.
        second = torch.arange(nodes, device=device) % 2 == 0
        drafts = torch.where(second, (drafts + 1) % V, drafts)
        inputs: Inputs = {"logits": logits, "drafts": drafts, "parents": parents.to(device).repeat(batch, 1)}
        return inputs | (_sampling(batch, device) if sampled else {})

    return Case(
        op="verify_tree",
        model=model.name,
        shape={"batch": batch, "nodes": nodes, "vocab": V, "mode": "sampled" if sampled else "greedy"},
        make_inputs=make,
        run=lambda inputs: kvops.verify_tree(
            inputs["logits"], inputs["drafts"], inputs["parents"], **_keywords(inputs)
        ),
        oracle=_tree_truth,
        flops=0,
        # Only the rows of a path are needed: at least the root's.
        bytes=lambda size: batch * V * size,
        peers=(Peer("torch + Python", _tree_plain), Peer("torch multinomial", _tree_multinomial)),
    )


def cases(scale: Scale) -> Iterator[Case]:
    llama, smollm = scale.model(LLAMA_8B), scale.model(SMOLLM)
    many = scale.batches[-1]
    yield chain(smollm, 1, 7)
    yield chain(llama, many, 7)
    yield chain(smollm, many, 7, sampled=True)
    yield chain(llama, many, 7, sampled=True)
    yield chain(llama, 1, 7, sampled=True, probs=True)
    yield chain(llama, many, 7, sampled=True, probs=True)
    for model, modes in ((MISTRAL_7B, _MODES[:1]), (LLAMA_8B, _MODES), (GEMMA_3, _MODES[:1])):
        model = scale.model(model)
        for batch in (*scale.batches, 4 * many):
            for drafts in (1, 4, 16):
                if batch * (drafts + 1) * model.vocab <= scale.max_logits:
                    yield from (chain(model, batch, drafts, **mode) for mode in modes)
    yield packed(smollm, many, 7)
    yield tree(smollm, many, 15)
    yield tree(llama, many, 31)
    yield tree(smollm, many, 15, sampled=True)
