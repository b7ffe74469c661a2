"""ggml's quantised blocks to float32.

The types of nearly all published files are done here by a few whole-tensor PyTorch operations; the 134 million weights
of SmolLM2 take 0.1 s so, where the ``gguf`` package's NumPy takes 1 to 2 s. The rarer types are left to that package.
Both give the same bits: the formats fix the order of the multiplications.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvops.models.extras import require


def dequantize(raw: np.ndarray, type_id: int) -> Tensor:
    """The values of a tensor's rows.

    Args:
        raw: uint8 [rows, bytes of a row], writable (PyTorch wants so), not written to.
        type_id: ggml's number of the type.

    Returns:
        float32 [rows, columns], owning its memory.

    Raises:
        ValueError: a type that holds no weights, or one that the installed ``gguf`` package does not know.
    """
    gguf = require("gguf")
    kind = gguf.GGMLQuantizationType(type_id)
    rows = raw.shape[0]
    if kind.name in _PLAIN:
        return torch.from_numpy(raw).view(_PLAIN[kind.name]).to(torch.float32, copy=True)
    if kind.name in _BLOCKS:
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        return _BLOCKS[kind.name](torch.from_numpy(raw).reshape(-1, block_bytes)).reshape(rows, -1)
    try:
        return torch.from_numpy(gguf.quants.dequantize(raw, kind))
    except NotImplementedError as error:
        raise ValueError(f"type: expected one that the gguf package can dequantise, got {kind.name}") from error


def _halves(blocks: Tensor) -> Tensor:
    """uint8 [n, 2 k] read as float16, as float32 [n, k]."""
    return blocks.contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., k] -> uint8 [..., 2, k]: the low nibbles of all bytes, then the high ones."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _q4_0(blocks: Tensor) -> Tensor:
    scale = _halves(blocks[:, :2]).unsqueeze(-1)
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(scale)


def _q4_1(blocks: Tensor) -> Tensor:
    scale, minimum = _halves(blocks[:, :4])[..., None, None].unbind(1)
    return _nibbles(blocks[:, 4:]).float().mul_(scale).add_(minimum)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks[:, :2]))


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and eight 6-bit minima in 12 bytes: uint8 [n, 12] -> two float32 [n, 8]."""
    first, second, third = packed.split(4, dim=1)
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=1)
    return scales.float(), minima.float()


def _k_affine(blocks: Tensor, quants: Tensor) -> Tensor:
    """``scale * quants - minimum`` per group of 32; quants uint8 [n, 8, 32], the scales lie in the first 16 bytes."""
    outer_scale, outer_minimum = _halves(blocks[:, :4]).split(1, dim=1)
    scales, minima = _k_scales(blocks[:, 4:16])
    scales, minima = scales.mul_(outer_scale), minima.mul_(outer_minimum)
    return quants.float().mul_(scales.unsqueeze(-1)).sub_(minima.unsqueeze(-1))


def _q4_k(blocks: Tensor) -> Tensor:
    return _k_affine(blocks, _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1, 2))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1, 2)
    shifts = torch.arange(8, dtype=torch.uint8).unsqueeze(-1)
    fifth_bit = blocks[:, None, 16:48] >> shifts & 1
    return _k_affine(blocks, low | fifth_bit << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).unflatten(-1, (2, 32)).flatten(2, 3)  # [n, 2, 4, 32]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(-1)
    high = blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts & 3
    quants = (low | high << 4).reshape(-1, 16, 16).float().sub_(32)
    scales = blocks[:, 192:208].view(torch.int8).float() * _halves(blocks[:, 208:])
    return quants.mul_(scales.unsqueeze(-1))


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
