"""Packed prompts of different lengths: forward, backward and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kvops
from bench import truth
from bench.case import LLAMA_8B, MISTRAL_7B, SMOLLM, Case, Inputs, Model, Outputs, Peer, Scale, UnavailableError
from bench.cases import dense

_WORKSPACE = 256 << 20


def _lengths(batch: int, longest: int) -> list[int]:
    """From the longest down to an eighth of it in even steps."""
    step = longest * 7 // (8 * max(1, batch - 1))
    return [longest - step * b for b in range(batch)]


def packed_lengths(inputs: Inputs) -> tuple[Any, ...]:
    """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"""
    longest = max(inputs["lengths"])
    return inputs["cu_seqlens"], inputs["cu_seqlens"], longest, longest


def _forward(inputs: Inputs) -> Outputs:
    qkv = (inputs[name] for name in ("q", "k", "v"))
    return kvops.flash_attention_varlen(*qkv, *packed_lengths(inputs), **dense.options(inputs))


def _backward(inputs: Inputs) -> Outputs:
    tensors = (inputs[name] for name in ("dout", "q", "k", "v", "out", "lse"))
    return kvops.flash_attention_varlen_backward(*tensors, *packed_lengths(inputs), **dense.options(inputs))[:3]


def _scores(inputs: Inputs) -> Outputs:
    tensors = (inputs[name] for name in ("q", "k", "lse"))
    return (kvops.attention_scores_varlen(*tensors, *packed_lengths(inputs), **dense.options(inputs)),)


def _sequences(inputs: Inputs) -> list[slice]:
    ends = torch.tensor(inputs["lengths"]).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, inputs["lengths"], strict=True)]


def _compared(inputs: Inputs) -> list[tuple[slice, int]]:
    """(tokens, KV head): the first head of the first sequence and the last head of the last one."""
    sequences, kv_heads = _sequences(inputs), inputs["k"].shape[1]
    return [(sequences[0], 0), (sequences[-1], kv_heads - 1)]


def _sample_rows(inputs: Inputs, outputs: Outputs) -> Outputs:
    """Of tensors [tokens, heads, D]: flat, as the sequences differ in length."""
    kv_heads = inputs["k"].shape[1]
    return tuple(
        None
        if x is None
        else torch.cat([dense.of_group(x[tokens], h, kv_heads, 1).flatten() for tokens, h in _compared(inputs)])
        for x in outputs
    )


def _sample_forward(inputs: Inputs, outputs: Outputs) -> Outputs:
    out, lse = (*outputs, None)[:2]
    return _sample_rows(inputs, (out, None if lse is None else lse.mT))


def _sample_scores(inputs: Inputs, outputs: Outputs) -> Outputs:
    return _sample_rows(inputs, tuple(None if x is None else x.mT for x in outputs))


def _truth(names: tuple[str, ...]) -> Callable[[Inputs, torch.dtype], Outputs]:
    """Flat, in the order of the samples."""

    def oracle(inputs: Inputs, dtype: torch.dtype) -> Outputs:
        kv_heads, parts = inputs["k"].shape[1], []
        for tokens, h in _compared(inputs):
            rows = {
                name: dense.of_group(inputs[name][tokens], h, kv_heads, 1) for name in ("q", "dout") if name in inputs
            }
            k, v = inputs["k"][tokens, h], inputs["v"][tokens, h]
            options = {"causal": True, "window": inputs["window"], "softcap": inputs["softcap"]}
            part = truth.attention(
                rows["q"], k, v, dtype, dout=rows.get("dout"), score_from=0 if "scores" in names else None, **options
            )
            parts.append(part | {"lse": part["lse"].mT})
        return tuple(torch.cat([part[name].flatten() for part in parts]) for name in names)

    return oracle


def _padded(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Pad, attend causally with SDPA, remove the padding. Causal rows never see later padding."""
    lengths, longest = inputs["lengths"], max(inputs["lengths"])
    filled = (
        torch.arange(longest, device=inputs["q"].device) < torch.tensor(lengths, device=inputs["q"].device)[:, None]
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dense_q, dense_k, dense_v = (
            torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)
        )
        return F.scaled_dot_product_attention(dense_q, dense_k, dense_v, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )[filled]

    return attend


