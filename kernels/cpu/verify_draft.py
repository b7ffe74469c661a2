"""Draft verification on the CPU: every row of logits is read once, and the row of the emitted token once more."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import boolean, float32, int32, int64, uint8

from kvops.kernels.cpu.arguments import Binding, unpack
from kvops.kernels.cpu.elements import FORMATS, padded
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.kernels.cpu.vector import address_of
from kvops.kernels.cpu.verification import ACCEPT, exponent_scale, philox, race, read_row, soften, subtract, uniform
from kvops.prepared import prepared


class Call(NamedTuple):
    """The arguments of one call; what is not given has size 0.

    Packed requests follow one another without padding. The drafts of request b begin at ``ends[b]``, its rows of logits
    at ``ends[b] + b``: ``logits[b]`` is a view that begins at row b.
    """

    logits: uint8[:, :, :]  # [B, T + 1, V] bytes
    drafts: int64[:, :]  # [B, T]
    lens: int64[:]  # [B]
    ends: int32[:]  # [B + 1]
    probs: float32[:, :, :]  # [B, T, V]
    temperature: float32[:]  # [B]
    seed: int64[:]
    step: int64[:]
    tokens: int64[:, :]  # [B, T + 1]
    num_accepted: int32[:]
    element: int64
    vocabulary: int64
    block: int64  # whether drafts are tested together


class Rows(NamedTuple):
    """What is known of each row of logits, [B, T + 1]; the last two of sampled requests."""

    largest: float32[:, ::1]
    argmax: int64[:, ::1]
    usable: boolean[:, ::1]
    total: float32[:, ::1]  # of the weights
    drafted: float32[:, ::1]  # weight of the draft


class Randoms(NamedTuple):
    seed: int64
    step: int64


@inner
def _sampled(call, b):
    return call.temperature.size > 0 and call.temperature[b] > 0


@inner
def _place(call, b, t):
    return call.ends[b] + t if call.ends.size else t


@inner
def _logits(call, b, t):
    return address_of(call.logits[b, _place(call, b, t)])


@inner
def _draft(call, b, t):
    return call.drafts[b, _place(call, b, t)]


@inner
def _probs(call, b, t):
    return call.probs[b, _place(call, b, t)]


@inner
def _num_drafts(call, b):
    if call.ends.size:
        return call.ends[b + 1] - call.ends[b]
    T = call.drafts.shape[1]
    return min(max(call.lens[b], 0), T) if call.lens.size else T


@inner
def _is_token(call, token):
    return 0 <= token < call.vocabulary


@inner
def _read_share(share, shares, call, rows):
    """The facts about a share of the rows."""
    B, R = call.tokens.shape
    row = np.empty(padded(call.vocabulary), np.float32)[: call.vocabulary]
    for i in range(share, B * R, shares):
        b, t = i // R, i % R
        count = _num_drafts(call, b)
        if t > count:
            continue
        largest, argmax, usable = read_row(_logits(call, b, t), call.element, row)
        rows.largest[b, t], rows.argmax[b, t], rows.usable[b, t] = largest, argmax, usable
        if usable and _sampled(call, b):
            rows.total[b, t] = soften(row, largest, exponent_scale(call.temperature[b]))
            rows.drafted[b, t] = row[_draft(call, b, t)] if t < count and _is_token(call, _draft(call, b, t)) else 0


@inner
def _weights(call, rows, b, t, row):
    """The weights of a row that was read before."""
    read_row(_logits(call, b, t), call.element, row)
    soften(row, rows.largest[b, t], exponent_scale(call.temperature[b]))


@inner
def _accept_tokens(call, rows, b, count, randoms):
    """How many drafts pass one after another, u < p / q."""
    for t in range(count):
        threshold = uniform(philox(0, t, ACCEPT, randoms.seed, randoms.step)[0])
        if call.probs.size:
            threshold *= _probs(call, b, t)[_draft(call, b, t)]
        if not threshold * rows.total[b, t] < rows.drafted[b, t]:
            return t
    return count


@inner
def _accept_block(call, rows, b, count, randoms, row):
    """Algorithm 2 of arXiv 2403.10444: how many drafts stand, and the factor of p in the residual behind them."""
    stop, ratio, path = 0, np.float32(1), np.float32(1)
    for t in range(count):
        p = rows.drafted[b, t] / rows.total[b, t]
        if not call.probs.size:
            path *= p
        else:
            path = min(path * p / _probs(call, b, t)[_draft(call, b, t)], np.float32(1)) if p > 0 else np.float32(0)
        i = t + 1
        u = uniform(philox(0, t, ACCEPT, randoms.seed, randoms.step)[0])
        if i == count:
            passes = u < path
        else:
            if call.probs.size:
                _weights(call, rows, b, i, row)
                left = subtract(row, path / rows.total[b, i], _probs(call, b, i))
            else:
                left = path * (1 - rows.drafted[b, i] / rows.total[b, i])
            passes = u * (left + (1 - path)) < left
        if passes:
            stop, ratio = i, path
    return stop, ratio


@inner
def _sample(call, rows, b, row):
    """The number of drafts that a sampled request accepts, and the token behind them."""
    randoms = Randoms(call.seed[b], call.step[b] if call.step.size else 0)
    count = 0
    while count < _num_drafts(call, b) and rows.usable[b, count] and _is_token(call, _draft(call, b, count)):
        count += 1
    if call.block:
        accepted, ratio = _accept_block(call, rows, b, count, randoms, row)
    else:
        accepted, ratio = _accept_tokens(call, rows, b, count, randoms), np.float32(1)
    if not rows.usable[b, accepted]:
        return accepted, np.int64(-1)
    _weights(call, rows, b, accepted, row)
    if accepted < count:  # the draft was refused: its residual is left to draw from
        if call.probs.size:
            subtract(row, ratio / rows.total[b, accepted], _probs(call, b, accepted))
        else:
            row[_draft(call, b, accepted)] = 0
    return accepted, race(row, accepted, randoms.seed, randoms.step, rows.argmax[b, accepted])


@inner
def _emit_share(share, shares, call, rows):
    row = np.empty(padded(call.vocabulary), np.float32)[: call.vocabulary]
    for b in range(share, len(call.tokens), shares):
        if _sampled(call, b):
            accepted, following = _sample(call, rows, b, row)
        else:
            accepted, count = 0, _num_drafts(call, b)
            while (
                accepted < count and rows.usable[b, accepted] and _draft(call, b, accepted) == rows.argmax[b, accepted]
            ):
                accepted += 1
            following = rows.argmax[b, accepted] if rows.usable[b, accepted] else np.int64(-1)
        call.tokens[b] = -1
        for t in range(accepted):
            call.tokens[b, t] = _draft(call, b, t)
        call.tokens[b, accepted] = following
        call.num_accepted[b] = accepted


@jit
def _verify_draft(addresses, table, threads):
    call = unpack(Call, addresses, table)
    shape = call.tokens.shape
    rows = Rows(
        np.empty(shape, np.float32),
        np.empty(shape, np.int64),
        np.empty(shape, np.bool_),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
    )
    threads = worth(threads, 4 * call.tokens.size * call.logits.shape[2])
    succeeded = run_shares(_read_share, (call, rows), threads)
    # Greedy requests read no logits any more: one thread is faster than to wait for a second one.
    threads = min(threads, len(call.tokens)) if call.temperature.size else 1
    return run_shares(_emit_share, (call, rows), threads) and succeeded


def _bind(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    draft_lens: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    method: str = "token",
) -> Binding:
    batch, rows, V = target_logits.shape
    tokens, num_accepted = _results(batch, rows if max_seqlen is None else max_seqlen + 1)
    return Binding(
        _verify_draft,
        Call,
        logits=target_logits,
        drafts=draft_tokens,
        lens=None if draft_lens is None else draft_lens.long(),
        ends=cu_seqlens,
        probs=draft_probs,
        temperature=temperature,
        seed=seed,
        step=step,
        tokens=tokens,
        num_accepted=num_accepted,
        element=FORMATS[target_logits.dtype],
        vocabulary=V,
        block=method == "block",
    )


def _bind_varlen(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    draft_probs: torch.Tensor | None = None,
    **options: Any,
) -> Binding:
    batch, (N, V), stride = len(cu_seqlens) - 1, (len(draft_tokens), target_logits.shape[1]), target_logits.stride()
    return _bind(
        target_logits.as_strided((batch, N + 1, V), (stride[0], *stride)),
        draft_tokens.expand(batch, N),
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        draft_probs=None if draft_probs is None else draft_probs.expand(batch, N, V),
        **options,
    )


def _results(batch: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(batch, width, dtype=torch.int64), torch.empty(batch, dtype=torch.int32)


@prepared(_bind)
def verify_draft(
    binding: Binding,
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    *,
    draft_lens: torch.Tensor | None = None,
    draft_probs: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    method: str = "token",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvops.verify_draft`."""
    tokens, num_accepted = _results(*target_logits.shape[:2])
    lens = None if draft_lens is None else draft_lens.long()
    binding(target_logits, draft_tokens, lens, None, draft_probs, temperature, seed, step, tokens, num_accepted)
    return tokens, num_accepted


@prepared(_bind_varlen)
def verify_draft_varlen(
    binding: Binding,
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    draft_probs: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    method: str = "token",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvops.verify_draft_varlen`."""
    tokens, num_accepted = _results(len(cu_seqlens) - 1, max_seqlen + 1)
    binding(target_logits, draft_tokens, None, cu_seqlens, draft_probs, temperature, seed, step, tokens, num_accepted)
    return tokens, num_accepted
