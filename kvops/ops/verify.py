"""Draft verification and prompt lookup: schemas, checks, fakes and the public functions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import verify as eager
from kvops.eager.verify import lookup_key as lookup_key
from kvops.eager.verify import lookup_start as lookup_start
from kvops.ops.registry import caller, register


def check_per_request(name: str, value: Tensor | None, reference: Tensor, *dtypes: torch.dtype) -> None:
    if value is None:
        return
    checks.expect_tensor(name, value)
    checks.expect_dtype(name, value, *dtypes)
    checks.expect_shape(name, value, "[batch]", reference.shape[0])
    checks.expect_same_device(name, value, "target_logits", reference)


def check_sampling(requests: Tensor, temperature: Tensor | None, seed: Tensor | None, step: Tensor | None) -> None:
    """Check what there is one of for each of the ``requests`` ``[batch, ...]``."""
    check_per_request("temperature", temperature, requests, torch.float32)
    check_per_request("seed", seed, requests, torch.int64)
    check_per_request("step", step, requests, torch.int64)
    if temperature is not None and seed is None:
        raise ValueError("seed: expected int64 [batch] along with temperature, got None")


def draw_seed(temperature: Tensor | None, seed: Tensor | None) -> Tensor | None:
    """The given seeds, or seeds from torch's default generator if sampling needs them."""
    if temperature is None or seed is not None:
        return seed
    checks.expect_tensor("temperature", temperature)
    return torch.randint(-(2**63), 2**63 - 1, temperature.shape, dtype=torch.int64, device=temperature.device)


def _check_verify_draft(
    target_logits: Tensor,
    draft_tokens: Tensor,
    *,
    draft_lens: Tensor | None = None,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    method: str = "token",
) -> None:
    checks.expect_choice("method", method, ("token", "block"))
    checks.expect_rank("target_logits", target_logits, "[batch, drafts + 1, vocab]")
    checks.expect_dtype("target_logits", target_logits, *checks.FLOAT_DTYPES)
    checks.expect_last_contiguous("target_logits", target_logits)
    B, rows, V = target_logits.shape
    checks.expect_at_least("target_logits.shape[1] (drafts + 1)", rows, 1)
    checks.expect_at_least("target_logits.shape[2] (vocab)", V, 1)
    checks.expect_dtype("draft_tokens", draft_tokens, torch.int64)
    checks.expect_shape("draft_tokens", draft_tokens, "[batch, drafts]", B, rows - 1)
    checks.expect_same_device("draft_tokens", draft_tokens, "target_logits", target_logits)
    check_per_request("draft_lens", draft_lens, target_logits, torch.int32, torch.int64)
    if draft_probs is not None:
        checks.expect_dtype("draft_probs", draft_probs, torch.float32)
        checks.expect_shape("draft_probs", draft_probs, "[batch, drafts, vocab]", B, rows - 1, V)
        checks.expect_last_contiguous("draft_probs", draft_probs)
        checks.expect_same_device("draft_probs", draft_probs, "target_logits", target_logits)
    check_sampling(target_logits, temperature, seed, step)
    if checks.debug() and checks.has_data(target_logits):
        check_draft_data(target_logits, draft_tokens, draft_lens, draft_probs, temperature)


def check_draft_data(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_lens: Tensor | None,
    draft_probs: Tensor | None,
    temperature: Tensor | None,
) -> None:
    B, rows, V = target_logits.shape
    T = rows - 1
    lens = torch.full((B,), T, device=target_logits.device) if draft_lens is None else draft_lens
    checks.expect_data("draft_lens", "lengths from 0 to the number of drafts", (lens >= 0) & (lens <= T))
    position = torch.arange(rows, device=target_logits.device)
    drafted = position[:T] < lens[:, None]
    lowest = -1 if draft_lens is None else 0
    checks.expect_data(
        "draft_tokens",
        f"tokens inside the vocabulary of {V} before each draft length",
        ~drafted | ((draft_tokens >= lowest) & (draft_tokens < V)),
    )
    # A NaN or an infinity makes the maximum NaN or inf; a row of -inf has nothing to sample.
    row_max = target_logits.amax(-1)
    checks.expect_data(
        "target_logits",
        "rows without NaN or +inf and with at least one finite logit",
        ~(position <= lens[:, None]) | row_max.isfinite(),
    )
    if temperature is not None:
        checks.expect_data(
            "temperature", "finite temperatures of at least 0", (temperature >= 0) & temperature.isfinite()
        )
    if draft_probs is not None and T:
        drafted = drafted & (draft_tokens >= 0)
        total = draft_probs.sum(-1)
        checks.expect_data(
            "draft_probs",
            "rows of probabilities that sum to 1",
            ~drafted | ((draft_probs.amin(-1) >= 0) & ((total - 1).abs() < 1e-3)),
        )
        drawn = draft_probs.gather(2, draft_tokens.clamp(0, V - 1)[..., None])[..., 0]
        checks.expect_data("draft_probs", "a positive probability for each draft token", ~drafted | (drawn > 0))


