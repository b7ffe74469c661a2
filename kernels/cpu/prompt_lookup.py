"""Prompt lookup on the CPU: one walk over each text."""

from typing import NamedTuple

import torch
from numba import int32, int64

from kvops.kernels.cpu.arguments import Binding, unpack
from kvops.kernels.cpu.jit import inner, jit
from kvops.kernels.cpu.threads import run_shares, worth
from kvops.prepared import prepared


class Call(NamedTuple):
    tokens: int64[:, :]  # [B, L]
    lens: int64[:]  # [B]
    draft_tokens: int64[:, :]  # [B, num_draft]
    draft_lens: int32[:]  # [B]
    max_ngram: int64
    min_ngram: int64


@jit
def _matched(text, length, start, most):
    """How many tokens before ``start`` are those at the end of the text."""
    count = 0
    while count < min(most, start) and text[start - 1 - count] == text[length - 1 - count]:
        count += 1
    return count


@jit
def _find(text, length, num_draft, max_ngram, min_ngram):
    """Where the text goes on behind its longest match, 0 for none: of equals the latest that ``num_draft`` tokens
    follow, else the earliest."""
    best, longest = 0, min_ngram - 1
    for start in range(1, length):
        if text[start - 1] != text[length - 1]:
            continue
        matched = _matched(text, length, start, max_ngram)
        if matched > longest or (best > 0 and matched == longest and start + num_draft <= length):
            best, longest = start, matched
    return best


@inner
def _lookup_share(share, shares, call):
    num_draft = call.draft_tokens.shape[1]
    for b in range(share, len(call.tokens), shares):
        text, length = call.tokens[b], min(max(call.lens[b], 0), call.tokens.shape[1])
        start = _find(text, length, num_draft, call.max_ngram, call.min_ngram)
        count = min(num_draft, length - start) if start else 0
        for i in range(num_draft):
            call.draft_tokens[b, i] = text[start + i] if i < count else -1
        call.draft_lens[b] = count


@jit
def _prompt_lookup(addresses, table, threads):
    call = unpack(Call, addresses, table)
    return run_shares(_lookup_share, (call,), worth(threads, 8 * call.tokens.size))


def _bind(
    tokens: torch.Tensor, lens: torch.Tensor, *, num_draft: int, max_ngram: int = 3, min_ngram: int = 1
) -> Binding:
    draft_tokens, draft_lens = _results(len(tokens), num_draft)
    return Binding(
        _prompt_lookup,
        Call,
        tokens=tokens,
        lens=lens.long(),
        draft_tokens=draft_tokens,
        draft_lens=draft_lens,
        max_ngram=max_ngram,
        min_ngram=min_ngram,
    )


def _results(batch: int, num_draft: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(batch, num_draft, dtype=torch.int64), torch.empty(batch, dtype=torch.int32)


@prepared(_bind)
def prompt_lookup(
    binding: Binding,
    tokens: torch.Tensor,
    lens: torch.Tensor,
    *,
    num_draft: int,
    max_ngram: int = 3,
    min_ngram: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`kvops.prompt_lookup`."""
    draft_tokens, draft_lens = _results(len(tokens), num_draft)
    binding(tokens, lens.long(), draft_tokens, draft_lens)
    return draft_tokens, draft_lens
