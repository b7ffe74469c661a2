"""Steps that verification of drafts and of trees share on the CPU: Philox, a row of logits, and the race over weights.

The numbers are those of ``kvops/eager/philox.py``, which says what each counter stands for.
"""

import numpy as np

from kvops.kernels.cpu.elements import LOG2_E, exp2, widen
from kvops.kernels.cpu.jit import exact, jit
from kvops.kernels.cpu.vector import address_of

ACCEPT, RESAMPLE = 0, 1  # streams of random numbers
_MASK = 0xFFFFFFFF
_LANE = 256  # entries of a group that one word of the counters serves
_GROUP = 4 * _LANE


@jit
def philox(counter, position, stream, seed, step):
    """Four random words of 32 bits, in int64: a product of two words wraps around, which leaves its 64 bits right."""
    c0, c1, c2, c3 = counter, 4 * position + stream, step & _MASK, (step >> 32) & _MASK
    low, high = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ low, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ high, a & _MASK
        low, high = (low + 0x9E3779B9) & _MASK, (high + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


@exact
def uniform(word):
    """float32 in (0, 1), centred in its cell."""
    return min((np.float32(word) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))


@exact
def _exponential(word):
    return -np.log1p(-uniform(word))


@jit
def exponent_scale(temperature):
    """log2(e) / temperature, kept finite: a temperature near 0 takes the largest logit, inf is uniform."""
    return min(max(np.float32(LOG2_E) / temperature, np.float32(1e-30)), np.float32(1e38))


@jit
def _ordered(bits):
    """An integer that orders as the float32 with these bits does."""
    bits = np.int32(0) if bits == np.int32(-(2**31)) else bits  # the two zeros are equal
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@jit
def first_largest(row):
    """The largest number, its first index, and whether the row can be used: no NaN, no +inf, not only -inf."""
    bits = row.view(np.int32)
    highest, magnitude = np.int32(-(2**31)), np.int32(0)
    for i in range(len(bits)):
        highest = max(highest, np.int32(_ordered(bits[i])))
        magnitude = max(magnitude, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    first = 0
    while np.int32(_ordered(bits[first])) != highest:
        first += 1
    return row[first], first, magnitude <= 0x7F800000 and -np.inf < row[first] < np.inf


@jit
def read_row(address, element, row):
    """Make ``row``, a view of whole vectors, the logits at ``address``; see :func:`first_largest`."""
    widen(address, element, len(row), address_of(row))
    return first_largest(row)


@jit
def soften(row, largest, scale):
    """Make logits weights, exp((x - largest) / temperature), and return their sum."""
    total = np.float32(0)
    for i in range(len(row)):
        row[i] = exp2((row[i] - largest) * scale)
        total += row[i]
    return total


@jit
def subtract(weights, factor, probs):
    """Make weights max(factor * weight - prob, 0), which is 0 beside a NaN, and return their sum."""
    total = np.float32(0)
    for i in range(len(weights)):
        excess = weights[i] * factor - probs[i]
        weights[i] = excess if excess > 0 else np.float32(0)
        total += weights[i]
    return total


@jit
def race(weights, position, seed, step, fallback):
    """An index drawn by weight, ``fallback`` where none is positive: the smallest exponential / weight wins. Groups of
    1024 indices race by their sums, and then the winner's indices by their own weights."""
    start = 0
    if len(weights) > _GROUP:
        best = np.float32(0)
        for group in range(-(-len(weights) // _GROUP)):
            mass = np.float32(0)
            for i in range(group * _GROUP, min((group + 1) * _GROUP, len(weights))):
                mass += weights[i]
            score = mass / _exponential(philox(_LANE + group, position, RESAMPLE, seed, step)[0])
            if score > best:
                best, start = score, group * _GROUP
    best, winner = np.float32(0), fallback
    for lane in range(min(_LANE, len(weights))):
        words = philox(lane, position, RESAMPLE, seed, step)
        for word in range(4):
            i = start + word * _LANE + lane
            if i < len(weights) and weights[i] > 0:
                score = weights[i] / _exponential(words[word])
                if score > best or (score == best and i < winner):
                    best, winner = score, i
    return winner
