"""Lossless means the target's distribution: chi-square over 200,000 trials, and faults that the same test does find.

A trial decodes two tokens from a small target model whose second row depends on the first token. Drafts come from
another model (or from nowhere, for point masses); where the first call emits one token, a second call goes on. Trees
have the same tests in test_verify_tree.py.
"""

import pytest
import torch
from conftest import DEVICE
from speculation import chi_square

import kvops
from kvops.eager import philox
from kvops.eager import verify as eager

TRIALS, V = 200_000, 5
TEMPERATURE = 0.7
PASS = 1e-4  # a right sampler fails one run in 10,000, and the seeds are fixed
MODES = ["point mass", "draft probabilities", "block", "block, point mass"]

_generator = torch.Generator().manual_seed(7)
TARGET = torch.randn(1 + V + V * V, V, generator=_generator)
DRAFTER = torch.softmax(TARGET + torch.randn(TARGET.shape, generator=_generator), -1).to(DEVICE)
TARGET[2, 3] = float("-inf")
TARGET = TARGET.to(DEVICE)

inside_eager = pytest.mark.skipif(DEVICE != "cpu", reason="the fault is put into the eager implementation")


@pytest.fixture(autouse=True)
def _faults_are_put_into_the_eager_code(request, monkeypatch):
    if request.node.name.startswith("test_fault"):
        monkeypatch.setenv("KVOPS_CPU", "eager")


def context(*tokens):
    """The row of TARGET and DRAFTER behind these tokens (none, one or two)."""
    if not tokens:
        return torch.zeros(TRIALS, dtype=torch.int64, device=DEVICE)
    if len(tokens) == 1:
        return 1 + tokens[0]
    return 1 + V + tokens[0] * V + tokens[1]


def from_own_noise(probs, seed):
    return torch.multinomial(probs, 1)[:, 0]


def decode_two(mode, num_drafts, *, draw=from_own_noise, wire=lambda logits, probs: (logits, probs)):
    """The first two tokens of each trial as one number."""
    seed = torch.arange(TRIALS, device=DEVICE)
    temperature = torch.full((TRIALS,), TEMPERATURE, device=DEVICE)
    method, with_probs = ("block" if "block" in mode else "token"), "point mass" not in mode

    def guess(row):
        if with_probs:
            return draw(DRAFTER[row], seed), DRAFTER[row]
        return (row * 3 + 1 + torch.randint(0, 2, (TRIALS,), device=DEVICE)) % V, None

    def call(before, drafts_left, step):
        """Verify ``drafts_left`` drafts behind the tokens ``before``."""
        rows, drafts, probs = [context(*before)], [], []
        for _ in range(drafts_left):
            draft, q = guess(rows[-1])
            drafts.append(draft)
            probs.append(q)
            rows.append(context(*before, *drafts))
        logits = TARGET[torch.stack(rows, 1)]
        drafted = torch.stack(drafts, 1) if drafts else seed.new_empty(TRIALS, 0)
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
    return (first * V + second).cpu()


def expected():
    p = torch.softmax(TARGET.double().cpu() / TEMPERATURE, -1)
    return (p[0][:, None] * p[1 : 1 + V]).flatten()


