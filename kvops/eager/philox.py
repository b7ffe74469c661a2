"""Philox4x32-10 in torch's int64 arithmetic: the same random bits as the kernels', on any device.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A 32-bit word lives in an int64; a product of
two words wraps around 2**63, which leaves all its 64 bits right, so its halves are a shift and a mask away.

Draft verification numbers its randoms by what they decide and never by where a request sits in a batch:

====== ======================================================================
key    the request's seed (64 bits)
word 0 the vocabulary counter (see :func:`exponential_row`), 0 for an acceptance
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
# A vocabulary index is (group of 1024, lane of 4, counter of 256): the four words of one Philox block serve four
# indices that lie 256 apart, so a kernel loads contiguous logits for each word and moves no data between threads.
LANE_WIDTH = 256
GROUP_WIDTH = 4 * LANE_WIDTH


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds over the counter words (int64, 0 <= word < 2**32), keyed by the int64 ``seed``; all broadcast."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((b >> 32) ^ c1 ^ k0).bitwise_and_(_MASK)
        c2 = ((a >> 32) ^ c3 ^ k1).bitwise_and_(_MASK)
        # The low halves and the raised keys: what stands above their 32 bits falls to the next mask.
        c1, c3 = b, a
        k0, k1 = k0 + _KEY_A, k1 + _KEY_B
    return c0, c1 & _MASK, c2, c3 & _MASK


def uniform_from_bits(bits: Tensor) -> Tensor:
    """32 random bits -> float32 in (0, 1), centred in their cell: (bits + 1/2) / 2**32.

    Small values keep 24 significant bits down to 2**-33, so ``u < p`` happens with probability p within 2**-33 for
    small p; 24 fixed bits would never accept p = 1e-8.
    """
    return ((bits.float() + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)


def uniform(stream: int, position: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """One uniform for each position (int64, broadcast against ``seed`` and ``step``)."""
    if position.numel() == 0:
        return torch.empty(torch.broadcast_shapes(position.shape, seed.shape), device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    bits = philox(zero, 4 * position + stream, step & _MASK, (step >> 32) & _MASK, seed)[0]
    return uniform_from_bits(bits)


def exponential_row(stream: int, position: Tensor, seed: Tensor, step: Tensor, vocab: int) -> Tensor:
    """Independent Exp(1) float32 ``[rows, vocab]`` for int64 ``[rows]`` of position, seed and step.

    The index of the smallest ``exponential / weight`` is distributed like the weights (the exponential race, which is
    Gumbel-max without its second logarithm). ``-log1p(-u)`` keeps the smallest values, which decide the race, exact.
    """
    groups, rest = divmod(vocab, GROUP_WIDTH)
    counters = groups * LANE_WIDTH + min(rest, LANE_WIDTH)
    words = philox(
        torch.arange(counters, device=seed.device),
        (4 * position + stream)[:, None],
        (step & _MASK)[:, None],
        ((step >> 32) & _MASK)[:, None],
        seed[:, None],
    )
    bits = torch.empty((seed.shape[0], groups + (rest > 0), 4, LANE_WIDTH), dtype=torch.int64, device=seed.device)
    if rest == 0 or rest >= LANE_WIDTH:
        for lane, word in enumerate(words):
            bits[:, :, lane] = word.unflatten(1, (-1, LANE_WIDTH))
    elif groups == 0:
        bits = words[0]
    else:
        whole = groups * LANE_WIDTH
        for lane, word in enumerate(words):
            bits[:, :groups, lane] = word[:, :whole].unflatten(1, (-1, LANE_WIDTH))
        bits[:, groups, 0, :rest] = words[0][:, whole:]
    return uniform_from_bits(bits.flatten(1)[:, :vocab]).neg_().log1p_().neg_()