def _one_by_one(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    lengths = inputs["lengths"]
    masks: list[Tensor | None] = [None] * len(lengths)
    if inputs["window"] >= 0:
        rows = [torch.arange(n, device=inputs["q"].device) for n in lengths]
        masks = [truth.visible(row, len(row), len(row), True, inputs["window"]) for row in rows]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for mask, *part in zip(masks, q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            sequence = (x[None].transpose(1, 2) for x in part)
            out = F.scaled_dot_product_attention(*sequence, mask, is_causal=mask is None, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    return attend


def _flash_attn(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn import flash_attn_varlen_func

    window = (inputs["window"], 0 if inputs["window"] >= 0 else -1)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, *packed_lengths(inputs), causal=True, window_size=window)


def _xformers(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from xformers.ops import fmha, memory_efficient_attention

    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(inputs["lengths"])
    if inputs["window"] >= 0:
        bias = bias.make_local_attention(inputs["window"] + 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (x[None, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
        return memory_efficient_attention(q[None].unflatten(2, (-1, group)), k, v, attn_bias=bias)[0].flatten(1, 2)

    return attend


def _flashinfer(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    import flashinfer

    q, k, starts = inputs["q"], inputs["k"], inputs["cu_seqlens"]
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    options = {"causal": True, "window_left": inputs["window"], "q_data_type": q.dtype}
    wrapper.plan(starts, starts, q.shape[1], k.shape[1], q.shape[2], **options)
    return wrapper.run


# Name, package, whether it has a backward, whether it has a window, and how it is prepared.
_PEERS = (
    ("SDPA, padded", "torch", True, False, _padded),
    ("SDPA, one by one", "torch", True, True, _one_by_one),
    ("flash-attn 2", "flash-attn", True, True, _flash_attn),
    ("xformers", "xformers", True, True, _xformers),
    ("FlashInfer", "flashinfer-python", False, True, _flashinfer),
)


def _peers(backward: bool) -> tuple[Peer, ...]:
    def ready(prepare: Any, windowed: bool) -> Callable[[Inputs], Callable[[], Outputs]]:
        def prepared(inputs: Inputs) -> Callable[[], Outputs]:
            if inputs["window"] >= 0 and not windowed:
                raise UnavailableError("has no window")
            attend = prepare(inputs)
            if not backward:
                return lambda: (attend(inputs["q"], inputs["k"], inputs["v"]),)
            leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
            out = attend(*leaves)
            return lambda: torch.autograd.grad(out, leaves, inputs["dout"], retain_graph=True)

        return prepared

    return tuple(
        Peer(name, ready(prepare, windowed), package)
        for name, package, trains, windowed, prepare in _PEERS
        if trains or not backward
    )


def _scores_one_by_one(inputs: Inputs) -> Callable[[], Outputs]:
    """The whole matrix of one sequence after another."""
    q, k = inputs["q"], inputs["k"]
    group = q.shape[1] // k.shape[1]

    def call() -> Outputs:
        outputs = []
        for tokens in _sequences(inputs):
            rows, keys = q[tokens].unflatten(1, (-1, group)), k[tokens]
            s = torch.einsum("qhgd,khd->hgqk", rows, keys).float() * q.shape[2] ** -0.5
            position = torch.arange(len(keys), device=q.device)
            seen = truth.visible(position, len(keys), len(keys), True, inputs["window"])
            outputs.append(s.masked_fill(~seen, float("-inf")).softmax(-1).sum((1, 2)))
        return (torch.cat(outputs, 1),)

    return call


def packed(op: str, model: Model, batch: int, longest: int) -> Case:
    """``op``: flash_attention_varlen, flash_attention_varlen_backward or attention_scores_varlen."""
    lengths = _lengths(batch, longest)
    tokens, D = sum(lengths), model.head_dim
    seen = model.heads * sum(truth.pairs(n, n, True, model.window) for n in lengths)
    rows, keys = tokens * model.heads, tokens * model.kv_heads
    backward = op == "flash_attention_varlen_backward"
    scored = op == "attention_scores_varlen"

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def random(heads: int) -> Tensor:
            return torch.randn(tokens, heads, D, device=device, generator=generator).to(dtype)

        inputs: Inputs = {"q": random(model.heads), "k": random(model.kv_heads), "v": random(model.kv_heads)}
        starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
        inputs |= {"lengths": lengths, "cu_seqlens": starts}
        inputs |= {"causal": True, "window": model.window, "softcap": model.softcap}
        if backward or scored:
            inputs["out"], inputs["lse"] = _forward(inputs)
        if backward:
            inputs["dout"] = random(model.heads)
        return inputs

    shape = {"batch": batch, "longest": longest, "packed": tokens}
    shape |= {"window": model.window} if model.window >= 0 else {}
    common: dict[str, Any] = {"op": op, "model": model.name, "shape": shape, "make_inputs": make}
    if scored:
        return Case(
            **common,
            run=_scores,
            oracle=_truth(("scores",)),
            sample=_sample_scores,
            flops=2 * seen * D,
            bytes=lambda size: (rows + keys) * D * size + 4 * (rows + keys),
            peers=(Peer("plain torch, one by one", _scores_one_by_one),),
        )
    if backward:
        return Case(
            **common,
            run=_backward,
            oracle=_truth(("dq", "dk", "dv")),
            sample=_sample_rows,
            flops=10 * seen * D,
            bytes=lambda size: 4 * (rows + keys) * D * size + 4 * rows,
            peers=_peers(backward=True),
        )
    return Case(
        **common,
        run=_forward,
        oracle=_truth(("out", "lse")),
        sample=_sample_forward,
        flops=4 * seen * D,
        bytes=lambda size: 2 * (rows + keys) * D * size + 4 * rows,
        peers=_peers(backward=False),
    )


def _bias_backward(inputs: Inputs) -> Outputs:
    tensors = (inputs[name] for name in ("dout", "q", "k", "v", "out", "lse", "bias"))
    return (kvops.flash_attention_varlen_bias_backward(*tensors, *packed_lengths(inputs), causal=True),)


def _bias_truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    kv_heads, parts = inputs["k"].shape[1], []
    for tokens, h in _compared(inputs):
        q, dout = (dense.of_group(inputs[name][tokens], h, kv_heads, 1) for name in ("q", "dout"))
        k, v = inputs["k"][tokens, h], inputs["v"][tokens, h]
        bias = dense.of_group(inputs["bias"], h, kv_heads, 0)[:, tokens, : len(k)]
        parts.append(truth.attention(q, k, v, dtype, causal=True, bias=bias, dout=dout)["dbias"].flatten())
    return (torch.cat(parts),)


def _sample_bias(inputs: Inputs, outputs: Outputs) -> Outputs:
    """Flat, without the columns past the end of a sequence."""
    kv_heads, dbias = inputs["k"].shape[1], outputs[0]
    rows = [
        dense.of_group(dbias, h, kv_heads, 0)[:, tokens, : tokens.stop - tokens.start].flatten()
        for tokens, h in _compared(inputs)
    ]
    return (torch.cat(rows),)


def _bias_one_by_one(inputs: Inputs) -> Callable[[], Outputs]:
    """Forward again, as the operator has only lse, and autograd's way back to the bias."""
    names = ("q", "k", "v", "dout")

    def call() -> Outputs:
        bias = inputs["bias"].detach().requires_grad_()
        gradient = torch.zeros_like(bias)
        for tokens in _sequences(inputs):
            q, k, v, dout = (inputs[name][tokens].transpose(0, 1) for name in names)
            group = len(q) // len(k)
            s = q @ k.repeat_interleave(group, 0).mT * q.shape[2] ** -0.5 + bias[:, tokens, : k.shape[1]]
            position = torch.arange(k.shape[1], device=q.device)
            seen = truth.visible(position, len(position), len(position), True, -1)
            out = s.masked_fill(~seen, float("-inf")).softmax(-1) @ v.repeat_interleave(group, 0)
            gradient += torch.autograd.grad(out, bias, dout)[0]
        return (gradient,)

    return call


def bias_backward(model: Model, batch: int, longest: int) -> Case:
    """The gradient of a bias [heads, tokens, longest]."""
    plain = packed("flash_attention_varlen_backward", model, batch, longest)
    lengths, D = _lengths(batch, longest), model.head_dim
    tokens = sum(lengths)
    seen = model.heads * sum(truth.pairs(n, n, True, -1) for n in lengths)

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = plain.make_inputs(device, dtype, generator)
        bias = torch.randn(model.heads, tokens, longest, device=device, generator=generator).to(dtype)
        inputs["bias"] = bias
        qkv = (inputs[name] for name in ("q", "k", "v"))
        inputs["out"], inputs["lse"] = kvops.flash_attention_varlen(
            *qkv, *packed_lengths(inputs), causal=True, bias=bias
        )
        return inputs

    added, rows = model.heads * sum(n * n for n in lengths), tokens * model.heads
    return Case(
        op="flash_attention_varlen_bias_backward",
        model=model.name,
        shape=plain.shape,
        make_inputs=make,
        run=_bias_backward,
        oracle=_bias_truth,
        sample=_sample_bias,
        flops=4 * seen * D,
        bytes=lambda size: (3 * rows * D + 2 * tokens * model.kv_heads * D + 2 * added) * size + 4 * rows,
        peers=(Peer("plain torch, one by one", _bias_one_by_one),),
    )


def cases(scale: Scale) -> Iterator[Case]:
    longest = scale.prompts[len(scale.prompts) // 2]
    for model, batch in ((LLAMA_8B, 2), (LLAMA_8B, 8), (MISTRAL_7B, 4), (SMOLLM, 8)):
        yield packed("flash_attention_varlen", scale.model(model), batch, longest)
    for model in (LLAMA_8B, SMOLLM):
        yield packed("flash_attention_varlen_backward", scale.model(model), 4, longest)
    yield bias_backward(scale.model(SMOLLM), 4, longest)
    for model in (LLAMA_8B, SMOLLM):
        yield packed("attention_scores_varlen", scale.model(model), 4, longest)
