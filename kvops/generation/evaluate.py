"""How well a model goes on from a cache, compressed or not: forced tokens instead of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvops.cache import PagedKVCache
from kvops.generation.passes import Decoder, decode


@torch.no_grad()
def forced_logits(
    model: Decoder, cache: PagedKVCache, last_hidden: Tensor, tokens: Tensor, *, row: int = 0, chunk: int = 64
) -> Tensor:
    """The logits that predict each of ``tokens``, given the cache's ``row`` and the tokens before: float32 [N, V].

    ``last_hidden`` [1, 1, hidden] is the hidden state of the last token in the cache, ``tokens`` int64 [N]. The tokens
    but the last are appended to the cache, ``chunk`` at a time.
    """
    predicted = [model.logits(last_hidden)[0]]
    for piece in tokens[:-1].split(chunk):
        hidden = decode(model, cache, piece[None], rows=slice(row, row + 1))
        predicted.append(model.logits(hidden)[0])
    return torch.cat(predicted).float()


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    """exp of the mean negative log-likelihood of ``tokens`` int64 [N] under ``logits`` float32 [N, V]."""
    return float(F.cross_entropy(logits, tokens).exp())


def agreement(logits: Tensor, tokens: Tensor) -> float:
    """The share of ``tokens`` int64 [N] that are the most likely under ``logits`` float32 [N, V]."""
    return float((logits.argmax(-1) == tokens).float().mean())
