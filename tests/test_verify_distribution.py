"""Lossless means the target's distribution: chi-square over 200,000 trials, and faults that the same test does find.

A trial decodes two tokens from a small target model whose second row depends on the first token. Drafts come from
another model (or from nowhere, for point masses); where the first call emits one token, a second call goes on.
"""

import pytest
import torch
from speculation import chi_square

import kvops
from kvops.eager import verify as eager
from kvops.eager.philox import exponential_row

TRIALS, V = 200_000, 5
TEMPERATURE = 0.7
PASS = 1e-4  # a right sampler fails one run in 10,000, and the seeds are fixed

_generator = torch.Generator().manual_seed(7)
TARGET = torch.randn(1 + V + V * V, V, generator=_generator)
DRAFTER = torch.softmax(TARGET + torch.randn(TARGET.shape, generator=_generator), -1)
TARGET[2, 3] = float("-inf")


def context(*tokens):
    """The row of TARGET and DRAFTER behind these tokens (none, one or two)."""
    if not tokens:
        return torch.zeros(TRIALS, dtype=torch.int64)
    if len(tokens) == 1:
        return 1 + tokens[0]
    return 1 + V + tokens[0] * V + tokens[1]


def from_own_noise(probs, seed):
    return torch.multinomial(probs, 1)[:, 0]


def decode_two(
    num_drafts, with_probs, *, method="token", draw=from_own_noise, wire=lambda logits, probs: (logits, probs)
):
    """The first two tokens of each trial as one number."""
    seed = torch.arange(TRIALS)
    temperature = torch.full((TRIALS,), TEMPERATURE)

    def guess(row):
        if with_probs:
            return draw(DRAFTER[row], seed), DRAFTER[row]
        return (row * 3 + 1 + torch.randint(0, 2, (TRIALS,))) % V, None

    def call(before, drafts_left, step):
        """Verify ``drafts_left`` drafts behind the tokens ``before``."""
        rows, drafts, probs = [context(*before)], [], []
        for _ in range(drafts_left):
            draft, q = guess(rows[-1])
            drafts.append(draft)
            probs.append(q)
            rows.append(context(*before, *drafts))
        logits = TARGET[torch.stack(rows, 1)]
        drafted = torch.stack(drafts, 1) if drafts else torch.empty(TRIALS, 0, dtype=torch.int64)
        q = torch.stack(probs, 1) if with_probs and probs else None
        logits, q = wire(logits, q)
        return kvops.verify_draft(
            logits,
            drafted,
            draft_probs=q,
            temperature=temperature,
            seed=seed,
            step=torch.full_like(seed, step),
            method=method,
        )

    tokens, accepted = call((), num_drafts, 0)
    first = tokens[:, 0]
    # Where only one token came, decode on from it; the drafter goes on too.
    more, _ = call((first,), 1, 1)
    second = torch.where(accepted > 0, tokens[:, 1] if num_drafts else -1, more[:, 0])
    return first * V + second


def expected():
    p = torch.softmax(TARGET.double() / TEMPERATURE, -1)
    return (p[0][:, None] * p[1 : 1 + V]).flatten()


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("method", ["token", "block"])
def test_two_tokens_are_distributed_as_the_target_s(num_drafts, with_probs, method):
    assert chi_square(decode_two(num_drafts, with_probs, method=method), expected()) > PASS


def test_blocks_accept_more_than_tokens():
    accepted = {}
    for method in ("token", "block"):
        probs = DRAFTER[torch.arange(3)].expand(TRIALS, 3, V)
        generator = torch.Generator().manual_seed(1)
        drafts = torch.multinomial(probs.reshape(-1, V), 1, generator=generator).view(TRIALS, 3)
        _, accepted[method] = kvops.verify_draft(
            TARGET[[0, 1, 3, 4]].expand(TRIALS, 4, V),
            drafts,
            draft_probs=probs,
            temperature=torch.ones(TRIALS),
            seed=torch.arange(TRIALS),
            method=method,
        )
    gain = (accepted["block"] - accepted["token"]).double()
    assert gain.mean() > 5 * gain.std() / TRIALS**0.5


