"""ggml's quantised blocks to float32.

The types of nearly all published files are done here, each tensor by a few NumPy operations: SmolLM2's 134 million
weights take 0.3 s so, where the ``gguf`` package, which works on 16 rows at a time, takes 1 to 2 s. The rarer types are
left to that package. Both give the same bits: the formats fix the order of the multiplications.

NumPy and not PyTorch, since PyTorch's threads wait for each other after every small operation: 0.1 s on an idle machine
of two cores, but above 5 s on the same machine when others work on it.
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
        raw: uint8 [rows, bytes of a row].
        type_id: ggml's number of the type.

    Returns:
        float32 [rows, columns], owning its memory.

    Raises:
        ValueError: a type that holds no weights, or one that the installed ``gguf`` package does not know.
    """
    gguf = require("gguf")
    kind = gguf.GGMLQuantizationType(type_id)
    if kind.name in _PLAIN:
        return torch.from_numpy(_PLAIN[kind.name](raw))
    if kind.name in _BLOCKS:
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        with np.errstate(invalid="ignore"):  # a NaN in the file is a NaN in the weights
            values = _BLOCKS[kind.name](raw.reshape(-1, block_bytes))
        return torch.from_numpy(values.reshape(raw.shape[0], -1))
    try:
        return torch.from_numpy(gguf.quants.dequantize(raw, kind))
    except NotImplementedError as error:
        raise ValueError(f"type: expected one that the gguf package can dequantise, got {kind.name}") from error


def _f32(raw: np.ndarray) -> np.ndarray:
    return raw.view(np.float32).copy()


def _halves(blocks: np.ndarray) -> np.ndarray:
    """uint8 [n, 2 k] read as float16, as float32 [n, k]."""
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., k] -> uint8 [..., 2, k]: the low nibbles of all bytes, then the high ones."""
    both = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=both[..., 0, :])
    np.right_shift(packed, 4, out=both[..., 1, :])
    return both


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    values = _nibbles(blocks[:, 2:]).astype(np.float32)
    values -= 8
    values *= _halves(blocks[:, :2])[..., None]
    return values


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    scale_and_minimum = _halves(blocks[:, :4])[..., None, None]
    values = _nibbles(blocks[:, 4:]).astype(np.float32)
    values *= scale_and_minimum[:, 0]
    values += scale_and_minimum[:, 1]
    return values


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= _halves(blocks[:, :2])
    return values


def _k_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and eight 6-bit minima in 12 bytes: uint8 [n, 12] -> two float32 [n, 8]."""
    first, second, third = np.split(packed, 3, axis=1)
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_affine(blocks: np.ndarray, quants: np.ndarray) -> np.ndarray:
    """``scale * quants - minimum`` per group of 32; quants uint8 [n, 8, 32], the scales lie in the first 16 bytes."""
    outer = _halves(blocks[:, :4])
    scales, minima = _k_scales(blocks[:, 4:16])
    values = quants.astype(np.float32)
    values *= (scales * outer[:, :1])[..., None]
    values -= (minima * outer[:, 1:])[..., None]
    return values


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _k_affine(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    quants = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    quants |= (blocks[:, None, 16:48] >> shifts & 1) << 4
    return _k_affine(blocks, quants)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    quants = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    quants |= (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << 4
    values = quants.reshape(-1, 16, 16).astype(np.float32)
    values -= 32
    values *= (blocks[:, 192:208].view(np.int8) * _halves(blocks[:, 208:]))[..., None]
    return values


_PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {"F32": _f32, "F16": _halves, "BF16": _bf16}
_BLOCKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
