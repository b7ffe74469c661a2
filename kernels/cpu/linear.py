"""Products of a few rows with a matrix, at the speed at which a CPU reads the matrix: most of a decoding step."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from numba import float32, float64

from kvops.kernels.cpu.arguments import Binding, unpack
from kvops.kernels.cpu.jit import jit
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.kernels.cpu.vector import LANES, multiply_transposed


class Call(NamedTuple):
    x: float32[:, ::1]  # [rows, in_features]
    norm: float32[:]  # [in_features], the weight of an RMSNorm of x, or size 0
    weight: float32[:, :]  # [out_features, in_features]
    out: float32[:, :]  # [rows, out_features]
    eps: float64


@jit
def _normalised(x, weight, eps):
    """RMSNorm of the rows; each thread has its own, which costs less than to wait for another."""
    out = np.empty(x.shape, np.float32)
    for r in range(len(x)):
        squares = np.float32(0)
        for d in range(x.shape[1]):
            squares += x[r, d] * x[r, d]
        factor = np.float32(1 / np.sqrt(squares / x.shape[1] + eps))
        for d in range(x.shape[1]):
            out[r, d] = x[r, d] * factor * weight[d]
    return out


@jit
def _multiply_share(share, shares, call):
    """The outputs of a share of the rows of the weight, by fours."""
    fours = call.weight.shape[0] // 4
    first, last = 4 * (fours * share // shares), 4 * (fours * (share + 1) // shares)
    rows = np.empty(last - first, np.int64)
    for j in range(last - first):
        rows[j] = call.weight.ctypes.data + (first + j) * call.weight.strides[0]
    x = _normalised(call.x, call.norm, call.eps) if call.norm.size else call.x
    multiply_transposed(x, len(x), rows, last - first, x.shape[1], call.out[:, first:last])


@jit
def _multiply(addresses, table, threads):
    call = unpack(Call, addresses, table)
    return run_shares(_multiply_share, (call,), worth(threads, 4 * call.weight.size))


@functools.lru_cache(maxsize=256)
def _bound(rows: int, out_features: int, in_features: int, eps: float | None) -> Binding:
    def layout(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    return Binding(
        _multiply,
        Call,
        x=layout(rows, in_features),
        norm=None if eps is None else layout(in_features),
        weight=layout(out_features, in_features),
        out=layout(rows, out_features),
        eps=0.0 if eps is None else eps,
    )


def serves(weight: torch.Tensor) -> bool:
    """Whether :func:`linear` takes this matrix."""
    out_features, in_features = weight.shape
    return weight.dtype == torch.float32 and weight.is_contiguous() and out_features % 4 == in_features % LANES == 0


def linear(
    x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """x [rows, in_features] @ weight [out_features, in_features].T, both contiguous, in float32.

    With the weight ``norm`` [in_features] and the ``eps`` of an RMSNorm, x is normalised first. The bits of a row's
    result depend neither on the other rows nor on the number of threads.
    """
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    _bound(x.shape[0], *weight.shape, eps)(x, norm, weight, out)
    return out