def _fake_verify_draft(
    target_logits: Tensor,
    draft_tokens: Tensor,
    *,
    draft_lens: Tensor | None = None,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    method: str = "token",
) -> tuple[Tensor, Tensor]:
    B, rows, _ = target_logits.shape
    return draft_tokens.new_empty((B, rows)), draft_tokens.new_empty(B, dtype=torch.int32)


_verify_draft = caller(
    register(
        "verify_draft(Tensor target_logits, Tensor draft_tokens, *, Tensor? draft_lens=None, Tensor? draft_probs=None, "
        "Tensor? temperature=None, Tensor? seed=None, Tensor? step=None, str method='token') -> (Tensor, Tensor)",
        check=_check_verify_draft,
        fake=_fake_verify_draft,
        eager=eager.verify_draft,
        kernel="kvops.kernels.verify_draft:verify_draft",
        cpu="kvops.kernels.cpu.verify_draft:verify_draft",
    )
)


def verify_draft(
    target_logits: Tensor,
    draft_tokens: Tensor,
    *,
    draft_lens: Tensor | None = None,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
    method: Literal["token", "block"] = "token",
) -> tuple[Tensor, Tensor]:
    """Verify drafted tokens against the target model, losslessly: emitted tokens have the target's distribution.

    Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Position t accepts its
    draft with probability min(1, p / q); the first refused position emits a token of the residual max(p - q, 0), and
    when every draft is accepted the last row emits one more. Greedy requests accept drafts that equal the target's
    argmax (the lowest index among ties). The logits are read once, plus one row for each sampled request.

    Args:
        target_logits: float16, bfloat16 or float32 ``[B, T + 1, V]``, the last dimension contiguous: row t is the
            target's prediction for the place of draft t, row T for the place after the last draft.
        draft_tokens: int64 or int32 ``[B, T]``. A token outside the vocabulary (-1 pads) ends the draft there. int32
            is converted (the operator itself takes int64).
        draft_lens: int32 (or int64) ``[B]``, the number of drafts of each request, 0 to T; None for T. Rows of
            ``target_logits`` past it are not read.
        draft_probs: float32 ``[B, T, V]``: the distribution that each draft was sampled from, with the drafter's
            temperature and filters applied. None: each draft is a point mass, such as prompt lookup gives.
        temperature: float32 ``[B]``, of the target; a request at 0 is greedy. None: all are.
        seed: int64 ``[B]``. Random numbers are Philox4x32-10 of (seed, step, position): the same on CPU and GPU and in
            any batch. If it is None with a temperature, seeds come from torch's default generator, which
            ``torch.manual_seed`` sets (the operator itself requires seeds).
        step: int64 ``[B]``, a number that differs between calls with the same seed, such as the length. None for 0.
        method: ``"token"`` as above, or ``"block"`` (Sun et al., arXiv 2403.10444): sampled requests test their drafts
            together, which is as lossless, accepts at least as many on average, and with ``draft_probs`` reads the
            logits a second time. Greedy requests are the same in both.

    Returns:
        ``tokens`` ``[B, T + 1]`` in the dtype of ``draft_tokens``: the accepted drafts, then the corrected or the bonus
        token, then -1; and ``num_accepted`` int32 ``[B]``. A row of logits with a NaN, a +inf or nothing but -inf is
        refused: a request that reaches it gets the drafts accepted before it and -1 in place of its next token.

    Raises:
        ValueError: shapes, layouts or devices that do not fit.
        TypeError: dtypes other than these.
        ValueError: under ``KVOPS_DEBUG=1``, lengths out of range, drafts outside the vocabulary, refused rows,
            negative temperatures, and draft probabilities that do not form a distribution or exclude their own draft.
    """
    tokens, num_accepted = _verify_draft(
        target_logits,
        checks.expect_tokens("draft_tokens", draft_tokens),
        draft_lens=draft_lens,
        draft_probs=draft_probs,
        temperature=temperature,
        seed=draw_seed(temperature, seed),
        step=step,
        method=method,
    )
    return tokens.to(draft_tokens.dtype), num_accepted


