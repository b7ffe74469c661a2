"""The peers of dense and packed attention, behind one call each. A peer that is not installed fails when prepared."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.case import Inputs, Outputs, Peer, UnavailableError
from bench.truth import visible

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, Sq, Hq, D], k and v [B, Sk, Hkv, D] -> out [B, Sq, Hq, D]"""

# A matrix of scores larger than this says no more about the peer than about the memory.
_LARGEST_MATRIX = 1 << 31
_FLASHINFER_WORKSPACE = 256 << 20


def window_mask(inputs: Inputs) -> Tensor:
    """bool [Sq, Sk] of a dense case."""
    q, k = inputs["q"], inputs["k"]
    rows = torch.arange(q.shape[1], device=q.device)
    return visible(rows, q.shape[1], k.shape[1], inputs["causal"], inputs["window"])


def _refuse_softcap(inputs: Inputs) -> None:
    if inputs["softcap"]:
        raise UnavailableError("has no softcap")


def _refuse_bias(inputs: Inputs) -> None:
    if "bias" in inputs:
        raise UnavailableError("has no bias")


def _refuse_slopes(inputs: Inputs) -> None:
    if "slopes" in inputs:
        raise UnavailableError("its ALiBi was left out")


def added(inputs: Inputs) -> Tensor | None:
    """What is added to the scores, [1, heads, Sq, Sk]: the bias, or ALiBi as a matrix; None for neither."""
    if "slopes" not in inputs:
        return inputs.get("bias")
    slopes, keys = inputs["slopes"], torch.arange(inputs["k"].shape[1], device=inputs["k"].device)
    return (-slopes[:, None, None] * (keys[:, None] - keys).abs())[None].to(inputs["q"].dtype)


def _require_gpu(inputs: Inputs) -> None:
    if not inputs["q"].is_cuda:
        raise UnavailableError("left out on a CPU")


def _sdpa(backend: SDPBackend, *, repeated: bool = False) -> Callable[[Inputs], Attend]:
    """Its own causal mask where that is all there is; a window, a bias or ALiBi is given as a mask."""

    def prepare(inputs: Inputs) -> Attend:
        _refuse_softcap(inputs)
        if backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION) and not inputs["q"].is_cuda:
            raise UnavailableError("GPU only")
        mask = window_mask(inputs) if inputs["window"] >= 0 else added(inputs)
        if "slopes" in inputs:
            mask = mask.masked_fill(~window_mask(inputs), float("-inf"))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if repeated:
                k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=inputs["causal"] and mask is None, enable_gqa=q.shape[1] != k.shape[1]
                ).transpose(1, 2)

        return attend

    return prepare


