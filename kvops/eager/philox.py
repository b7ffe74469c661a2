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
# What each round adds to the two keys.
_RAISES = [(number * _KEY_A, number * _KEY_B) for number in range(_ROUNDS)]
_RAISE = torch.tensor(_RAISES, device="cpu")
_FACTOR_A, _FACTOR_B = torch.tensor((_ROUND_A, _ROUND_B), device="cpu").unbind()
# So many numbers are drawn sooner one by one, with Python's integers, than as a tensor: that has a fixed cost.
_FEW = 24
# A group of 1024 vocabulary entries is 4 lanes of 256: the four words of one Philox block serve four entries that lie
# 256 apart, so a kernel loads contiguous logits for each word and moves no data between threads.
LANE_WIDTH = 256
GROUP_WIDTH = 4 * LANE_WIDTH


def _low(words: Tensor) -> Tensor:
    """The lower 32 bits of int64 as an int32 view."""
    return words.view(torch.int32)[..., ::2]


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds over the counter words (int64, 0 <= word < 2**32), keyed by the int64 ``seed``; all broadcast.

    With few counters a round costs as much as it has operations. So the two words that are multiplied lie in one
    tensor, the other two and the two keys in others, and the halves of the products are views of them.
    """
    c0, c1, c2, c3, seed = torch.broadcast_tensors(c0, c1, c2, c3, seed)
    keys = torch.stack((seed, seed >> 32)) + _RAISE.to(seed.device).view(_ROUNDS, 2, *(1,) * seed.dim())
    words, others = torch.stack((c0, c2)), _low(torch.stack((c1, c3)))
    first, second, low = *words.unbind(), _low(words)
    spare = words.new_empty(2, *words.shape)
    products = list(zip(spare[:, 0], spare[:, 1], _low(spare), spare.view(torch.int32)[..., 1::2], strict=True))
    for turn, key in enumerate(_low(keys).unbind()):
        # Crossed over: each word meets the other's product.
        of_second, of_first, lower, higher = products[turn % 2]
        torch.mul(first, _FACTOR_A, out=of_first)
        torch.mul(second, _FACTOR_B, out=of_second)
        torch.bitwise_xor(higher, others, out=low).bitwise_xor_(key)
        others = lower
    return first, of_second & _MASK, second, of_first & _MASK


def uniform_from_bits(bits: Tensor) -> Tensor:
    """32 random bits -> float32 in (0, 1), centred in their cell: (bits + 1/2) / 2**32.

    Small values keep 24 significant bits down to 2**-33, so ``u < p`` happens with probability p within 2**-33 for
    small p; 24 fixed bits would never accept p = 1e-8.
    """
    return ((bits.float() + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)


def _first_word(c1: int, c2: int, c3: int, seed: int) -> int:
    """The first word that :func:`philox` gives for one counter whose first word is 0."""
    c0 = 0
    for raise_a, raise_b in _RAISES:
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1 = (b >> 32) ^ c1 ^ ((seed + raise_a) & _MASK), b & _MASK
        c2, c3 = (a >> 32) ^ c3 ^ (((seed >> 32) + raise_b) & _MASK), a & _MASK
    return c0


def uniform(stream: int, position: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """One uniform for each position (int64, broadcast against ``seed`` and ``step``)."""
    position, seed, step = torch.broadcast_tensors(position, seed, step)
    if seed.device.type == "cpu" and seed.numel() <= _FEW:
        counters = zip(position.flatten().tolist(), step.flatten().tolist(), seed.flatten().tolist(), strict=True)
        words = [_first_word(4 * p + stream, s & _MASK, (s >> 32) & _MASK, key) for p, s, key in counters]
        bits = seed.new_tensor(words).view(seed.shape)
    else:
        zero = torch.zeros((), dtype=torch.int64, device=seed.device)
        bits = philox(zero, 4 * position + stream, step & _MASK, (step >> 32) & _MASK, seed)[0]
    return uniform_from_bits(bits)


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
