"""The union of two attentions over disjoint keys, on the CPU, in one pass over their rows."""

from typing import NamedTuple

import numpy as np
import torch
from numba import float32, int64, uint8

from kvops.kernels.cpu.arguments import Binding, unpack
from kvops.kernels.cpu.elements import FORMATS, LOG2_E, exp2, narrow, padded, widen
from kvops.kernels.cpu.jit import jit
from kvops.kernels.cpu.threads import run_shares, worth
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
def _merge_share(share, shares, call):
    B, S, H, _ = call.out_a.shape
    room = np.empty((2, padded(call.width)), np.float32)
    a, b = room[0], room[1]
    rows = B * S * H
    for row in range(rows * share // shares, rows * (share + 1) // shares):
        n, s, h = row // (S * H), row // H % S, row % H
        weight_a, weight_b, call.lse[n, h, s] = _union(call.lse_a[n, h, s], call.lse_b[n, h, s])
        widen(call.out_a[n, s, h].ctypes.data, call.element, call.width, a.ctypes.data)
        widen(call.out_b[n, s, h].ctypes.data, call.element, call.width, b.ctypes.data)
        for d in range(len(a)):
            a[d] = a[d] * weight_a + b[d] * weight_b
        narrow(a.ctypes.data, call.element, call.width, call.out[n, s, h].ctypes.data, b.ctypes.data)


@jit
def _merge_attention(addresses, table, threads):
    call = unpack(Call, addresses, table)
    return run_shares(_merge_share, (call,), worth(threads, 3 * call.out.size))


def _bind(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> Binding:
    parts = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    parts |= {"out": torch.empty(out_a.shape, dtype=out_a.dtype), "lse": torch.empty(lse_a.shape, dtype=torch.float32)}
    if out_a.dim() == 3:
        parts = {name: part.unsqueeze(0) for name, part in parts.items()}
    return Binding(_merge_attention, Call, **parts, element=FORMATS[out_a.dtype], width=out_a.shape[-1])


@prepared(_bind)
def merge_attention(
    binding: Binding, out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvops.merge_attention`."""
    out, lse = torch.empty(out_a.shape, dtype=out_a.dtype), torch.empty(lse_a.shape, dtype=torch.float32)
    binding(out_a, lse_a, out_b, lse_b, out, lse)
    return out, lse
