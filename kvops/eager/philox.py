"""Philox4x32-10 in torch's int64 arithmetic: the same random bits as the kernels', on any device.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A 32-bit word lives in an int64; a product of
two words wraps around 2**63, which leaves all its 64 bits right, so its halves are a shift and a mask away.

Draft verification numbers its randoms by what they decide and never by where a request sits in a batch:

====== ======================================================================
key    the request's seed (64 bits)
word 0 the counter: 0 for an acceptance; resampling, see :func:`race_exponentials`
word 1 4 * position + stream
word 2 the request's step, low half
word 3 the request's step, high half
====== ======================================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

ACCEPT, RESAMPLE = 0, 1  # the streams: one block of randoms never serves both
_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
# A group of 1024 vocabulary entries is 4 lanes of 256: the four words of one Philox block serve four entries that lie
# 256 apart, so a kernel loads contiguous logits for each word and moves no data between threads.
LANE_WIDTH = 256
GROUP_WIDTH = 4 * LANE_WIDTH


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds over the counter words (int64, 0 <= word < 2**32), keyed by the int64 ``seed``; all broadcast."""
    c0, c1, c2, c3, seed = torch.broadcast_tensors(c0, c1, c2, c3, seed)
    key_a, key_b = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ key_a, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ key_b, a & _MASK
        key_a, key_b = (key_a + _KEY_A) & _MASK, (key_b + _KEY_B) & _MASK
    return c0, c1, c2, c3


def uniform_from_bits(bits: Tensor) -> Tensor:
    """32 random bits -> float32 in (0, 1), centred in their cell: (bits + 1/2) / 2**32.

    Small values keep 24 significant bits down to 2**-33, so ``u < p`` happens with probability p within 2**-33 for
    small p; 24 fixed bits would never accept p = 1e-8.
    """
    return ((bits.float() + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)


def uniform(stream: int, position: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """One uniform for each position (int64, broadcast against ``seed`` and ``step``)."""
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    return uniform_from_bits(philox(zero, 4 * position + stream, step & _MASK, (step >> 32) & _MASK, seed)[0])


def race_exponentials(position: Tensor, seed: Tensor, step: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor]:
    """Independent Exp(1) float32 for a draw from so many groups of ``width`` <= 1024 entries: ``[rows, groups]`` for
    the groups and ``[rows, width]`` for the entries of whichever group wins; position, seed and step are int64
    ``[rows]``.

    Counters 0 to 255 serve the entries and 256 + g group g, by its first word; a single group draws no number.
    ``-log1p(-u)`` keeps the smallest values, which decide a race, exact.
    """
    lanes = min(width, LANE_WIDTH)
    words = philox(
        torch.arange(lanes + groups if groups > 1 else lanes, device=seed.device),
        (4 * position + RESAMPLE)[:, None],
        (step & _MASK)[:, None],
        ((step >> 32) & _MASK)[:, None],
        seed[:, None],
    )
    entries = [word[:, :lanes] for word in words[: -(-width // LANE_WIDTH)]]
    bits = torch.cat((*entries, words[0][:, lanes:]), 1)
    exponential = uniform_from_bits(bits).neg_().log1p_().neg_()
    return exponential[:, len(entries) * lanes :], exponential[:, :width]