def _plain(inputs: Inputs) -> Attend:
    """The textbook: the whole matrix in memory."""
    q, k = inputs["q"], inputs["k"]
    elements = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    if elements > _LARGEST_MATRIX:
        raise UnavailableError(f"its matrix would have {elements:.1e} elements")
    hidden = ~window_mask(inputs)
    softcap, bias = inputs["softcap"], added(inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        s = softcap * torch.tanh(s / softcap) if softcap else s
        s = s if bias is None else s + bias
        p = s.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", p, v)

    return attend


def _flex(inputs: Inputs) -> Attend:
    _require_gpu(inputs)
    _refuse_slopes(inputs)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # a shape is a graph of its own, and there is a limit of recompilations
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k = inputs["q"], inputs["k"]
    causal, window, softcap, bias = inputs["causal"], inputs["window"], inputs["softcap"], inputs.get("bias")
    offset = k.shape[1] - q.shape[1]

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query + offset
        return seen & (key >= query + offset - window) if window >= 0 else seen

    def cap(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    def add(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[0, h, query, key]  # type: ignore[index]

    mask = create_block_mask(sees, None, None, q.shape[1], k.shape[1], device=str(q.device)) if causal else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        score_mod = cap if softcap else add if bias is not None else None
        return compiled(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def _flash_attn(module: str) -> Callable[[Inputs], Attend]:
    def prepare(inputs: Inputs) -> Attend:
        _refuse_bias(inputs)
        function = importlib.import_module(module).flash_attn_func
        options: dict[str, Any] = {"causal": inputs["causal"]}
        if inputs["window"] >= 0:
            options["window_size"] = (inputs["window"], 0 if inputs["causal"] else None)
        if inputs["softcap"]:
            options["softcap"] = inputs["softcap"]
        if "slopes" in inputs:
            options["alibi_slopes"] = inputs["slopes"]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = function(q, k, v, **options)
            return result[0] if isinstance(result, tuple) else result

        return attend

    return prepare


def _xformers(inputs: Inputs) -> Attend:
    from xformers.ops import fmha, memory_efficient_attention

    _refuse_softcap(inputs)
    _refuse_bias(inputs)  # but for one whose rows are padded to 8 keys
    _refuse_slopes(inputs)
    bias = None
    if inputs["window"] >= 0:
        bias = fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=inputs["window"], window_right=0)
    elif inputs["causal"]:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[2] // k.shape[2]
        grouped = q.unflatten(2, (k.shape[2], group))
        k, v = (x[:, :, :, None].expand(-1, -1, -1, group, -1) for x in (k, v))
        return memory_efficient_attention(grouped, k, v, attn_bias=bias).flatten(2, 3)

    return attend


def _flashinfer(inputs: Inputs) -> Attend:
    import flashinfer

    _refuse_bias(inputs)
    _refuse_slopes(inputs)
    q, k = inputs["q"], inputs["k"]
    B, Sq, Hq, D = q.shape
    starts = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        starts * Sq,
        starts * k.shape[1],
        Hq,
        k.shape[2],
        D,
        causal=inputs["causal"],
        window_left=inputs["window"],
        logits_soft_cap=inputs["softcap"] or None,
        q_data_type=q.dtype,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return wrapper.run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (B, Sq))

    return attend


# Name, package, whether it has a backward, and how it is prepared.
_DENSE: tuple[tuple[str, str, bool, Callable[[Inputs], Attend]], ...] = (
    ("SDPA flash", "torch", True, _sdpa(SDPBackend.FLASH_ATTENTION)),
    ("SDPA cuDNN", "torch", True, _sdpa(SDPBackend.CUDNN_ATTENTION)),
    # It has no grouped heads; repeating them is part of its time.
    ("SDPA efficient", "torch", True, _sdpa(SDPBackend.EFFICIENT_ATTENTION, repeated=True)),
    ("SDPA math", "torch", True, _sdpa(SDPBackend.MATH)),
    ("plain torch", "torch", True, _plain),
    ("FlexAttention", "torch", True, _flex),
    ("flash-attn 2", "flash-attn", True, _flash_attn("flash_attn")),
    ("flash-attn 3", "flash-attn-3", True, _flash_attn("flash_attn_interface")),
    ("flash-attn 4", "flash-attn-4", True, _flash_attn("flash_attn.cute")),
    ("xformers", "xformers", True, _xformers),
    ("FlashInfer", "flashinfer-python", False, _flashinfer),
)


def _gluon(inputs: Inputs) -> Callable[[], Outputs]:
    """The Hopper forward, launched directly: the operator uses it only where a measurement has chosen it."""
    from kvops.kernels.gluon_flash_forward import gluon_flash_forward

    _require_gpu(inputs)
    _refuse_bias(inputs)
    _refuse_slopes(inputs)
    tensors = [inputs[name] for name in ("q", "k", "v")]
    causal, window, softcap = inputs["causal"], inputs["window"], inputs["softcap"]
    return lambda: gluon_flash_forward(*tensors, causal=causal, window_left=window, softcap=softcap)


def _gluon_backward(inputs: Inputs) -> Callable[[], Outputs]:
    """The Hopper backward, launched directly, with delta as the operator computes it."""
    from kvops.kernels.gluon_flash_backward import gluon_flash_backward

    _require_gpu(inputs)
    _refuse_softcap(inputs)
    tensors = [inputs[name] for name in ("dout", "q", "k", "v", "out", "lse")]
    return lambda: gluon_flash_backward(*tensors, causal=inputs["causal"], window_left=inputs["window"])[:3]


def dense() -> tuple[Peer, ...]:
    """For cases whose inputs have q, k, v, causal, window, softcap and maybe bias [1, heads, Sq, Sk] or slopes [heads]
    of ALiBi, and whose outputs begin with out."""

    def forward(prepare: Callable[[Inputs], Attend]) -> Callable[[Inputs], Callable[[], Outputs]]:
        def ready(inputs: Inputs) -> Callable[[], Outputs]:
            attend = prepare(inputs)

            def call() -> Outputs:
                with torch.no_grad():
                    return (attend(inputs["q"], inputs["k"], inputs["v"]),)

            return call

        return ready

    theirs = (Peer(name, forward(prepare), package) for name, package, _, prepare in _DENSE)
    return (Peer("kvops Gluon", _gluon, "kvops"), *theirs)


def dropping() -> tuple[Peer, ...]:
    """For causal cases that have dropout, the share that is dropped; the outputs begin with out."""

    def sdpa(inputs: Inputs) -> Callable[[], Outputs]:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
        options = {"dropout_p": inputs["dropout"], "is_causal": True, "enable_gqa": q.shape[1] != k.shape[1]}
        return lambda: (F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2),)

    def flash_attn(inputs: Inputs) -> Callable[[], Outputs]:
        function = importlib.import_module("flash_attn").flash_attn_func
        tensors = [inputs[name] for name in ("q", "k", "v")]
        return lambda: (function(*tensors, inputs["dropout"], causal=True),)

    return Peer("SDPA", sdpa), Peer("flash-attn 2", flash_attn, "flash-attn")


def dense_backward() -> tuple[Peer, ...]:
    """The same peers' backward alone, for cases that have dout too, and outputs dq, dk, dv."""

    def backward(prepare: Callable[[Inputs], Attend]) -> Callable[[Inputs], Callable[[], Outputs]]:
        def ready(inputs: Inputs) -> Callable[[], Outputs]:
            leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
            out = prepare(inputs)(*leaves)
            return lambda: torch.autograd.grad(out, leaves, inputs["dout"], retain_graph=True)

        return ready

    theirs = (Peer(name, backward(prepare), package) for name, package, trains, prepare in _DENSE if trains)
    return (Peer("kvops Gluon", _gluon_backward, "kvops"), *theirs)


def bias_backward() -> tuple[Peer, ...]:
    """For cases of the gradient of a bias: what autograd computes through attention that kept its matrix of
    probabilities since the forward, and what plain torch takes that has to compute it again, as the operator has."""

    def gradient(prepare: Callable[[Inputs], Attend]) -> Callable[[Inputs], Callable[[], Outputs]]:
        def ready(inputs: Inputs) -> Callable[[], Outputs]:
            bias = inputs["bias"].detach().requires_grad_()
            out = prepare({**inputs, "bias": bias})(inputs["q"], inputs["k"], inputs["v"])
            return lambda: torch.autograd.grad(out, bias, inputs["dout"], retain_graph=True)

        return ready

    def again(inputs: Inputs) -> Callable[[], Outputs]:
        bias = inputs["bias"].detach().requires_grad_()
        attend = _plain({**inputs, "bias": bias})
        qkv = inputs["q"], inputs["k"], inputs["v"]
        return lambda: torch.autograd.grad(attend(*qkv), bias, inputs["dout"])

    theirs = {"SDPA math": _sdpa(SDPBackend.MATH), "plain torch": _plain}
    kept = (Peer(name, gradient(prepare), "torch") for name, prepare in theirs.items())
    return (*kept, Peer("plain torch, recomputed", again, "torch"))
