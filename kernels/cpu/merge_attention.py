"""The union of two attentions over disjoint keys and its gradient on the CPU, each in one pass over the rows."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import float32, int64, uint8

from kvops.kernels.cpu.arguments import Binding, unpack
from kvops.kernels.cpu.elements import FLOAT32, FORMATS, LOG2_E, exp2, narrow, padded, widen
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.kernels.cpu.vector import LANES, address_of, fma, load, splat, store, zero
from kvops.prepared import prepared


class Call(NamedTuple):
    out_a: uint8[:, :, :, :]  # [B, S, H, Dv] bytes
    lse_a: float32[:, :, :]  # [B, H, S]
    out_b: uint8[:, :, :, :]
    lse_b: float32[:, :, :]
    out: uint8[:, :, :, :]
    lse: float32[:, :, :]
    element: int64
    width: int64  # Dv


@jit
def _union(lse_a, lse_b):
    """The weights of two parts of a softmax in their union and its lse; the weights are 0 where both parts are empty.

    Some kernels, FlashAttention-2's among them, give an empty row an lse of +inf.
    """
    lse_a = np.float32(-np.inf) if lse_a == np.inf else lse_a
    lse_b = np.float32(-np.inf) if lse_b == np.inf else lse_b
    largest = max(lse_a, lse_b)
    shift = np.float32(0) if largest == -np.inf else largest
    a, b = exp2((lse_a - shift) * np.float32(LOG2_E)), exp2((lse_b - shift) * np.float32(LOG2_E))
    total = np.float32(1) if a + b == 0 else a + b
    return a / total, b / total, largest + np.log(total)


@jit
def _weigh(address_a, weight_a, address_b, weight_b, width, out):
    """Write weight_a * a + weight_b * b of ``width`` float32 numbers, whole vectors of them, to the address ``out``."""
    weight_a, weight_b = splat(weight_a), splat(weight_b)
    for byte in range(0, 4 * width, 4 * LANES):
        b = fma(weight_b, load(address_b + byte), zero())
        store(out + byte, fma(weight_a, load(address_a + byte), b))


@inner
def _merge_share(share, shares, call):
    B, S, H, _ = call.out_a.shape
    room = np.empty((2, padded(call.width)), np.float32)
    a, b = address_of(room[0]), address_of(room[1])
    in_place = call.element == FLOAT32 and call.width % LANES == 0
    for token in range(B * S * share // shares, B * S * (share + 1) // shares):
        n, s = token // S, token % S
        for h in range(H):
            weight_a, weight_b, call.lse[n, h, s] = _union(call.lse_a[n, h, s], call.lse_b[n, h, s])
            part_a, part_b = address_of(call.out_a[n, s, h]), address_of(call.out_b[n, s, h])
            out = address_of(call.out[n, s, h])
            if in_place:
                _weigh(part_a, weight_a, part_b, weight_b, call.width, out)
                continue
            widen(part_a, call.element, call.width, a)
            widen(part_b, call.element, call.width, b)
            _weigh(a, weight_a, b, weight_b, room.shape[1], a)
            narrow(a, call.element, call.width, out, b)


@jit
def _merge_attention(addresses, table, threads):
    call = unpack(Call, addresses, table)
    return run_shares(_merge_share, (call,), worth(threads, 3 * call.out.size))


class BackwardCall(NamedTuple):
    """Without a gradient of the lse, ``dlse`` has size 0."""

    dout: uint8[:, :, :, :]  # [B, S, H, Dv] bytes
    out_a: uint8[:, :, :, :]
    lse_a: float32[:, :, :]  # [B, H, S]
    out_b: uint8[:, :, :, :]
    lse_b: float32[:, :, :]
    dlse: float32[:, :, :]
    dout_a: uint8[:, :, :, :]
    dlse_a: float32[:, :, :]
    dout_b: uint8[:, :, :, :]
    dlse_b: float32[:, :, :]
    element: int64
    width: int64  # Dv


@inner
def _backward_share(share, shares, call):
    B, S, H, _ = call.out_a.shape
    rows = np.zeros((3, padded(call.width)), np.float32)
    dout, a, b = rows[0], rows[1], rows[2]
    for token in range(B * S * share // shares, B * S * (share + 1) // shares):
        n, s = token // S, token % S
        for h in range(H):
            weight_a, weight_b, _ = _union(call.lse_a[n, h, s], call.lse_b[n, h, s])
            widen(address_of(call.dout[n, s, h]), call.element, call.width, address_of(dout))
            widen(address_of(call.out_a[n, s, h]), call.element, call.width, address_of(a))
            widen(address_of(call.out_b[n, s, h]), call.element, call.width, address_of(b))
            # d weight_a / d lse_a = weight_a * weight_b = -d weight_b / d lse_a
            change = np.float32(0)
            for d in range(len(dout)):
                change += dout[d] * (a[d] - b[d])
            change *= weight_a * weight_b
            dlse = call.dlse[n, h, s] if call.dlse.size else np.float32(0)
            # An empty part has no gradient, whatever dlse holds there.
            call.dlse_a[n, h, s] = change + dlse * weight_a if weight_a != 0 else change
            call.dlse_b[n, h, s] = dlse * weight_b - change if weight_b != 0 else -change
            for d in range(len(dout)):
                a[d], b[d] = dout[d] * weight_a, dout[d] * weight_b
            narrow(address_of(a), call.element, call.width, address_of(call.dout_a[n, s, h]), address_of(dout))
            narrow(address_of(b), call.element, call.width, address_of(call.dout_b[n, s, h]), address_of(dout))


@jit
def _merge_attention_backward(addresses, table, threads):
    call = unpack(BackwardCall, addresses, table)
    return run_shares(_backward_share, (call,), worth(threads, 5 * call.dout.size))


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def _bound(function: Any, call: type[NamedTuple], **parts: torch.Tensor | None) -> Binding:
    """The binding of a function to parts [B, S, H, Dv] or packed ones [T, H, Dv], which are one sequence."""
    out_a = parts["out_a"]
    assert out_a is not None
    if out_a.dim() == 3:
        parts = {name: part if part is None else part.unsqueeze(0) for name, part in parts.items()}
    return Binding(function, call, **parts, element=FORMATS[out_a.dtype], width=out_a.shape[-1])


def _bind(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> Binding:
    parts = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    return _bound(_merge_attention, Call, **parts, out=_like(out_a), lse=_like(lse_a))


@prepared(_bind)
def merge_attention(
    binding: Binding, out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvops.merge_attention`."""
    out, lse = _like(out_a), _like(lse_a)
    binding(out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse


def _bind_backward(
    dout: torch.Tensor,
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    dlse: torch.Tensor | None = None,
) -> Binding:
    parts = {"dout": dout, "out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b, "dlse": dlse}
    gradients = {f"d{name}": _like(parts[name]) for name in ("out_a", "lse_a", "out_b", "lse_b")}  # type: ignore[arg-type]
    return _bound(_merge_attention_backward, BackwardCall, **parts, **gradients)


@prepared(_bind_backward)
def merge_attention_backward(
    binding: Binding,
    dout: torch.Tensor,
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`kvops.merge_attention_backward`."""
    gradients = _like(out_a), _like(lse_a), _like(out_b), _like(lse_b)
    binding(dout, out_a, lse_a, out_b, lse_b, dlse, *gradients)
    return gradients
