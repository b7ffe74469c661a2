"""Generation with drafts of every kind: it emits what it would without them, and its caches hold what they should."""

import pytest
import torch
from speculation import chi_square
from test_generate import prompts_of, reference_logits, tiny_model

import kvops
from kvops.models import generate as generation
from kvops.models import sampler, speculation
from kvops.models.generate import Compression, generate
from kvops.models.llama import Llama
from kvops.models.passes import decode
from kvops.policies import POLICIES

PHRASE = prompts_of(12)[0]
PROMPTS = [PHRASE * 3, prompts_of(30)[0], PHRASE * 2, [5]]


def drafter_of(model: Llama, noise: float = 0.02) -> Llama:
    """A model that often agrees with ``model``."""
    drafter = tiny_model(sliding_window=model.config.sliding_window)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * noise
    return drafter


COMPRESSIONS = {
    "whole": None,
    "once": Compression(ratio=2, protect_first=2, protect_last=6),
    "again and again": Compression(ratio=2, protect_first=2, protect_last=6, every=7),
    "by what was attended": Compression(ratio=2, policy=POLICIES["h2o"](), protect_last=6, every=5),
}


@pytest.mark.parametrize("tree", [1, 3])
@pytest.mark.parametrize("kind", ["prompt_lookup", "model"])
@pytest.mark.parametrize(("cache", "window"), [("whole", 9), *((name, None) for name in COMPRESSIONS)])
def test_greedy_tokens_are_those_without_drafts_in_a_ragged_batch_and_alone(cache, window, kind, tree):
    model = tiny_model(sliding_window=window)
    options = {"max_new_tokens": 18, "compression": COMPRESSIONS[cache]}
    plain = generate(model, PROMPTS, **options).tokens
    options |= {"draft": kind if kind == "prompt_lookup" else drafter_of(model), "tree": tree, "num_draft": 4}
    drafted = generate(model, PROMPTS, min_ngram=1, **options)
    assert drafted.tokens == plain
    assert drafted.stats.accepted > 0 or kind == "prompt_lookup"  # a random model seldom quotes
    assert generate(model, PROMPTS[1:2], min_ngram=1, **options).tokens == plain[1:2]


@pytest.mark.parametrize("tree", [1, 2])
def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch(tree):
    model = tiny_model()
    options = {"max_new_tokens": 12, "draft": drafter_of(model), "tree": tree, "num_draft": 3, "top_k": 20}
    heats, seeds, penalties = [0.8, 0.0, 1.5, 1.0], [5, 6, 7, 8], [1.0, 1.3, 1.1, 1.0]
    given = {"temperature": heats, "seed": seeds, "repetition_penalty": penalties}
    together = generate(model, PROMPTS, **given, **options).tokens
    assert together == generate(model, PROMPTS, **given, **options).tokens
    for row, prompt in enumerate(PROMPTS):
        alone = {name: value[row] for name, value in given.items()}
        assert generate(model, [prompt], **alone, **options).tokens == together[row : row + 1]
    assert generate(model, PROMPTS, **{**given, "seed": 50}, **options).tokens != together


def test_kernels_draft_and_verify_the_same_trees(monkeypatch):
    model = tiny_model(num_layers=1)
    options = {"max_new_tokens": 5, "draft": tiny_model(num_layers=1), "tree": 2, "num_draft": 2}
    eager = generate(model, prompts_of(9, 3), temperature=[0.0, 1.0], **options)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert generate(model, prompts_of(9, 3), temperature=[0.0, 1.0], **options).tokens == eager.tokens
    assert eager.stats.accepted > 0


# The distribution: three tokens of a model with a vocabulary of five, many requests at once.

V, TRIALS = 5, 8_000
FILTERS = {"temperature": 0.8, "top_p": 0.97, "repetition_penalty": 1.3, "frequency_penalty": 0.4}
PROMPT = [1, 2, 1, 2, 1]


