"""Scores of a prompt's keys, by which eviction ranks them: all queries (H2O, KV-Compress) or the last ones (SnapKV)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import kvops
from bench import truth
from bench.case import (
    LLAMA_8B,
    MISTRAL_7B,
    QWEN_7B,
    SMOLLM,
    Case,
    Inputs,
    Model,
    Outputs,
    Peer,
    Scale,
    UnavailableError,
)
from bench.cases import dense

_LARGEST_MATRIX = 1 << 31


def _options(inputs: Inputs) -> dict[str, object]:
    return dense.options(inputs) | {"query_start": inputs["query_start"], "reduce": inputs["reduce"]}


def _run(inputs: Inputs) -> Outputs:
    return (kvops.attention_scores(inputs["q"], inputs["k"], inputs["lse"], **_options(inputs)),)


def _truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    start = inputs["query_start"]
    start = start + inputs["q"].shape[1] if start < 0 else start
    parts = []
    for b, h in dense.heads(inputs):
        q, k = dense.of_group(inputs["q"][b], h, inputs["k"].shape[2], 1), inputs["k"][b, :, h]
        options = {"causal": True, "window": inputs["window"], "softcap": inputs["softcap"]}
        parts.append(truth.attention(q, k, k, dtype, score_from=start, score_reduce=inputs["reduce"], **options))
    return (torch.stack([part["scores"] for part in parts]),)


def _matrix(inputs: Inputs) -> Callable[[], Outputs]:
    """The rows of the matrix that count, in memory."""
    q, k = inputs["q"], inputs["k"]
    group = q.shape[2] // k.shape[2]
    start = inputs["query_start"]
    seen = dense.peers.window_mask(inputs)[start:]
    elements = q.shape[0] * q.shape[2] * seen.numel()
    if elements > _LARGEST_MATRIX:
        raise UnavailableError(f"its matrix would have {elements:.1e} elements")

    def call() -> Outputs:
        rows = q[:, start:].unflatten(2, (-1, group))
        s = torch.einsum("bqhgd,bkhd->bhgqk", rows, k).float() * q.shape[-1] ** -0.5
        p = s.masked_fill(~seen, float("-inf")).softmax(-1)
        if inputs["reduce"] == "sumsq":
            p = p * p
        return (p.sum((2, 3)),)

    return call


def scores(model: Model, batch: int, tokens: int, *, last: int = 0, reduce: str = "sum") -> Case:
    """``last``: the number of last queries that count; 0 for all."""
    first = tokens - last if last else 0
    seen = truth.pairs(tokens, tokens, True, model.window) - (
        truth.pairs(first, first, True, model.window) if first else 0
    )
    rows, keys = batch * (tokens - first) * model.heads, batch * tokens * model.kv_heads
    make_dense = dense.make_inputs(model, batch, tokens, causal=True)

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = make_dense(device, dtype, generator) | {"query_start": -last if last else 0, "reduce": reduce}
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        inputs["lse"] = q.new_full((batch, model.heads, tokens), float("nan"), dtype=torch.float32)
        inputs["lse"][:, :, first:] = kvops.flash_attention(q[:, first:], k, v, **dense.options(inputs))[1]
        return inputs

    return Case(
        op="attention_scores",
        model=model.name,
        shape=dense.shape(model, batch, tokens, True)
        | {"queries": f"last {last} queries" if last else "all queries", "by": f"by {reduce}"},
        make_inputs=make,
        run=_run,
        oracle=_truth,
        sample=lambda inputs, outputs: tuple(
            None if x is None else torch.stack([x[place] for place in dense.heads(inputs)]) for x in outputs
        ),
        flops=2 * batch * model.heads * seen * model.head_dim,
        bytes=lambda size: (rows + keys) * model.head_dim * size + 4 * (rows + keys),
        peers=(Peer("plain torch", _matrix),),
    )


def cases(scale: Scale) -> Iterator[Case]:
    llama, longest = scale.model(LLAMA_8B), scale.prompts[-1]
    last = min(32, longest // 4)
    for tokens in scale.prompts:
        yield scores(llama, 1, tokens)
        yield scores(llama, 1, tokens, last=last)
    yield scores(scale.model(SMOLLM), 1, longest, reduce="sumsq")
    yield scores(scale.model(QWEN_7B), 1, longest, last=last)
    yield scores(scale.model(MISTRAL_7B), 1, longest)
