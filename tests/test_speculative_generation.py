"""Generation with drafts of every kind: it emits what it would without them, and its caches hold what they should."""

import pytest
import torch
from speculation import chi_square
from test_generate import prompts_of, reference_logits, tiny_model

import kvops
from kvops.generation import passes, sampler, speculation
from kvops.generation.generate import generate
from kvops.generation.passes import decode, new_cache
from kvops.models.llama import Llama
from kvops.policies import POLICIES, Compression

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
    "scored again, in chunks": Compression(ratio=2, policy=POLICIES["tova"](), protect_last=6, every=5, chunk=8),
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


def lists_of(cache):
    """Keys, values, positions and scores of every list, in order."""
    found = []
    for layer in range(cache.num_layers):
        for row in range(cache.max_batch):
            for head in range(cache.num_kv_heads):
                slot = torch.arange(int(cache.seq_lens[layer, row, head]))
                block = cache.block_tables[layer, row, head].cpu()[slot // cache.block_size].long()
                sides = (cache.k_cache, cache.v_cache, cache.positions, cache.scores)
                found.append([side.cpu()[block, slot % cache.block_size] for side in sides])
    return found


@pytest.mark.parametrize("tokens", [1, 3, 6, 11])
def test_retained_tokens_move_together_and_the_others_go(backend, device, tokens):
    """Ragged heads, a path across block boundaries, one row with fewer real tokens and one with none."""
    cache = kvops.PagedKVCache(
        num_layers=2, num_kv_heads=2, head_dim=3, num_blocks=80, max_batch=3, max_tokens=24, block_size=4, device=device
    )
    torch.manual_seed(0)
    for new in ([9, 6, 3], [tokens, max(tokens - 2, 0), 0]):
        q_lens = torch.tensor(new, dtype=torch.int32, device=device)
        positions = cache.extend(max(new), q_lens=q_lens)
        for layer in range(2):
            k = torch.randn(3, max(new), 2, 3, device=device)
            cache.append(layer, k, -k, positions, q_lens=q_lens)
        if new[0] == 9:
            scores = torch.rand(3, 2, 9, device=device)
            for layer in range(2):
                cache.set_scores(layer, scores + 0.3 * layer)
            cache.evict([9, 5, 3])  # heads and layers now differ in length
    cache.scores += torch.rand(cache.scores.shape, device=device)
    before, lens, positions = lists_of(cache), cache.seq_lens.clone(), cache.next_positions.clone()
    assert lens.unique().numel() >= 4
    keep = torch.rand(3, tokens) < 0.5
    cache.retain(keep.to(device), q_lens=q_lens)
    stay = []
    for row, count in enumerate(q_lens.tolist()):
        stay.append(keep[row, :count])
        assert int(cache.next_positions[row]) == int(positions[row]) - int((~stay[row]).sum())
    for number, (sides, old) in enumerate(zip(lists_of(cache), before, strict=True)):
        row = number // 2 % 3
        new = stay[row]
        kept = torch.cat((torch.ones(len(old[0]) - len(new), dtype=torch.bool), new))
        for side, was in zip(sides, old, strict=True):
            assert torch.equal(side, was[kept])


def test_retain_names_bad_input():
    cache = new_cache(tiny_model(), max_batch=2, max_tokens=32)
    cache.extend(3)
    keep = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"^keep: expected dtype bool"):
        cache.retain(keep.int())
    with pytest.raises(ValueError, match=r"^keep: expected shape"):
        cache.retain(keep[:1])
    with pytest.raises(ValueError, match=r"^keep: expected at most as many tokens as the shortest list"):
        cache.retain(keep)
    with pytest.raises(ValueError, match=r"^q_lens: expected numbers from 0 to 4"):
        cache.retain(keep, q_lens=torch.tensor([5, 0], dtype=torch.int32))


