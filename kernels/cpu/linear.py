"""Products of a few rows with a matrix, at the speed at which a CPU reads the matrix: most of a decoding step."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from numba import float32, float64

from kvops.kernels.cpu.arguments import Binding, unpack
from kvops.kernels.cpu.elements import LOG2_E, exp2
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.kernels.cpu.vector import LANES, address_of, fma, load, prefetch, store_totals, zero


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


@inner
def _share_of(columns, share, shares):
    """The columns [first, last) of a share, by fours."""
    return 4 * (columns // 4 * share // shares), 4 * (columns // 4 * (share + 1) // shares)


@jit
def _multiply_rows(x, b0, stride, out):
    """out = x @ b.T for consecutive rows of b, from the address ``b0`` on.

    Two rows of x by four of b at a time. The next four rows of b are asked for all along, which waits for memory less
    than to ask for them at once.
    """
    step, ahead = 4 * LANES, 4 * stride
    for j in range(0, out.shape[1], 4):
        b1, b2, b3 = b0 + stride, b0 + 2 * stride, b0 + 3 * stride
        x0, address = address_of(x), address_of(out) + 4 * j
        for i in range(0, len(x) - 1, 2):
            x1 = x0 + x.strides[0]
            y0, y1, y2, y3 = zero(), zero(), zero(), zero()
            z0, z1, z2, z3 = zero(), zero(), zero(), zero()
            for d in range(0, x.strides[0], step):
                if i == 0:
                    for row in (b0, b1, b2, b3):
                        prefetch(row + d + ahead)
                y, z = load(x0 + d), load(x1 + d)
                c = load(b0 + d)
                y0, z0 = fma(y, c, y0), fma(z, c, z0)
                c = load(b1 + d)
                y1, z1 = fma(y, c, y1), fma(z, c, z1)
                c = load(b2 + d)
                y2, z2 = fma(y, c, y2), fma(z, c, z2)
                c = load(b3 + d)
                y3, z3 = fma(y, c, y3), fma(z, c, z3)
            store_totals(address, y0, y1, y2, y3)
            store_totals(address + out.strides[0], z0, z1, z2, z3)
            x0, address = x1 + x.strides[0], address + 2 * out.strides[0]
        if len(x) % 2:
            y0, y1, y2, y3 = zero(), zero(), zero(), zero()
            for d in range(0, x.strides[0], step):
                if len(x) == 1:
                    for row in (b0, b1, b2, b3):
                        prefetch(row + d + ahead)
                y = load(x0 + d)
                y0, y1 = fma(y, load(b0 + d), y0), fma(y, load(b1 + d), y1)
                y2, y3 = fma(y, load(b2 + d), y2), fma(y, load(b3 + d), y3)
            store_totals(address, y0, y1, y2, y3)
        b0 = b3 + stride


@inner
def _multiply_by(x, weight, share, shares, out):
    """The columns of out = x @ weight.T that belong to a share."""
    first, last = _share_of(len(weight), share, shares)
    _multiply_rows(x, address_of(weight) + first * weight.strides[0], weight.strides[0], out[:, first:last])


@inner
def _multiply_share(share, shares, call):
    x = _normalised(call.x, call.norm, call.eps) if call.norm.size else call.x
    _multiply_by(x, call.weight, share, shares, call.out)


@jit
def _multiply(addresses, table, threads):
    call = unpack(Call, addresses, table)
    return run_shares(_multiply_share, (call,), worth(threads, 4 * call.weight.size))


class FeedForward(NamedTuple):
    x: float32[:, ::1]  # [rows, features]
    norm: float32[:]  # [features]
    gate_up: float32[:, :]  # [2 * hidden, features]
    down: float32[:, :]  # [features, hidden]
    out: float32[:, :]  # as x
    eps: float64


@inner
def _expand_share(share, shares, call, hidden):
    _multiply_by(_normalised(call.x, call.norm, call.eps), call.gate_up, share, shares, hidden)


@inner
def _contract_share(share, shares, call, hidden):
    rows, width, one = len(hidden), hidden.shape[1] // 2, np.float32(1)  # a whole number would make it float64
    gated = np.empty((rows, width), np.float32)  # each thread has its own, as of the norm
    for r in range(rows):
        for d in range(width):
            gate = hidden[r, d]
            decay = exp2(-abs(gate) * np.float32(LOG2_E))
            gated[r, d] = gate * hidden[r, width + d] * ((one if gate >= 0 else decay) / (one + decay))
    _multiply_by(gated, call.down, share, shares, call.out)
    first, last = _share_of(len(call.down), share, shares)
    for r in range(rows):
        for d in range(first, last):
            call.out[r, d] += call.x[r, d]


@jit
def _feed_forward(addresses, table, threads):
    call = unpack(FeedForward, addresses, table)
    hidden = np.empty((len(call.x), len(call.gate_up)), np.float32)
    succeeded = run_shares(_expand_share, (call, hidden), worth(threads, 4 * call.gate_up.size))
    return succeeded & run_shares(_contract_share, (call, hidden), worth(threads, 4 * call.down.size))


def _layout(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


@functools.lru_cache(maxsize=256)
def _bound(rows: int, out_features: int, in_features: int, eps: float | None) -> Binding:
    return Binding(
        _multiply,
        Call,
        x=_layout(rows, in_features),
        norm=None if eps is None else _layout(in_features),
        weight=_layout(out_features, in_features),
        out=_layout(rows, out_features),
        eps=0.0 if eps is None else eps,
    )


@functools.lru_cache(maxsize=256)
def _bound_feed_forward(rows: int, features: int, hidden: int, eps: float) -> Binding:
    return Binding(
        _feed_forward,
        FeedForward,
        x=_layout(rows, features),
        norm=_layout(features),
        gate_up=_layout(2 * hidden, features),
        down=_layout(features, hidden),
        out=_layout(rows, features),
        eps=eps,
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


def feed_forward(
    x: torch.Tensor, norm: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, eps: float
) -> torch.Tensor:
    """x [rows, features] + (silu(gate) * up) @ down.T, where [gate, up] = rms_norm(x) @ gate_up.T.

    gate_up is [2 * hidden, features] and down [features, hidden]: see :func:`serves`. The same holds for the bits as
    in :func:`linear`.
    """
    out = torch.empty_like(x)
    _bound_feed_forward(*x.shape, down.shape[1], eps)(x, norm, gate_up, down, out)
    return out
