"""Products of a few rows with a matrix, at the speed at which a CPU reads the matrix: most of a decoding step."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from numba import float32, float64, int64

from kvops.kernels.cpu.arguments import Binding, unpack
from kvops.kernels.cpu.elements import LOG2_E, exp2
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.kernels.cpu.vector import LANES, address_of, fma, load, prefetch, store_totals, zero


class Call(NamedTuple):
    x: float32[:, ::1]  # [rows, in_features]
    norm: float32[:]  # [in_features], the weight of an RMSNorm of x, or size 0
    weight: float32[:, :]  # [out_features, in_features]
    bias: float32[:]  # [out_features], or size 0
    cos: float32[:, ::1]  # [rows, D]
    sin: float32[:, ::1]
    out: float32[:, :]  # [rows, out_features]
    eps: float64
    rotated: int64  # so many heads of D, the first of a row, are rotated


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
    if call.bias.size:
        first, last = _share_of(len(call.weight), share, shares)
        for r in range(len(x)):
            for d in range(first, last):
                call.out[r, d] += call.bias[d]


@inner
def _rotate(call):
    """The rotary embedding: a head times the cosines, and its halves, exchanged, times the sines."""
    D = call.cos.shape[1]
    for r in range(len(call.x)):
        for h in range(call.rotated):
            head = call.out[r, h * D : (h + 1) * D]
            for d in range(D // 2):
                e = d + D // 2
                a, b = head[d], head[e]
                head[d], head[e] = a * call.cos[r, d] + b * call.sin[r, d], b * call.cos[r, e] + a * call.sin[r, e]


@jit
def _multiply(addresses, table, threads):
    call = unpack(Call, addresses, table)
    succeeded = run_shares(_multiply_share, (call,), worth(threads, 4 * call.weight.size))
    _rotate(call)
    return succeeded


class AfterAttention(NamedTuple):
    x: float32[:, ::1]  # [rows, features]
    attended: float32[:, ::1]  # [rows, heads * D]
    projection: float32[:, :]  # [features, heads * D]
    norm: float32[:]  # [features]
    gate_up: float32[:, :]  # [2 * hidden, features]
    down: float32[:, :]  # [features, hidden]
    out: float32[:, :]  # as x
    eps: float64


@inner
def _add_share(share, shares, x, out):
    """Add the columns of x [rows, columns] that belong to a share to out."""
    first, last = _share_of(x.shape[1], share, shares)
    for r in range(len(x)):
        for d in range(first, last):
            out[r, d] += x[r, d]


@inner
def _project_share(share, shares, call, added):
    _multiply_by(call.attended, call.projection, share, shares, added)
    _add_share(share, shares, call.x, added)


@inner
def _expand_share(share, shares, call, added, hidden):
    _multiply_by(_normalised(added, call.norm, call.eps), call.gate_up, share, shares, hidden)


@inner
def _contract_share(share, shares, call, added, hidden):
    rows, width, one = len(hidden), hidden.shape[1] // 2, np.float32(1)  # a whole number would make it float64
    gated = np.empty((rows, width), np.float32)  # each thread has its own, as of the norm
    for r in range(rows):
        for d in range(width):
            gate = hidden[r, d]
            decay = exp2(-abs(gate) * np.float32(LOG2_E))
            gated[r, d] = gate * hidden[r, width + d] * ((one if gate >= 0 else decay) / (one + decay))
    _multiply_by(gated, call.down, share, shares, call.out)
    _add_share(share, shares, added, call.out)


@jit
def _after_attention(addresses, table, threads):
    call = unpack(AfterAttention, addresses, table)
    added = np.empty(call.x.shape, np.float32)
    hidden = np.empty((len(call.x), len(call.gate_up)), np.float32)
    succeeded = run_shares(_project_share, (call, added), worth(threads, 4 * call.projection.size))
    succeeded &= run_shares(_expand_share, (call, added, hidden), worth(threads, 4 * call.gate_up.size))
    return succeeded & run_shares(_contract_share, (call, added, hidden), worth(threads, 4 * call.down.size))


def _layout(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


@functools.lru_cache(maxsize=256)
def _bound(
    rows: int, out_features: int, in_features: int, eps: float | None, bias: bool, rotated: int, head_dim: int
) -> Binding:
    return Binding(
        _multiply,
        Call,
        x=_layout(rows, in_features),
        norm=None if eps is None else _layout(in_features),
        weight=_layout(out_features, in_features),
        bias=_layout(out_features) if bias else None,
        cos=_layout(rows, head_dim) if rotated else None,
        sin=_layout(rows, head_dim) if rotated else None,
        out=_layout(rows, out_features),
        eps=0.0 if eps is None else eps,
        rotated=rotated,
    )


@functools.lru_cache(maxsize=256)
def _bound_after_attention(rows: int, features: int, attended: int, hidden: int, eps: float) -> Binding:
    return Binding(
        _after_attention,
        AfterAttention,
        x=_layout(rows, features),
        attended=_layout(rows, attended),
        projection=_layout(features, attended),
        norm=_layout(features),
        gate_up=_layout(2 * hidden, features),
        down=_layout(features, hidden),
        out=_layout(rows, features),
        eps=eps,
    )


def serves(weight: torch.Tensor) -> bool:
    """Whether the functions below take a contiguous float32 matrix of this shape."""
    out_features, in_features = weight.shape
    return out_features % 4 == in_features % LANES == 0


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    rotated: int = 0,
) -> torch.Tensor:
    """x [rows, in_features] @ weight [out_features, in_features].T + bias, all contiguous, in float32.

    With the weight ``norm`` [in_features] and the ``eps`` of an RMSNorm, x is normalised first. With ``cos`` and
    ``sin``, rows of D, the first ``rotated`` heads of D numbers become ``head * cos + head.roll(D // 2) * sin``. The
    bits of a row's result depend neither on the other rows nor on the number of threads.
    """
    out = x.new_empty(x.shape[0], weight.shape[0])
    head_dim = 0 if cos is None else cos.shape[-1]
    binding = _bound(x.shape[0], *weight.shape, eps, bias is not None, rotated, head_dim)
    binding(x, norm, weight, bias, cos, sin, out)
    return out


def after_attention(
    x: torch.Tensor,
    attended: torch.Tensor,
    projection: torch.Tensor,
    norm: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """y + (silu(gate) * up) @ down.T, where y [rows, features] = x + attended @ projection.T and
    [gate, up] = rms_norm(y) @ gate_up.T.

    gate_up is [2 * hidden, features] and down [features, hidden]: see :func:`serves`. The same holds for the bits as
    in :func:`linear`.
    """
    out = torch.empty_like(x)
    binding = _bound_after_attention(*x.shape, attended.shape[1], down.shape[1], eps)
    binding(x, attended, projection, norm, gate_up, down, out)
    return out