@pytest.mark.parametrize("num_drafts", [0, 1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cpu", ["eager", ""])
def test_two_tokens_are_distributed_as_the_target_s(mode, num_drafts, cpu, monkeypatch):
    monkeypatch.setenv("KVOPS_CPU", cpu)
    assert chi_square(decode_two(mode, num_drafts), expected()) > PASS


def accepted_by(method, seed, num_drafts):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_drafts + 1, V, generator=generator).to(DEVICE)
    probs = torch.softmax(torch.randn(num_drafts, V, generator=generator), -1).expand(TRIALS, num_drafts, V)
    drafts = torch.multinomial(probs.reshape(-1, V), 1, generator=generator).view(TRIALS, num_drafts)
    return kvops.verify_draft(
        logits.expand(TRIALS, -1, V),
        drafts.to(DEVICE),
        draft_probs=probs.to(DEVICE),
        temperature=torch.ones(TRIALS, device=DEVICE),
        seed=torch.arange(TRIALS, device=DEVICE),
        method=method,
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_blocks_accept_more_than_tokens(seed):
    accepted = [accepted_by(method, seed, 3)[1].double() for method in ("block", "token")]
    gain = accepted[0] - accepted[1]
    assert gain.mean() > 5 * gain.std() / TRIALS**0.5


def test_a_block_of_one_is_a_token():
    for block, token in zip(accepted_by("block", 4, 1), accepted_by("token", 4, 1), strict=True):
        assert torch.equal(block, token)


# The faults, each in every mode that it can strike.


@inside_eager
@pytest.mark.parametrize("mode", ["draft probabilities", "block"])
def test_fault_drafts_drawn_with_the_noise_of_the_residual(mode):
    zero = torch.zeros(TRIALS, dtype=torch.int64)

    def shared(probs, seed):
        return eager.race(probs, zero, seed, zero, zero)

    assert chi_square(decode_two(mode, 1, draw=shared), expected()) < PASS


@inside_eager
@pytest.mark.parametrize("mode", MODES)
def test_fault_one_stream_for_acceptance_and_residual(monkeypatch, mode):
    monkeypatch.setattr(philox, "RESAMPLE", philox.ACCEPT)
    assert chi_square(decode_two(mode, 1), expected()) < PASS


@pytest.mark.parametrize("mode", ["draft probabilities", "block"])
def test_fault_probabilities_that_the_draft_was_not_drawn_from(mode):
    def flattened(logits, probs):
        return logits, torch.softmax(probs.log() * 0.9, -1)

    assert chi_square(decode_two(mode, 1, wire=flattened), expected()) < PASS


@pytest.mark.parametrize("mode", MODES)
def test_fault_temperature_on_one_side(mode):
    def colder(logits, probs):
        return logits * TEMPERATURE, probs

    assert chi_square(decode_two(mode, 1, wire=colder), expected()) < PASS


@pytest.mark.parametrize("mode", MODES)
def test_fault_bonus_from_the_row_before(mode):
    def off_by_one(logits, probs):
        return torch.cat((logits[:, :1], logits[:, :1], logits[:, 2:]), 1) if logits.shape[1] > 1 else logits, probs

    assert chi_square(decode_two(mode, 1, wire=off_by_one), expected()) < PASS


@inside_eager
@pytest.mark.parametrize("mode", ["block", "block, point mass"])
def test_fault_block_residual_without_the_accepted_drafts(monkeypatch, mode):
    """The residual of a block has to be normalised by what the accepted drafts used up. A point mass uses up its own
    entry alone, so that leaving the factor out is no fault there."""
    right = eager._accept_block

    def ratio_of_one(*args):
        stop, ratio = right(*args)
        return stop, torch.ones_like(ratio)

    monkeypatch.setattr(eager, "_accept_block", ratio_of_one)
    pvalue = chi_square(decode_two(mode, 2), expected())
    assert pvalue < PASS if mode == "block" else pvalue > PASS


@inside_eager
def test_fault_block_drafts_tested_token_by_token(monkeypatch):
    """Token by token acceptance does not go with the residual of a block."""

    def first_failure(*args):
        stop, _ = eager._accept_tokens(*args)
        _, ratio = right(*args)
        return stop, ratio

    right = eager._accept_block
    monkeypatch.setattr(eager, "_accept_block", first_failure)
    assert chi_square(decode_two("block", 2), expected()) < PASS


@pytest.mark.parametrize("fault", [None, "whole target", "not renormalised"])
def test_fault_of_the_residual(fault):
    """A sampler in two lines, right and wrong: drawing refused positions from p, or from max(p - q, 0) without its
    normaliser (what is missing then falls to the last token). The race itself needs no normaliser."""
    p = torch.softmax(TARGET[0].cpu() / TEMPERATURE, -1)
    q = DRAFTER[0].cpu()
    draft = torch.multinomial(q.expand(TRIALS, V), 1)[:, 0]
    refused = torch.rand(TRIALS) * q[draft] >= p[draft]
    residual = p if fault == "whole target" else (p - q).clamp_min(0)
    if fault != "not renormalised":
        residual = residual / residual.sum()
    replaced = torch.searchsorted(residual.cumsum(0), torch.rand(TRIALS)).clamp_max(V - 1)
    pvalue = chi_square(torch.where(refused, replaced, draft), p)
    assert pvalue > PASS if fault is None else pvalue < PASS


# A large vocabulary is drawn from in two steps: a group of 1024, then an entry of it.


def draws_of_large(vocab, trials=10_000):
    """Draws from one row of random logits, and its distribution; the last group is by far the smallest."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    tokens, _ = kvops.verify_draft(
        logits.to(DEVICE).expand(trials, 1, vocab),
        torch.empty(trials, 0, dtype=torch.int64, device=DEVICE),
        temperature=torch.ones(trials, device=DEVICE),
        seed=torch.arange(trials, device=DEVICE),
    )
    return tokens[:, 0].cpu(), torch.softmax(logits.double(), -1)


def by_place_and_by_rest(tokens, p):
    """p-values of the draws in 20 equal parts of the vocabulary, and by the rest of a division by 31."""
    index = torch.arange(len(p))
    return [
        chi_square(key[tokens], torch.zeros(int(key.max()) + 1, dtype=torch.float64).scatter_add(0, key, p))
        for key in (index * 20 // len(p), index % 31)
    ]


@pytest.mark.parametrize("vocab", [20, 700, 2148])
def test_draws_from_large_vocabularies(vocab):
    assert min(by_place_and_by_rest(*draws_of_large(vocab))) > PASS


@inside_eager
def test_fault_groups_that_race_without_their_weights(monkeypatch):
    """Equal chances for all groups, the small last one among them."""
    right = eager.race_exponentials

    def any_group(position, seed, step, groups, width):
        of_groups, of_entries = right(position, seed, step, groups, width)
        return torch.ones_like(of_groups).scatter_(1, seed[:, None] % groups, 1e-9), of_entries

    monkeypatch.setattr(eager, "race_exponentials", any_group)
    assert min(by_place_and_by_rest(*draws_of_large(2148))) < PASS


def test_exponentials_are_exponential():
    one = torch.zeros(3000, dtype=torch.int64)
    exponential = torch.cat(philox.race_exponentials(one, torch.arange(3000), one, 300, 1024), 1)
    spread = exponential.numel() ** -0.5
    assert abs(exponential.double().mean().item() - 1) < 5 * spread
    assert abs((exponential < 0.01).double().mean().item() - 0.00995017) < 5 * (0.01**0.5) * spread
