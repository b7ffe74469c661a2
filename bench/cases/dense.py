"""Dense attention: prompts of real models, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import kvops
from bench import peers, truth
from bench.case import (
    BLOOM,
    GEMMA,
    LLAMA_8B,
    LLAMA_70B,
    MISTRAL_7B,
    QWEN_7B,
    SMOLLM,
    STARCODER,
    T5,
    Case,
    Inputs,
    Model,
    Outputs,
    Scale,
)

# (batch, KV head) pairs that are compared with float64.
_SAMPLED_HEADS = 2
# Tokens of a short prompt, for which checks and dispatch take a visible share of the time.
_SHORT = 128


def heads(inputs: Inputs) -> list[tuple[int, int]]:
    """The (batch, KV head) pairs that are compared: the first and the last."""
    batch, kv_heads = inputs["q"].shape[0], inputs["k"].shape[2]
    return sorted({(0, 0), (batch - 1, kv_heads - 1)})[:_SAMPLED_HEADS]


def of_group(x: Tensor, head: int, kv_heads: int, dim: int) -> Tensor:
    """The query heads that read one KV head."""
    group = x.shape[dim] // kv_heads
    return x.narrow(dim, head * group, group)


def options(inputs: Inputs) -> dict[str, object]:
    chosen: dict[str, object] = {"causal": inputs["causal"], "window_left": inputs["window"]}
    chosen["softcap"] = inputs["softcap"]
    names = {"bias": "bias", "slopes": "alibi_slopes", "dropout": "dropout_p", "seed": "dropout_seed"}
    return chosen | {option: inputs[name] for name, option in names.items() if name in inputs}


def make_inputs(
    model: Model,
    batch: int,
    tokens: int,
    causal: bool,
    *,
    backward: bool = False,
    biased: bool = False,
    alibi: bool = False,
    dropout: float = 0.0,
) -> Callable[[torch.device, torch.dtype, torch.Generator], Inputs]:
    """Random q, k and v, with ``biased`` a bias, with ``alibi`` slopes, with ``dropout`` its share and a seed, and with
    ``backward`` dout and the results of the forward."""

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def random(heads: int) -> Tensor:
            shape = (batch, tokens, heads, model.head_dim)
            return torch.randn(shape, device=device, generator=generator).to(dtype)

        inputs: Inputs = {"q": random(model.heads), "k": random(model.kv_heads), "v": random(model.kv_heads)}
        inputs |= {"causal": causal, "window": model.window, "softcap": model.softcap}
        if biased:
            shape = (1, model.heads, tokens, tokens)
            inputs["bias"] = torch.randn(shape, device=device, generator=generator).to(dtype)
        if alibi:
            inputs["slopes"] = 2.0 ** (-8 * (torch.arange(model.heads, device=device) + 1) / model.heads)
        if dropout:
            inputs |= {"dropout": dropout, "seed": torch.tensor([1], device=device)}
        if backward:
            inputs["dout"] = random(model.heads)
            inputs["out"], inputs["lse"] = _forward(inputs)
        return inputs

    return make


def _forward(inputs: Inputs) -> Outputs:
    return kvops.flash_attention(inputs["q"], inputs["k"], inputs["v"], **options(inputs))


def _backward(inputs: Inputs) -> Outputs:
    names = ("dout", "q", "k", "v", "out", "lse")
    return kvops.flash_attention_backward(*(inputs[name] for name in names), **options(inputs))[:3]


def _bias_backward(inputs: Inputs) -> Outputs:
    names = ("dout", "q", "k", "v", "out", "lse", "bias")
    masks = {name: value for name, value in options(inputs).items() if name != "bias"}
    return (kvops.flash_attention_bias_backward(*(inputs[name] for name in names), **masks),)


def _sample_forward(inputs: Inputs, outputs: Outputs) -> Outputs:
    kv_heads = inputs["k"].shape[2]
    dims = (1, 0)  # of the heads, once the batch is gone
    return tuple(
        None if x is None else torch.stack([of_group(x[b], h, kv_heads, dim) for b, h in heads(inputs)])
        for x, dim in zip(outputs, dims, strict=False)
    )


def _sample_backward(inputs: Inputs, outputs: Outputs) -> Outputs:
    kv_heads = inputs["k"].shape[2]
    return tuple(
        None if x is None else torch.stack([of_group(x[b], h, kv_heads, 1) for b, h in heads(inputs)]) for x in outputs
    )


def _sample_bias(inputs: Inputs, outputs: Outputs) -> Outputs:
    kv_heads = inputs["k"].shape[2]
    return (torch.stack([of_group(outputs[0][0], h, kv_heads, 0) for _, h in heads(inputs)]),)


def _truth(inputs: Inputs, dtype: torch.dtype, names: tuple[str, ...]) -> Outputs:
    parts = []
    for b, h in heads(inputs):
        q, dout = (
            None if x is None else of_group(x[b], h, inputs["k"].shape[2], 1) for x in (inputs["q"], inputs.get("dout"))
        )
        k, v = inputs["k"][b, :, h], inputs["v"][b, :, h]
        matrix = peers.added({**inputs, "q": inputs["q"].double()} if "slopes" in inputs else inputs)
        bias = None if matrix is None else of_group(matrix[0], h, inputs["k"].shape[2], 0)
        chosen = {"causal": inputs["causal"], "window": inputs["window"], "softcap": inputs["softcap"]}
        parts.append(truth.attention(q, k, v, dtype, bias=bias, dout=dout, **chosen))
    return tuple(torch.stack([part[name] for part in parts]) for name in names)


def _truth_backward(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    dq, dk, dv = _truth(inputs, dtype, ("dq", "dk", "dv"))
    return dq, dk[:, :, None], dv[:, :, None]


def forward(
    model: Model, batch: int, tokens: int, *, causal: bool = True, biased: bool = False, alibi: bool = False
) -> Case:
    rows, keys = batch * tokens * model.heads, batch * tokens * model.kv_heads
    seen = batch * model.heads * truth.pairs(tokens, tokens, causal, model.window)
    added = model.heads * tokens * tokens if biased else 0
    slopes = model.heads if alibi else 0
    return Case(
        op="flash_attention",
        model=model.name,
        shape=shape(model, batch, tokens, causal)
        | ({"bias": "ALiBi" if alibi else "heads"} if biased or alibi else {}),
        make_inputs=make_inputs(model, batch, tokens, causal, biased=biased, alibi=alibi),
        run=_forward,
        oracle=lambda inputs, dtype: _truth(inputs, dtype, ("out", "lse")),
        sample=_sample_forward,
        flops=4 * seen * model.head_dim,
        bytes=lambda size: 2 * (rows + keys) * model.head_dim * size + 4 * (rows + slopes) + added * size,
        peers=peers.dense(),
    )


def dropped(model: Model, tokens: int) -> Case:
    """Dropout of a tenth. Everybody drops other probabilities, so that only lse is compared: tests compare the rest."""
    plain = forward(model, 1, tokens)
    return replace(
        plain,
        shape=plain.shape | {"dropout": "dropout 0.1"},
        make_inputs=make_inputs(model, 1, tokens, True, dropout=0.1),
        sample=lambda inputs, outputs: (None, *_sample_forward(inputs, outputs)[1:]),
        peers=peers.dropping(),
    )


def backward(model: Model, batch: int, tokens: int, *, causal: bool = True) -> Case:
    """Five products in place of two: 2.5 times the operations of the forward."""
    rows, keys = batch * tokens * model.heads, batch * tokens * model.kv_heads
    seen = batch * model.heads * truth.pairs(tokens, tokens, causal, model.window)
    return Case(
        op="flash_attention_backward",
        model=model.name,
        shape=shape(model, batch, tokens, causal),
        make_inputs=make_inputs(model, batch, tokens, causal, backward=True),
        run=_backward,
        oracle=_truth_backward,
        sample=_sample_backward,
        flops=10 * seen * model.head_dim,
        bytes=lambda size: 4 * (rows + keys) * model.head_dim * size + 4 * rows,
        peers=peers.dense_backward(),
    )


def bias_backward(model: Model, tokens: int) -> Case:
    """The gradient of a bias [1, heads, tokens, tokens], which two of the five products of a backward pass give."""
    elements, added = tokens * model.heads * model.head_dim, model.heads * tokens * tokens
    return Case(
        op="flash_attention_bias_backward",
        model=model.name,
        shape=shape(model, 1, tokens, False) | {"bias": "heads"},
        make_inputs=make_inputs(model, 1, tokens, False, backward=True, biased=True),
        run=_bias_backward,
        oracle=lambda inputs, dtype: _truth(inputs, dtype, ("dbias",)),
        sample=_sample_bias,
        flops=4 * added * model.head_dim,
        bytes=lambda size: (3 * elements + 2 * tokens * model.kv_heads * model.head_dim + 2 * added) * size,
        peers=peers.bias_backward(),
    )


def shape(model: Model, batch: int, tokens: int, causal: bool) -> dict[str, int | str]:
    facts: dict[str, int | str] = {"batch": batch, "tokens": tokens, "mask": "causal" if causal else "full"}
    return facts | ({"window": model.window} if model.window >= 0 else {})


def cases(scale: Scale) -> Iterator[Case]:
    for tokens in scale.prompts:
        yield forward(scale.model(LLAMA_8B), max(1, scale.prompts[-1] // tokens), tokens)
    longest = scale.prompts[-1]
    for model in (LLAMA_70B, MISTRAL_7B, QWEN_7B, SMOLLM, GEMMA, STARCODER):
        yield forward(scale.model(model), 1, longest)
    yield forward(scale.model(SMOLLM), 1, longest, causal=False)
    yield forward(scale.model(T5), 1, scale.prompts[len(scale.prompts) // 2], causal=False, biased=True)
    yield forward(scale.model(BLOOM), 1, scale.prompts[len(scale.prompts) // 2], alibi=True)
    yield dropped(scale.model(LLAMA_8B), scale.prompts[len(scale.prompts) // 2])
    if scale.prompts[0] > _SHORT:
        yield forward(scale.model(SMOLLM), 1, _SHORT)
    for model in (LLAMA_8B, MISTRAL_7B, QWEN_7B, SMOLLM, GEMMA):
        yield backward(scale.model(model), 1, scale.prompts[len(scale.prompts) // 2])
    yield backward(scale.model(SMOLLM), 1, longest, causal=False)
    yield bias_backward(scale.model(T5), scale.prompts[len(scale.prompts) // 2])
