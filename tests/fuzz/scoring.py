"""The options of dense and packed attention: drawn, made, and what they mean in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from oracle import attention, attention_backward, attention_mask
from test_attention_dropout import kept
from torch import Tensor

from fuzz.inputs import close, often

# As wide as int32 and int64 allow.
FAR = (2**31 - 2, 2**31 - 1, 2**63 - 1)


@dataclass(frozen=True)
class Scoring:
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    scale: float | None = None
    softcap: float = 0.0
    sinks: str = ""  # "random", "large", "-inf", "inf", or "some" of each
    alibi: str = ""  # "heads" or "batch"
    dropout: float = 0.0

    def window(self) -> dict[str, Any]:
        return {"causal": self.causal, "window_left": self.window_left, "window_right": self.window_right}

    def mask(self, queries: int, keys: int) -> Tensor:
        left, right = (min(side, 2**40) for side in (self.window_left, self.window_right))
        return attention_mask(queries, keys, causal=self.causal, window_left=left, window_right=right)

    def tensors(self, heads: int, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """What changes the scores and the denominator, under the operators' names."""
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
        if self.sinks:
            sinks = torch.randn(heads, generator=generator)
            which = torch.arange(heads) % 3
            if self.sinks == "large":
                sinks = sinks * 100
            elif self.sinks in ("inf", "-inf"):
                sinks = sinks.fill_(float(self.sinks))
            elif self.sinks == "some":
                sinks = sinks.masked_fill(which == 0, math.inf).masked_fill(which == 1, -math.inf)
            options["sinks"] = sinks
        if self.alibi:
            shape = (heads,) if self.alibi == "heads" else (batch, heads)
            options["alibi_slopes"] = torch.rand(shape, generator=generator)
        return options

    def drops(self, seed: int) -> dict[str, Any]:
        """Dropout under the operators' names; a seed of 31 bits fills both words of theirs."""
        return {"dropout_p": self.dropout, "dropout_seed": torch.tensor([_wide(seed)])} if self.dropout else {}

    def weights(self, seed: int, *sizes: int) -> dict[str, Tensor]:
        """The same for the oracle; ``sizes`` are batch, heads, queries and keys."""
        if not self.dropout:
            return {}
        return {"weights": kept(_wide(seed), self.dropout, *sizes).double() / (1 - self.dropout)}


def _wide(seed: int) -> int:
    return (seed << 33 | seed) - 2**63


def draw_scoring(r: Random, longest: int, on_triton: bool) -> dict[str, Any]:
    near = r.randint(0, longest + 2)
    return {
        "causal": r.random() < 0.5,
        "window_left": often(r, -1, 0, near, near, near // 2, *FAR),
        "window_right": often(r, -1, 0, near, near // 2, *FAR, p=0.75),
        "scale": often(r, None, 0.0, -0.3, 0.2, 3.0, p=0.7),
        "softcap": often(r, 0.0, 0.5, 2.0, 30.0, 1e4, p=0.7),
        # The forward kernels give NaN for a sink of +inf, where eager code gives 0.
        "sinks": often(r, "", "random", "large", "-inf", *(() if on_triton else ("inf", "some")), p=0.7),
        "alibi": often(r, "", "heads", "batch", p=0.75),
        "dropout": often(r, 0.0, 0.1, 0.5, 0.97, p=0.75),
    }


def draw_bias(r: Random, dimensions: int) -> str:
    """What :func:`make_bias` takes."""
    return often(r, "", f"{r.choice(('float', 'bool'))} {''.join(r.choice('1n') for _ in range(dimensions))}", p=0.6)


def make_bias(bias: str, sizes: Sequence[int], g: torch.Generator) -> dict[str, Tensor]:
    """A float bias, in part -inf, or a mask: "float 1nn" is as large as the second and the third of three sizes."""
    if not bias:
        return {}
    kind, code = bias.split()
    shape = [1 if letter == "1" else size for letter, size in zip(code, sizes, strict=True)]
    keep = torch.rand(shape, generator=g) < 0.7
    if kind == "bool":
        return {"bias": keep}
    return {"bias": torch.randn(shape, generator=g).masked_fill(~keep, -math.inf)}


def learned(options: dict[str, Any]) -> tuple[Tensor, ...]:
    """The options that have a gradient: sinks, then a float bias."""
    given = (options[name] for name in ("sinks", "bias") if name in options)
    return tuple(x for x in given if x.is_floating_point())


def bias_of(bias: Tensor, queries: slice, keys: slice) -> Tensor:
    """A view of the part of a packed bias [heads, queries, keys] that is for one sequence."""
    own = bias[:, queries] if bias.shape[1] > 1 else bias
    return own[..., : keys.stop - keys.start] if bias.shape[2] > 1 else own


def one_sequence(options: dict[str, Any], b: int, queries: slice, keys: slice) -> dict[str, Any]:
    """The options of one sequence of a batch, which has these queries and keys."""
    own = dict(options)
    if "alibi_slopes" in options and options["alibi_slopes"].dim() > 1:
        own["alibi_slopes"] = options["alibi_slopes"][b]
    if "bias" in options:
        own["bias"] = bias_of(options["bias"], queries, keys)
    if "weights" in options:
        own["weights"] = options["weights"][b, :, : queries.stop - queries.start, : keys.stop - keys.start]
    return own


def finite(options: dict[str, Any]) -> dict[str, Any]:
    """For :func:`rounding.rounded`, which knows no rounding of infinity: sinks that are as good."""
    sinks = options.get("sinks")
    return options if sinks is None else {**options, "sinks": sinks.detach().clamp(max=1e4)}


def compare(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], low: tuple[Tensor, ...], names: tuple[str, ...]
) -> None:
    for one, exact, same, name in zip(actual, expected, low, names, strict=True):
        close(one, exact, same, name)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` with the error of a rounding to ``dtype``, another one in each run: that of nearly equal numbers would be
    the same in all of them."""
    finite = x.masked_fill(x.isinf(), 0.0)
    unit = torch.finfo(dtype).eps * torch.exp2(finite.abs().clamp(min=torch.finfo(dtype).tiny).log2().floor())
    return x + unit * (torch.rand(x.shape, dtype=x.dtype) - 0.5)


def expected_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    mask: Tensor | None,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    """dq, dk, dv and the gradients of sinks and of a float bias, of a forward whose results were rounded to ``dtype``
    and float32."""
    out, lse, _ = attention(q, k, v, mask=mask, **options)
    if dtype != torch.float64:
        out, lse = _stored(out, dtype), _stored(lse, torch.float32)
    result = attention_backward(dout, q, k, v, out, lse, mask=mask, dlse=dlse, **options)
    sinks = options.get("sinks")
    of_bias = () if result[4] is None else (result[4],)
    if sinks is None:
        return *result[:3], *of_bias
    # A sink of infinity takes all there is: lse is the sink, and nothing else counts.
    of_lse = torch.zeros_like(lse) if dlse is None else dlse.double().masked_fill(lse == -math.inf, 0.0)
    return *result[:3], torch.where(sinks == math.inf, of_lse.sum((0, 2)), result[3]), *of_bias