@pytest.mark.parametrize("tree", [1, 3])
@pytest.mark.parametrize("window", [None, 9])
def test_refused_drafts_leave_no_scores_behind(tree, window):
    """Every slot is left with the score that it has after decoding the same tokens one by one."""
    model = tiny_model(sliding_window=window)
    compression = Compression(ratio=1, policy=POLICIES["h2o"](), every=100)
    scores = []
    for options in ({}, {"draft": drafter_of(model), "tree": tree, "num_draft": 4}):
        cache = new_cache(model, max_batch=2, max_tokens=80)
        held = {}

        def keep_scores(rows, cache=cache, held=held):
            lists = lists_of(cache)  # by layer, row and head
            held[rows.start] = [lists[4 * layer + 2 * rows.start + head][3] for layer in range(2) for head in range(2)]

        cache.free = keep_scores
        generate(model, prompts_of(20, 20), max_new_tokens=12, compression=compression, cache=cache, **options)
        scores.append(torch.cat(held[0] + held[1]))
        assert len(held[0][0]) == 31
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)


def test_a_prompt_whose_tokens_are_all_forbidden_ends_and_the_others_go_on():
    model = tiny_model()
    prompts = prompts_of(9, 12)
    plain = generate(model, prompts, max_new_tokens=8).tokens
    # What the second prompt says third may come only behind something else: everything is forbidden there.
    bad = [[plain[1][1], token] for token in range(model.config.vocab_size)]
    assert plain[1][1] not in plain[0]
    result = generate(model, prompts, max_new_tokens=8, bad_words=bad, draft=drafter_of(model))
    assert result.tokens == [plain[0], plain[1][:2]]
    assert result.stats.refused == 1
    everything = [[token] for token in range(model.config.vocab_size)]
    nothing = generate(model, prompts, max_new_tokens=8, bad_words=everything)
    assert (nothing.tokens, nothing.stats.refused) == ([[], []], 2)


def test_filters_hold_for_each_prompt_as_they_would_alone_and_reach_every_position():
    model = tiny_model()
    prompts = prompts_of(14, 9)
    plain = generate(model, prompts, max_new_tokens=10).tokens
    given = {"repetition_penalty": [1.0, 3.0], "top_k": 5, "presence_penalty": [0.0, 2.0], "bad_words": [[plain[0][4]]]}
    filtered = generate(model, prompts, max_new_tokens=10, **given)
    assert plain[0][4] not in filtered.tokens[0]
    own_words = generate(model, prompts, max_new_tokens=10, bad_words=[[[plain[0][4]]], []]).tokens
    assert plain[0][4] not in own_words[0]
    assert own_words[1] == plain[1]
    assert filtered.tokens[0][:4] == plain[0][:4]
    assert filtered.tokens[1] != plain[1]
    for tree in (1, 2):
        for draft in (drafter_of(model), "prompt_lookup"):
            options = {"draft": draft, "tree": tree, "num_draft": 4, "min_ngram": 1}
            assert generate(model, prompts, max_new_tokens=10, **given, **options).tokens == filtered.tokens


def test_branches_are_the_best_occurrences_that_go_on_differently():
    text = [1, 2, 3, 7, 1, 2, 4, 8, 2, 5, 6, 1, 2, 3, 9, 1, 2]
    rows = torch.full((2, 24), -1)
    rows[0, : len(text)] = torch.tensor(text)
    rows[1, :3] = torch.tensor([4, 5, 6])
    lens = torch.tensor([len(text), 3], dtype=torch.int32)
    drafter = speculation.LookupDrafter(3, 3, min_ngram=1, max_ngram=3)
    drafts = drafter.propose(rows, lens, torch.ones_like(lens), [2, 2])
    # [1, 2] came last at 11, then at 4; [2] alone at 8; all drafts are cut to two tokens, and the row without a match
    # has none.
    assert drafts.tokens.tolist() == [[3, 9, 4, 8, 5, 6], [-1] * 6]
    assert drafts.lens.tolist() == [6, 0]
    assert drafts.parents.tolist() == [[-1, 0, 1, 0, 3, 0, 5], [-1] * 7]
    chain = speculation.LookupDrafter(3, 1, min_ngram=1, max_ngram=3)
    assert chain.propose(rows, lens, torch.ones_like(lens), [2, 2]).tokens.tolist() == [[3, 9], [-1, -1]]