def _check_prompt_lookup(
    tokens: Tensor, lens: Tensor, *, num_draft: int, max_ngram: int = 3, min_ngram: int = 1
) -> None:
    checks.expect_rank("tokens", tokens, "[batch, length]")
    checks.expect_dtype("tokens", tokens, torch.int64)
    checks.expect_last_contiguous("tokens", tokens)
    checks.expect_dtype("lens", lens, torch.int32, torch.int64)
    checks.expect_shape("lens", lens, "[batch]", tokens.shape[0])
    checks.expect_same_device("lens", lens, "tokens", tokens)
    checks.expect_at_least("num_draft", num_draft, 0)
    checks.expect_at_least("min_ngram", min_ngram, 1)
    checks.expect_at_least("max_ngram", max_ngram, min_ngram)
    if checks.debug() and checks.has_data(tokens):
        checks.expect_data("lens", "lengths from 0 to tokens.shape[1]", (lens >= 0) & (lens <= tokens.shape[1]))


def _fake_prompt_lookup(
    tokens: Tensor, lens: Tensor, *, num_draft: int, max_ngram: int = 3, min_ngram: int = 1
) -> tuple[Tensor, Tensor]:
    B = tokens.shape[0]
    return tokens.new_empty((B, num_draft)), tokens.new_empty(B, dtype=torch.int32)


_prompt_lookup = caller(
    register(
        "prompt_lookup(Tensor tokens, Tensor lens, *, SymInt num_draft, int max_ngram=3, int min_ngram=1) "
        "-> (Tensor, Tensor)",
        check=_check_prompt_lookup,
        fake=_fake_prompt_lookup,
        eager=eager.prompt_lookup,
        kernel="kvops.kernels.prompt_lookup:prompt_lookup",
        cpu="kvops.kernels.cpu.prompt_lookup:prompt_lookup",
    )
)


def prompt_lookup(
    tokens: Tensor, lens: Tensor, *, num_draft: int, max_ngram: int = 3, min_ngram: int = 1
) -> tuple[Tensor, Tensor]:
    """Draft by searching the text for its last n-gram: batched, on the device, without synchronisation.

    The suffix of ``max_ngram`` tokens is searched first, then shorter ones down to ``min_ngram``. Of several earlier
    occurrences the latest with ``num_draft`` tokens after it is taken, otherwise the one with most tokens after it. So
    text that repeats with a short period is drafted over several periods. The tokens after the occurrence are the draft
    (Saxena, "Prompt Lookup Decoding", 2023).

    Args:
        tokens: int64 or int32 ``[B, L]``, the last dimension contiguous: the text of each request, from the left.
            int32 is converted, which copies the whole text (the operator itself takes int64).
        lens: int32 (or int64) ``[B]``, the length of each text, 0 to L; tokens past it are not read.
        num_draft: the most tokens to draft.
        max_ngram: the longest suffix to search for.
        min_ngram: the shortest suffix, at least 1.

    Returns:
        ``draft_tokens`` ``[B, num_draft]`` in the dtype of ``tokens``, padded with -1, and ``draft_lens`` int32
        ``[B]``: at most ``num_draft`` tokens and never past the end of the text; 0 without a match.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape or dtype, by its name; under
            ``KVOPS_DEBUG=1`` also a length out of range (clamped to the row otherwise).
    """
    text = checks.expect_tokens("tokens", tokens)
    drafts, draft_lens = _prompt_lookup(text, lens, num_draft=num_draft, max_ngram=max_ngram, min_ngram=min_ngram)
    return drafts.to(tokens.dtype), draft_lens