def test_fault_block_residual_without_the_accepted_drafts(monkeypatch):
    right = eager._accept_block

    def ratio_of_one(*args):
        stop, ratio = right(*args)
        return stop, torch.ones_like(ratio)

    monkeypatch.setattr(eager, "_accept_block", ratio_of_one)
    assert chi_square(decode_two(2, True, method="block"), expected()) < PASS


def test_fault_block_drafts_tested_token_by_token(monkeypatch):
    """Token by token acceptance does not go with the residual of a block."""

    def first_failure(*args):
        stop, _ = eager._accept_tokens(*args)
        _, ratio = right(*args)
        return stop, ratio

    right = eager._accept_block
    monkeypatch.setattr(eager, "_accept_block", first_failure)
    assert chi_square(decode_two(2, True, method="block"), expected()) < PASS


def test_fault_drafts_drawn_with_the_noise_of_the_residual():
    zero = torch.zeros(TRIALS, dtype=torch.int64)

    def shared(probs, seed):
        return (probs / exponential_row(eager.RESAMPLE, zero, seed, zero, V)).argmax(-1)

    assert chi_square(decode_two(1, True, draw=shared), expected()) < PASS


def test_fault_one_stream_for_acceptance_and_residual(monkeypatch):
    monkeypatch.setattr(eager, "RESAMPLE", eager.ACCEPT)
    assert chi_square(decode_two(1, True), expected()) < PASS


def test_fault_probabilities_that_the_draft_was_not_drawn_from():
    def flattened(logits, probs):
        return logits, torch.softmax(probs.log() * 0.9, -1)

    assert chi_square(decode_two(1, True, wire=flattened), expected()) < PASS


def test_fault_temperature_on_one_side():
    def colder(logits, probs):
        return logits * TEMPERATURE, probs

    assert chi_square(decode_two(1, True, wire=colder), expected()) < PASS


def test_fault_bonus_from_the_row_before():
    def off_by_one(logits, probs):
        return torch.cat((logits[:, :1], logits[:, :1], logits[:, 2:]), 1) if logits.shape[1] > 1 else logits, probs

    assert chi_square(decode_two(1, True, wire=off_by_one), expected()) < PASS


@pytest.mark.parametrize("fault", [None, "whole target", "not renormalised"])
def test_fault_of_the_residual(fault):
    """A sampler in two lines, right and wrong: drawing refused positions from p, or from max(p - q, 0) without its
    normaliser (what is missing then falls to the last token)."""
    p = torch.softmax(TARGET[0] / TEMPERATURE, -1)
    q = DRAFTER[0]
    draft = torch.multinomial(q.expand(TRIALS, V), 1)[:, 0]
    refused = torch.rand(TRIALS) * q[draft] >= p[draft]
    residual = p if fault == "whole target" else (p - q).clamp_min(0)
    if fault != "not renormalised":
        residual = residual / residual.sum()
    replaced = torch.searchsorted(residual.cumsum(0), torch.rand(TRIALS)).clamp_max(V - 1)
    pvalue = chi_square(torch.where(refused, replaced, draft), p)
    assert pvalue > PASS if fault is None else pvalue < PASS


@pytest.mark.parametrize("vocab", [5, 700, 3000])
def test_a_race_is_uniform_over_equal_weights(vocab):
    """No lane, group or end of the vocabulary is favoured."""
    trials = 6000
    position = torch.zeros(trials, dtype=torch.int64)
    exponential = exponential_row(eager.RESAMPLE, position, torch.arange(trials), position, vocab)
    assert chi_square(exponential.argmin(-1) * 5 // vocab, torch.bincount(torch.arange(vocab) * 5 // vocab)) > PASS
    mean, spread = exponential.double().mean().item(), (exponential.numel()) ** -0.5
    assert abs(mean - 1) < 5 * spread
    assert abs((exponential < 0.01).double().mean().item() - 0.00995017) < 5 * (0.01**0.5) * spread
