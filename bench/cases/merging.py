"""The exact union of two attentions: over a shared prefix and over a sequence's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import kvops
from bench.case import LLAMA_8B, SMOLLM, Case, Inputs, Model, Outputs, Peer, Scale

_PARTS = ("out_a", "lse_a", "out_b", "lse_b")


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """By the definition; outs [B, S, H, D], lses [B, H, S]. A row that is empty in both parts becomes NaN."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((part - lse).exp().mT[..., None] for part in (lse_a, lse_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def _flashinfer(inputs: Inputs) -> Callable[[], Outputs]:
    """Its lse is a logarithm to base 2 in [tokens, heads]."""
    import flashinfer

    a, b = (inputs[name].flatten(0, 1) for name in ("out_a", "out_b"))
    lse_a, lse_b = (
        (inputs[name] * 1.4426950408889634).transpose(1, 2).flatten(0, 1).contiguous() for name in ("lse_a", "lse_b")
    )
    return lambda: (flashinfer.merge_state(a, lse_a, b, lse_b)[0].view(inputs["out_a"].shape),)


def _gradient(inputs: Inputs) -> Callable[[], Outputs]:
    leaves = [inputs[name].detach().requires_grad_() for name in _PARTS]
    out, lse = _merge(*leaves)
    return lambda: torch.autograd.grad((out, lse), leaves, (inputs["dout"], inputs["dlse"]), retain_graph=True)


def _truth_backward(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    wide = {name: inputs[name].to(dtype) for name in ("out_a", "out_b", "dout")}
    wide |= {name: inputs[name].to(torch.promote_types(dtype, torch.float32)) for name in ("lse_a", "lse_b", "dlse")}
    with torch.enable_grad():
        return _gradient(wide)()


def _truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    work = torch.promote_types(dtype, torch.float32)
    return _merge(*(inputs[name].to(dtype if name.startswith("out") else work) for name in _PARTS))


def merge(model: Model, batch: int, tokens: int, *, backward: bool = False) -> Case:
    rows, D = batch * tokens * model.heads, model.head_dim

    def make(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=generator)

        inputs: Inputs = {}
        for name in ("out_a", "out_b", "dout") if backward else ("out_a", "out_b"):
            inputs[name] = random(batch, tokens, model.heads, D).to(dtype)
        for name in ("lse_a", "lse_b", "dlse") if backward else ("lse_a", "lse_b"):
            inputs[name] = random(batch, model.heads, tokens)
        return inputs

    if backward:
        return Case(
            op="merge_attention_backward",
            model=model.name,
            shape={"batch": batch, "tokens": tokens},
            make_inputs=make,
            run=lambda inputs: kvops.merge_attention_backward(
                inputs["dout"], *(inputs[name] for name in _PARTS), dlse=inputs["dlse"]
            ),
            oracle=_truth_backward,
            flops=0,
            bytes=lambda size: rows * (5 * D * size + 5 * 4),
            peers=(Peer("plain torch", _gradient),),
        )
    return Case(
        op="merge_attention",
        model=model.name,
        shape={"batch": batch, "tokens": tokens},
        make_inputs=make,
        run=lambda inputs: kvops.merge_attention(*(inputs[name] for name in _PARTS)),
        oracle=_truth,
        flops=0,
        bytes=lambda size: rows * (3 * D * size + 3 * 4),
        peers=(
            Peer("plain torch", lambda inputs: lambda: _merge(*(inputs[name] for name in _PARTS))),
            Peer("FlashInfer", _flashinfer, "flashinfer-python"),
        ),
    )


def cases(scale: Scale) -> Iterator[Case]:
    llama, smollm = scale.model(LLAMA_8B), scale.model(SMOLLM)
    yield merge(llama, scale.batches[-1], 1)
    yield merge(llama, 1, scale.prompts[-1])
    yield merge(smollm, 1, scale.prompts[-1])
    yield merge(llama, 1, scale.prompts[-1], backward=True)
    yield merge(smollm, 1, scale.prompts[-1], backward=True)
