"""Logit processing: one function for the drafter and for the target, so that both have the same filters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvops import checks

BadWords = Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]
LogitBias = Mapping[int, float] | Sequence[Mapping[int, float] | None] | Tensor

_PARTIAL_SORT = 1024  # on a CPU a nucleus is first sought among this many largest logits: a full sort costs 20 times


# Over 80 lines: 18 are the signature, 39 what the arguments mean.
def process_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    repetition_penalty: float | Tensor | None = None,
    presence_penalty: float | Tensor | None = None,
    frequency_penalty: float | Tensor | None = None,
    context: Tensor | None = None,
    prompt_lens: Tensor | None = None,
    draft_tokens: Tensor | None = None,
    parents: Tensor | None = None,
    bad_words: BadWords = (),
    logit_bias: LogitBias | None = None,
    min_p_first: bool = False,
) -> Tensor:
    """Apply penalties and filters to logits. The softmax of the result is the distribution to sample from.

    The order is logit bias, penalties, bad words, temperature, top-k, top-p, min-p. Excluded tokens get -inf. Process
    the drafter's logits, sample the draft from their softmax, and pass this softmax to ``verify_draft`` as
    ``draft_probs``. Process the target's logits with the same arguments and pass the result to ``verify_draft`` with a
    temperature of 1 (0 for greedy requests), because the temperature has been applied. Row t follows the context and
    the first t drafts.

    Args:
        logits: float16, bfloat16 or float32 ``[B, T, V]``.
        temperature: at least 0, a number or ``[B]``; a request at 0 is greedy and its logits are not divided.
        top_k: keeps the k largest, of equal ones those of lower index; 0 keeps all.
        top_p: keeps the largest until their probabilities sum to p, at least one token; 1 keeps all (Holtzman et al.,
            arXiv 1904.09751). Applies to what top-k kept.
        min_p: keeps tokens of at least this share of the largest probability (Nguyen et al., arXiv 2407.01082).
        min_p_first: apply min-p before top-k and top-p, as vLLM does, and not after them, as transformers does. The
            results differ where top-p then divides what min-p has left.
        repetition_penalty: divides the positive and multiplies the negative logits of every token of the context
            (Keskar et al., arXiv 1909.05858); 1 changes nothing.
        presence_penalty, frequency_penalty: subtracted once, and once for each occurrence, from the logits of the
            tokens of the context after ``prompt_lens``.
        context: int64 or int32 ``[B, L]``, the tokens so far, padded with -1 on the right. None for an empty context.
        prompt_lens: int32 or int64 ``[B]``, the length of the prompt within the context. None for 0.
        draft_tokens: int64 or int32 ``[B, T - 1]`` or wider, padded with -1: row t follows the first t drafts.
        parents: int32 ``[B, T]``, for trees of drafts, as in :func:`verify_tree`: ``draft_tokens`` is then ``[B, T]``,
            node 0 is the root (the context's last token), and row t follows node t and its ancestors.
        bad_words: token sequences that may not be completed: ``[[17], [3, 5]]`` for all requests, or one such list for
            each request, ``[[[17], [3, 5]], []]``.
        logit_bias: what is added to the logits of tokens: ``{17: -2.5}`` for all requests, one such mapping (or None)
            for each request, or a float32 tensor ``[V]`` or ``[B, V]``. Mappings, and bad words for each request, are
            copied to the device in every call, which a CUDA graph cannot do: a tensor is not.

    Returns:
        float32 ``[B, T, V]``. A row without an allowed token has no finite logit, and a row with a NaN keeps it:
        ``verify_draft`` refuses both.

    Raises:
        ValueError, TypeError: an argument is out of range, or of the wrong shape or dtype. Numbers in tensors are
            checked with ``KVOPS_DEBUG=1``.
    """
    checks.expect_tensor("logits", logits)
    checks.expect_rank("logits", logits, "[batch, rows, vocab]")
    checks.expect_dtype("logits", logits, *checks.FLOAT_DTYPES)
    B, T, V = logits.shape
    number = _Numbers(logits)
    highest = torch.finfo(torch.float32).max  # inf times 0 is NaN
    divisor = number.floats("temperature", temperature, 0.0, highest)
    k = number.integers("top_k", top_k)
    p = number.floats("top_p", top_p, 0.0, 1.0)
    floor = number.floats("min_p", min_p, 0.0, 1.0)
    repetition = number.floats("repetition_penalty", repetition_penalty, 1e-6, highest)
    presence = number.floats("presence_penalty", presence_penalty, -highest, highest)
    frequency = number.floats("frequency_penalty", frequency_penalty, -highest, highest)
    before = _Prefixes(_context(context, prompt_lens, logits), *_drafts(draft_tokens, parents, logits))
    words = _bad_words(bad_words, B, V)
    added = token_bias(logit_bias, logits)

    x = logits.to(torch.float32, copy=True)
    if V == 0 or B * T == 0:
        return x
    if added is not None:
        x += added
    x = _penalise(x, before, repetition, presence, frequency, prompt_lens)
    if words:
        _forbid(x, before, words)
    if divisor is not None:
        # The largest logit becomes 0, so that no temperature overflows; one below 1e-30 counts as 1e-30.
        largest = x.amax(-1, keepdim=True)
        x = torch.where((divisor > 0) & largest.isfinite(), (x - largest) / divisor.clamp_min(1e-30), x)
    if floor is not None and min_p_first:
        x = _keep_likely(x, floor)
    if k is not None or p is not None:
        x = _keep_largest(x, k, p, top_k if isinstance(top_k, int) else None)
    if floor is not None and not min_p_first:
        x = _keep_likely(x, floor)
    return x


class _Numbers:
    """Checked options, each a number or a tensor with one element per request, as ``[1 or B, 1, 1]``."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def floats(self, name: str, value: float | Tensor | None, lowest: float, highest: float) -> Tensor | None:
        if value is None:
            return None
        if isinstance(value, Tensor):
            numbers = self._tensor(name, value, torch.float32)
            if checks.debug():
                checks.expect_data(name, f"numbers from {lowest} to {highest}", (value >= lowest) & (value <= highest))
            return numbers
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number or a float32 tensor [batch], got {type(value).__name__}")
        checks.expect_between(name, value, lowest, highest)
        return torch.full((1, 1, 1), value, dtype=torch.float32, device=self.logits.device)

    def integers(self, name: str, value: int | Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if isinstance(value, Tensor):
            numbers = self._tensor(name, value, torch.int32, torch.int64).long()
            if checks.debug():
                checks.expect_data(name, "numbers of at least 0", value >= 0)
            return numbers
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int or an integer tensor [batch], got {type(value).__name__}")
        checks.expect_at_least(name, value, 0)
        return torch.full((1, 1, 1), value, dtype=torch.int64, device=self.logits.device)

    def _tensor(self, name: str, value: Tensor, *dtypes: torch.dtype) -> Tensor:
        checks.expect_dtype(name, value, *dtypes)
        checks.expect_shape(name, value, "[batch]", self.logits.shape[0])
        checks.expect_same_device(name, value, "logits", self.logits)
        return value[:, None, None]


def _context(context: Tensor | None, prompt_lens: Tensor | None, logits: Tensor) -> Tensor:
    if prompt_lens is not None:
        checks.expect_dtype("prompt_lens", prompt_lens, torch.int32, torch.int64)
        checks.expect_shape("prompt_lens", prompt_lens, "[batch]", logits.shape[0])
    if context is None:
        return torch.empty((logits.shape[0], 0), dtype=torch.int64, device=logits.device)
    tokens = checks.expect_tokens("context", context)
    checks.expect_shape("context", context, "[batch, length]", logits.shape[0], None)
    checks.expect_same_device("context", context, "logits", logits)
    return tokens


def _drafts(draft_tokens: Tensor | None, parents: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """The token that each row after the first ends with, int64 [B, T - 1], and the row it follows (None: the last)."""
    B, T, _ = logits.shape
    rows = max(T - 1, 0)
    if parents is not None:
        checks.expect_dtype("parents", parents, torch.int32, torch.int64)
        checks.expect_shape("parents", parents, "[batch, rows]", B, T)
        checks.expect_same_device("parents", parents, "logits", logits)
        if draft_tokens is None:
            raise ValueError("draft_tokens: expected int64 [batch, rows] along with parents, got None")
        checks.expect_shape("draft_tokens", draft_tokens, "[batch, rows]", B, T)
    if draft_tokens is None:
        return torch.full((B, rows), -1, dtype=torch.int64, device=logits.device), None
    draft_tokens = checks.expect_tokens("draft_tokens", draft_tokens)
    checks.expect_shape("draft_tokens", draft_tokens, "[batch, rows - 1 or more]", B, None)
    checks.expect_at_least("draft_tokens.shape[1]", draft_tokens.shape[1], rows)
    checks.expect_same_device("draft_tokens", draft_tokens, "logits", logits)
    if parents is None:
        return draft_tokens[:, :rows], None
    return draft_tokens[:, 1:], parents.long().clamp_min(0)


class _Prefixes:
    """The tokens before each row of the logits: the text, then the drafts that the row follows."""

    def __init__(self, text: Tensor, drafts: Tensor, parents: Tensor | None) -> None:
        self.text, self.drafts, self.parents = text, drafts, parents

    def counts(self, V: int, *, skip: Tensor | None = None) -> Tensor:
        """float32 [B, T, V]: occurrences of each token before each row, without the first ``skip`` [B] of the text."""
        text = self.text
        if skip is not None:
            text = text.masked_fill(torch.arange(text.shape[1], device=text.device) < skip[:, None], -1)
        B, T = self.drafts.shape[0], self.drafts.shape[1] + 1
        count = torch.zeros((B, T, V), dtype=torch.float32, device=text.device)
        requests = torch.arange(B, device=text.device)
        for row in range(T):
            tokens = self.drafts[:, row - 1 : row] if row else text
            if row:
                count[:, row] = count[:, row - 1] if self.parents is None else count[requests, self.parents[:, row]]
            inside = (tokens >= 0) & (tokens < V)
            count[:, row].scatter_add_(1, tokens.clamp(0, V - 1), inside.float())
        return count

    def endings(self, length: int) -> Tensor:
        """int64 [B, T, length]: the last tokens before each row, the nearest first, padded with -1."""
        B, T = self.drafts.shape[0], self.drafts.shape[1] + 1
        device = self.text.device
        end = (self.text >= 0).sum(1, keepdim=True)
        place = end - 1 - torch.arange(length, device=device)
        padded = torch.nn.functional.pad(self.text, (0, 1), value=-1)
        before = padded.gather(1, place.clamp(0, self.text.shape[1])).masked_fill(place < 0, -1)
        ending = before[:, None].repeat(1, T, 1)
        requests = torch.arange(B, device=device)
        for row in range(1, T):
            parent = ending[:, row - 1] if self.parents is None else ending[requests, self.parents[:, row]]
            ending[:, row] = torch.cat((self.drafts[:, row - 1 : row], parent[:, :-1]), 1)
        return ending


def _bad_words(bad_words: BadWords, B: int, V: int) -> list[tuple[list[int], Sequence[int] | None]]:
    """Each word, and the requests that may not complete it (None: all)."""
    if not all(_is_list(word) for word in bad_words):
        raise TypeError(f"bad_words: expected sequences of tokens, such as [[17], [3, 5]], got {bad_words}")
    of_request: dict[tuple[int, ...], list[int]] = {}
    if any(_is_list(item) for given in bad_words for item in given) or (bad_words and not any(map(len, bad_words))):
        if len(bad_words) != B:
            raise ValueError(
                "bad_words: expected sequences of tokens for all requests, or a list of them for each of "
                f"{B} requests, got {len(bad_words)} lists"
            )
        for request, given in enumerate(bad_words):
            for word in _words(given, V):
                of_request.setdefault(tuple(word), []).append(request)
        return [(list(word), requests) for word, requests in of_request.items()]
    return [(word, None) for word in _words(bad_words, V)]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _words(words: Sequence[Any], V: int) -> list[list[int]]:
    if not all(map(_is_list, words)):
        raise TypeError(f"bad_words: expected sequences of tokens, such as [[17], [3, 5]], got {words}")
    given = [checks.ints("bad_words", word) for word in words]
    if any(len(word) == 0 or min(word) < 0 or max(word) >= V for word in given):
        raise ValueError(f"bad_words: expected sequences of tokens inside the vocabulary of {V}, got {given}")
    return given


def token_bias(logit_bias: LogitBias | None, logits: Tensor) -> Tensor | None:
    """What ``logit_bias`` of :func:`process_logits` adds to ``logits``, float32 [1 or B, 1, V], or None for nothing."""
    B, _, V = logits.shape
    if isinstance(logit_bias, Tensor):
        checks.expect_dtype("logit_bias", logit_bias, torch.float32)
        if logit_bias.dim() == 1:
            checks.expect_shape("logit_bias", logit_bias, "[vocab]", V)
        else:
            checks.expect_shape("logit_bias", logit_bias, "[batch, vocab]", B, V)
        checks.expect_same_device("logit_bias", logit_bias, "logits", logits)
        if checks.debug():
            checks.expect_data("logit_bias", "numbers below inf", logit_bias < math.inf)
        return logit_bias.view(-1, 1, V)
    if logit_bias is None:
        return None
    of_request = [logit_bias] if isinstance(logit_bias, Mapping) else logit_bias
    if not _is_list(of_request) or not all(given is None or isinstance(given, Mapping) for given in of_request):
        raise TypeError(
            "logit_bias: expected a mapping from tokens to numbers, such as {17: -2.5}, one for each request, or a "
            f"float32 tensor, got {checks.shown(logit_bias)}"
        )
    if not isinstance(logit_bias, Mapping) and len(of_request) != B:
        raise ValueError(f"logit_bias: expected a mapping for each of {B} requests, got {len(of_request)}")
    places, numbers = [], []
    for request, given in enumerate(of_request):
        for token, number in zip(checks.ints("logit_bias", list(given or ())), (given or {}).values(), strict=True):
            if not 0 <= token < V:
                raise ValueError(f"logit_bias: expected tokens inside the vocabulary of {V}, got {token}")
            # -inf forbids a token. A NaN or +inf would spoil the row.
            if not checks.holds("logit_bias", number, lambda value: value < math.inf):
                raise ValueError(f"logit_bias: expected numbers below inf, got {number} of token {token}")
            places.append(request * V + token)
            numbers.append(float(number))
    added = torch.zeros(len(of_request), 1, V, dtype=torch.float32, device=logits.device)
    at = torch.tensor(places, dtype=torch.int64, device=logits.device)
    added.view(-1)[at] = torch.tensor(numbers, dtype=torch.float32, device=logits.device)
    return added


def _penalise(
    x: Tensor,
    before: _Prefixes,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    prompt_lens: Tensor | None,
) -> Tensor:
    """The logits ``x`` after the penalties of tokens that occur before their row."""
    V = x.shape[-1]
    if repetition is not None:
        seen = before.counts(V) > 0
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    if presence is not None or frequency is not None:
        count = before.counts(V, skip=prompt_lens)
        if presence is not None:
            x = x - presence * (count > 0)
        if frequency is not None:
            x = x - frequency * count
    return x


def _forbid(x: Tensor, before: _Prefixes, words: Sequence[tuple[list[int], Sequence[int] | None]]) -> None:
    ending = before.endings(max(1, max(len(word) for word, _ in words) - 1))
    for (*head, last), requests in words:
        rows: Any = slice(None) if requests is None else torch.tensor(requests, device=x.device)
        column = x[rows, :, last]
        forbidden = ~column.isnan()  # a NaN is refused, forbidden or not
        for back, token in enumerate(reversed(head)):
            forbidden &= ending[rows, :, back] == token
        x[rows, :, last] = column.masked_fill(forbidden, -math.inf)


def _keep_likely(x: Tensor, min_p: Tensor) -> Tensor:
    return x.masked_fill(x < x.amax(-1, keepdim=True) + min_p.log(), -math.inf)  # log(0) keeps everything


def _keep_largest(x: Tensor, top_k: Tensor | None, top_p: Tensor | None, common_k: int | None) -> Tensor:
    """Apply top-k and top-p as one number of largest logits to keep in each row.

    ``common_k`` is the top-k of all rows, where it is one number.
    """
    V = x.shape[-1]
    eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()  # where reading data does not synchronise
    count = torch.full((1, 1, 1), V, device=x.device)
    if top_k is not None:
        count = torch.where(top_k > 0, top_k.clamp_max(V), V)
    if common_k is not None and 0 < common_k < V:
        ordered = x.topk(common_k).values
    elif eager_cpu and V > _PARTIAL_SORT:
        ordered = x.topk(_PARTIAL_SORT).values
        if not _suffices(x, ordered, count, top_p):
            ordered = x.sort(descending=True).values
    else:
        ordered = x.sort(descending=True).values
    if top_p is not None:
        kept = torch.arange(ordered.shape[-1], device=x.device) < count
        total = ordered.masked_fill(~kept, -math.inf).logsumexp(-1, keepdim=True)
        if ordered.shape[-1] != common_k:  # otherwise top-k cuts every row
            total = torch.where(count >= V, x.logsumexp(-1, keepdim=True), total)
        probability = torch.exp(ordered - total)
        preceding = probability.cumsum(-1) - probability
        nucleus = (preceding < top_p).sum(-1, keepdim=True).clamp_min(1)
        count = torch.minimum(count, torch.where(top_p >= 1, V, nucleus))
    count = count.expand(*x.shape[:2], 1)
    limit = ordered.gather(-1, (count - 1).clamp_max(ordered.shape[-1] - 1))
    limit = torch.where(ordered[..., :1].isnan(), math.nan, limit)  # a row with a NaN keeps nothing
    above, equal = x > limit, x == limit
    room = count - above.sum(-1, keepdim=True)
    if not eager_cpu or bool((equal.sum(-1, keepdim=True) > room).any()):  # ties are rare, and counting them is slow
        equal = equal & (equal.cumsum(-1) <= room)
    return x.masked_fill(~(above | equal | (count >= V)), -math.inf)


def _suffices(x: Tensor, ordered: Tensor, count: Tensor, top_p: Tensor | None) -> bool:
    """Whether each row's cut lies within its ``ordered`` largest logits (or nothing is cut)."""
    width, V = ordered.shape[-1], x.shape[-1]
    inside = count <= width
    if top_p is not None:
        mass = torch.exp(ordered - x.logsumexp(-1, keepdim=True)).sum(-1, keepdim=True)
        inside = inside | (top_p >= 1) & (count >= V) | (mass - 1e-4 > top_p) & (count >= V)
    else:
        inside = inside | (count >= V)
    return bool(inside.all())