def expected_joint(model: Llama, filters: dict) -> torch.Tensor:
    """The exact distribution of the first three tokens, in one number."""

    def following(tokens: list[int]) -> torch.Tensor:
        logits = reference_logits(model, tokens)[None, -1:].double().float()
        lens = torch.tensor([len(PROMPT)])
        return torch.softmax(
            kvops.process_logits(logits, context=torch.tensor([tokens]), prompt_lens=lens, **filters)[0, 0].double(), -1
        )

    joint = torch.ones(1, dtype=torch.float64)
    for length in range(3):
        contexts = torch.cartesian_prod(*[torch.arange(V)] * length).reshape(-1, length).tolist() if length else [[]]
        joint = torch.cat([joint[i] * following(PROMPT + tokens) for i, tokens in enumerate(contexts)])
    return joint


def sampled_joint(monkeypatch, model: Llama, filters: dict, **options) -> torch.Tensor:
    """The first three tokens of as many requests as there are trials, in one number each."""
    states = {}

    def prefill_all(a_model, cache, tokens, row, policy=None):
        if row == 0:  # all requests have one prompt: one pass for all of them
            states[id(a_model)] = decode(a_model, cache, tokens.expand(TRIALS, -1))
        return states[id(a_model)][row : row + 1]

    monkeypatch.setattr(generation, "prefill", prefill_all)
    monkeypatch.setattr(speculation, "prefill", prefill_all)
    with torch.no_grad():
        result = generate(model, [PROMPT] * TRIALS, max_new_tokens=3, seed=0, **filters, **options)
    assert result.stats.accepted > TRIALS // 10
    first, second, third = torch.tensor(result.tokens).unbind(1)
    return (first * V + second) * V + third


def small_models() -> tuple[Llama, Llama]:
    model, drafter = (tiny_model(num_layers=1, vocab_size=V, num_heads=2, num_kv_heads=1) for _ in range(2))
    with torch.no_grad():
        for each in (model, drafter):
            each.unembedding.weight *= 0.25
        drafter.unembedding.weight += 0.8 * torch.randn(V, 48, generator=torch.Generator().manual_seed(1))
    return model, drafter


@pytest.mark.parametrize("mode", ["lookup", "lookup tree", "model", "model block", "model tree"])
def test_three_tokens_are_distributed_as_without_drafts(monkeypatch, mode):
    model, drafter = small_models()
    options = {
        "draft": drafter if "model" in mode else "prompt_lookup",
        "tree": 2 if "tree" in mode else 1,
        "verification": "block" if "block" in mode else "token",
        "num_draft": 2,
        "min_ngram": 1,
    }
    outcomes = sampled_joint(monkeypatch, model, FILTERS, **options)
    assert chi_square(outcomes, expected_joint(model, FILTERS)) > 1e-4


def test_a_drafter_s_noise_is_not_the_verification_s_nor_used_twice():
    """What sharing it does to the distribution is shown in test_verify_distribution.py."""
    logits, lens = torch.zeros(20, 1, 5000), torch.full((20,), 7)
    draw = sampler.Sampler(20, 5000, torch.device("cpu"), prompt_lens=lens, temperature=1.0, seed=0)
    none = torch.empty(20, 0, dtype=torch.int64)
    verified, _ = kvops.verify_draft(logits, none, step=lens, **draw.arguments())
    drafts = [draw.draw_draft(logits, lens + (t << 32)) for t in range(2)] + [draw.draw_draft(logits, lens + 1)]
    for i, tokens in enumerate(drafts):
        assert (tokens == verified[:, 0]).sum() <= 1
        assert all((tokens == others).sum() <= 1 for others in drafts[:i])


def test_fault_penalties_that_do_not_see_the_drafts(monkeypatch):
    model, drafter = small_models()
    right = sampler.Sampler.process

    def blind(self, logits, text, drafts=None, parents=None):
        return right(self, logits, text, None if drafts is None else torch.full_like(drafts, -1), parents)

    monkeypatch.setattr(sampler.Sampler, "process", blind)
    outcomes = sampled_joint(monkeypatch, model, FILTERS, draft=drafter, num_draft=2)
    assert chi_square(outcomes, expected_joint(model, FILTERS)) < 1e-4