def test_a_model_s_tree_has_the_most_probable_continuations():
    """Against every pair of tokens, ranked by joint probability among those below the best first tokens."""
    model = tiny_model(vocab_size=11)
    prompt, width = [3, 1, 4, 1, 5], 3
    draw = sampler.Sampler(1, 11, torch.device("cpu"), prompt_lens=torch.tensor([4]), temperature=0.0, seed=0)
    drafter = speculation.ModelDrafter(model, draw, 2, width, max_batch=1, max_tokens=16)
    with torch.no_grad():
        drafter.begin(0, torch.tensor([prompt[:-1]]))
        text = torch.tensor([prompt + [-1] * 8])
        one = torch.ones(1, dtype=torch.int32)
        drafts = drafter.propose(text, 5 * one, one, [2])
    first = torch.log_softmax(reference_logits(model, prompt)[-1], -1)
    best = first.argsort(descending=True)[:width]
    pairs = {
        (int(a), b): float(first[a] + value)
        for a in best
        for b, value in enumerate(torch.log_softmax(reference_logits(model, [*prompt, int(a)])[-1], -1))
    }
    second = sorted(pairs, key=pairs.get, reverse=True)[:width]
    assert drafts.tokens[0].tolist() == [*best.tolist(), *[b for _, b in second]]
    assert drafts.parents[0].tolist() == [-1, 0, 0, 0, *[1 + best.tolist().index(a) for a, _ in second]]


def test_the_pace_follows_what_was_accepted():
    pace = speculation.Pace(7)
    lengths = []
    for _ in range(40):  # everything is refused
        lengths.append(pace.ahead())
        pace.learn(pace.ahead(), 0)
    assert lengths[:9] == [3, 1, 0, 1, 0, 0, 0, 1, 0]
    assert sum(lengths[8:]) == 4  # one pass in eight from there on
    while not pace.ahead():
        pace.learn(0, 0)
    lengths = []
    for _ in range(4):  # everything is accepted
        lengths.append(pace.ahead())
        pace.learn(pace.ahead(), pace.ahead())
    assert lengths == [1, 3, 7, 7]
    pace.learn(7, 0)
    assert pace.ahead() == 1  # a single refusal makes nobody wait
    pace.learn(0, 0)  # nothing was found to draft
    assert pace.ahead() == 1


def test_statistics_of_drafts_add_up():
    model = tiny_model()
    stats = generate(model, PROMPTS, max_new_tokens=20, draft=drafter_of(model), num_draft=3).stats
    assert stats.plain_steps == 19
    assert stats.decoded_tokens == stats.accepted + stats.sequence_steps == 4 * 19
    assert stats.tokens_per_pass == pytest.approx(1 + stats.accepted_per_step)
    assert 0 < stats.draft_seconds < stats.decode_seconds
    per_pass = (stats.decode_seconds - stats.draft_seconds) / stats.steps
    if stats.undrafted_steps:
        per_pass = stats.undrafted_seconds / stats.undrafted_steps
    assert stats.seconds_saved == pytest.approx(19 * per_pass - stats.decode_seconds)
    assert generate(model, PROMPTS, max_new_tokens=3).stats.seconds_saved == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": tiny_model(vocab_size=50)}, "draft: expected a model with the vocabulary of 97 tokens .* 50"),
        ({"draft": tiny_model(max_positions=8)}, "draft: expected a model of at least 19 positions"),
        ({"draft": tiny_model(), "tree": 0}, "tree: expected at least 1, got 0"),
        ({"draft": tiny_model(), "tree": 98}, "tree: expected at most the vocabulary of 97 tokens, got 98"),
        ({"num_draft": 0}, "num_draft: expected at least 1, got 0"),
        ({"verification": "all"}, "verification: expected one of"),
        ({"top_p": 1.5}, "top_p: expected a number from 0.0 to 1.0"),
        ({"top_k": [5, -1, 3]}, "top_k: expected one number or 1, one for each prompt, got 3"),
        ({"min_p": [-1.0]}, "min_p: expected a number"),
        ({"temperature": -1.0}, "temperature: expected finite numbers of at least 0"),
        ({"bad_words": [[97]]}, "bad_words: expected sequences of tokens inside the vocabulary of 97"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        generate(tiny_model(), [[1, 2, 3]], max_new_tokens=16, **changes)


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

    def prefill_all(a_model, cache, tokens, row, policy=None, recent=None):
        if row == 0:  # all requests have one prompt: one pass for all of them
            states[id(a_model)] = decode(a_model, cache, tokens.expand(TRIALS, -1))
        return states[id(a_model)][row : row + 1]

    monkeypatch.setattr(passes, "prefill", prefill_all)
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
