"""Eviction policies: scores are what the papers' formulas say."""

import itertools
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from oracle import attention, attention_mask
from test_generate import tiny_model

import kvops
from kvops.generation.generate import generate
from kvops.policies import (
    H2O,
    POLICIES,
    RKV,
    TOVA,
    ByHeart,
    Compression,
    DefensiveKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVCompress,
    KVzip,
    Policy,
    Prefill,
    PyramidKV,
    Recited,
    SnapKV,
    Standout,
    Streaming,
    share_out,
)


@pytest.fixture
def layer():
    """q, k, v of a prompt of 45 tokens with 6 query and 2 KV heads, and the causal probabilities in float64."""
    q, k, v = torch.randn(1, 45, 6, 16), torch.randn(1, 45, 2, 16), torch.randn(1, 45, 2, 16)
    _, lse, p = attention(q, k, v, mask=attention_mask(45, 45, causal=True))
    return Prefill(q, k, v, lse.float()), p.unflatten(1, (2, 3))


def assert_scores(actual, exact):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, exact.float(), rtol=1e-5, atol=1e-6)


def test_h2o_sums_the_attention_of_all_queries(layer):
    seen, p = layer
    assert_scores(H2O().score(seen), p.sum((2, 3)))


def test_kv_compress_sums_squares_over_the_last_queries_and_the_group(layer):
    seen, p = layer
    assert_scores(KVCompress(observe=8).score(seen), (p[:, :, :, -8:] ** 2).sum((2, 3)))


@pytest.mark.parametrize("observe", [8, 44, 100])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_snapkv_pools_the_attention_of_the_last_queries_to_the_keys_before_them(layer, observe, pooling):
    seen, p = layer
    exact = p[:, :, :, -observe:].sum((2, 3))
    received = exact.clone()
    for key in range(45 - observe):
        near = received[..., max(0, key - 2) : min(key + 3, 45 - observe)]
        exact[..., key] = near.amax(-1) if pooling == "max" else near.sum(-1) / 5
    assert_scores(SnapKV(observe=observe, pool=5, pooling=pooling).score(seen), exact)


def test_streaming_prefers_later_tokens_and_those_still_to_come(layer):
    seen, _ = layer
    scores = Streaming().score(seen)
    assert scores.shape == (1, 2, 45)
    assert (scores.diff(dim=-1) > 0).all()
    assert (scores < 0).all()


def test_a_window_is_passed_on(layer):
    seen, _ = layer
    _, lse, p = attention(seen.q, seen.k, seen.v, mask=attention_mask(45, 45, causal=True, window_left=7))
    assert_scores(H2O().score(replace(seen, lse=lse.float(), window_left=7)), p.unflatten(1, (2, 3)).sum((2, 3)))


def test_tova_gives_all_heads_the_mean_attention_of_the_last_query(layer):
    seen, p = layer
    assert_scores(TOVA().score(seen), p[:, :, :, -1].mean((1, 2))[:, None].expand(1, 2, 45))


def test_knorm_prefers_small_keys(layer):
    seen, _ = layer
    assert_scores(Knorm().score(seen), -seen.k.double().pow(2).sum(-1).sqrt().transpose(1, 2))


def test_keydiff_prefers_keys_that_point_away_from_the_others(layer):
    seen, _ = layer
    k = seen.k.double().transpose(1, 2)
    unit = k / k.pow(2).sum(-1, keepdim=True).sqrt()
    anchor = unit.mean(2)
    cosine = torch.einsum("bhsd,bhd->bhs", unit, anchor) / anchor.pow(2).sum(-1).sqrt()[..., None]
    assert_scores(KeyDiff().score(seen), -cosine)


def test_standout_multiplies_the_worst_case_with_the_value_s_size_and_the_key_s_distance(layer):
    seen, p = layer
    worst = p[:, :, :, -8:].amax((2, 3))
    worst = torch.cat((F.max_pool1d(worst[..., :37], 5, stride=1, padding=2), worst[..., 37:]), -1)
    size = seen.v.double().pow(2).sum(-1).sqrt().transpose(1, 2)
    unit = F.normalize(seen.k.double(), dim=-1).transpose(1, 2)
    cosine = (unit * F.normalize(unit.mean(2, keepdim=True), dim=-1)).sum(-1)
    exact = worst * size * ((1 - cosine) / 2) ** 2
    assert_scores(Standout(observe=8, pool=5, distinctness=2).score(seen), exact)


@pytest.fixture
def recited(layer):
    """The same, recited."""
    seen, _ = layer
    return replace(seen, recited=Recited(torch.rand(1, 2, 45), 30 * torch.rand(1, 2, 45)))


def test_kvzip_takes_the_most_that_the_recital_paid_and_the_last_queries_where_there_is_none(recited, layer):
    assert_scores(KVzip().score(recited), recited.recited.most)
    seen, p = layer
    assert_scores(KVzip(observe=8).score(seen), p[:, :, :, -8:].amax((2, 3)))


def test_by_heart_adds_the_recital_to_the_worst_case_of_the_last_queries(recited, layer):
    ones = Standout(observe=8).score(layer[0])
    factor = ones / Standout(observe=8).attention(layer[0])
    exact = (recited.recited.total + 7 * Standout(observe=8).attention(layer[0])) * factor
    assert_scores(ByHeart(observe=8, weight=7).score(recited), exact)
    assert_scores(ByHeart(observe=8, weight=7).score(layer[0]), 7 * ones)
    assert_scores(ByHeart(weight=0).score(layer[0]), torch.zeros(1, 2, 45))


@pytest.mark.parametrize("policy", [KVzip(), ByHeart()], ids=["kvzip", "by-heart"])
def test_what_was_recited_before_is_worth_no_less_later(policy, recited):
    class Later(Prefill):
        earlier = torch.linspace(0, 40, 90).view(1, 2, 45)

    now, later = policy.score(recited), policy.score(Later(**vars(recited)))
    assert later.equal(torch.maximum(now, Later.earlier))
    assert not later.equal(now)


def test_defensive_kv_takes_the_worst_case_but_never_less_than_the_mean(layer):
    seen, p = layer
    worst = p[:, :, :, -8:].amax((2, 3))
    worst = torch.cat((F.max_pool1d(worst[..., :37], 5, stride=1, padding=2), worst[..., 37:]), -1)
    worst = worst.clamp(min=worst.mean(-1, keepdim=True))
    size = seen.v.double().abs().sum(-1).transpose(1, 2)
    assert_scores(DefensiveKV(observe=8, pool=5).score(seen), worst * size / size.sum(-1, keepdim=True))


def test_r_kv_weighs_attention_against_what_was_said_before(layer):
    """Against the definition, with the whole matrix; half of the keys are near copies of others."""
    seen, _ = layer
    k = seen.k.clone()
    k[:, 20:40] = k[:, :20] + 0.3 * torch.randn(1, 20, 2, 16)
    seen = replace(seen, k=k)
    received = SnapKV(observe=8, pool=5).score(seen).double() / (8 * 3)
    exact = torch.zeros(1, 2, 45, dtype=torch.float64)
    left_out = 0
    for head in range(2):
        unit = F.normalize(k[0, :, head].double(), dim=-1)
        cosine = (unit @ unit.T).fill_diagonal_(0)
        for key in range(45):
            similar = [other for other in range(45) if cosine[key, other] > 0.6]
            if similar:
                cosine[key, similar[-1]] = 0
                left_out += 1
        exact[0, head] = 0.2 * received[0, head] - 0.8 * cosine.mean(0).softmax(0)
    assert left_out > 40
    assert_scores(RKV(observe=8, pool=5, threshold=0.6, importance=0.2).score(seen), exact)


def test_expected_attention_is_the_mean_over_queries_drawn_from_the_prompts_own(layer):
    """The closed form against its definition: a sum over the future positions' rotations, written as matrices."""
    seen, _ = layer
    sinks, horizon, width = 3, 20, 16
    rope = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def rotation(position):
        cos, sin = (torch.diag(f(position * rope)) for f in (torch.cos, torch.sin))
        return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))

    mean_rotation = torch.stack([rotation(position) for position in range(45, 45 + horizon)]).mean(0)
    exact = torch.zeros(1, 2, 45, dtype=torch.float64)
    for head in range(6):
        q = torch.stack([rotation(i).T @ seen.q[0, i, head].double() for i in range(sinks, 45)])
        mean, covariance = mean_rotation @ q.mean(0), mean_rotation @ q.T.cov(correction=0) @ mean_rotation.T
        k = seen.k[0, sinks:, head // 3].double()
        expected = (k @ mean / 4 + (k @ covariance * k).sum(-1) / 32).softmax(0)
        exact[0, head // 3, sinks:] += expected / 3
    exact[..., sinks:] *= seen.v[:, sinks:].double().pow(2).sum(-1).sqrt().transpose(1, 2)
    exact[..., :sinks] = exact.amax(-1, keepdim=True)
    assert_scores(ExpectedAttention(horizon=horizon, sinks=sinks).score(replace(seen, rope=rope.float())), exact)


def test_expected_attention_asks_for_the_rotation(layer):
    with pytest.raises(ValueError, match="rope: expected"):
        ExpectedAttention().score(layer[0])


def test_a_prompt_of_nothing_but_sinks_is_scored(layer):
    seen, _ = layer
    short = Prefill(seen.q[:, :4], seen.k[:, :4], seen.v[:, :4], seen.lse[:, :, :4], rope=torch.ones(8))
    assert ExpectedAttention(sinks=4).score(short).isfinite().all()


def test_the_pyramid_falls_linearly_to_a_share_of_the_mean():
    weights = PyramidKV(steepness=20).layer_weights(30)
    assert sum(weights) == pytest.approx(30)
    assert weights[-1] == pytest.approx(1 / 20)
    steps = [high - low for high, low in itertools.pairwise(weights)]
    assert all(step == pytest.approx(steps[0]) and step > 0 for step in steps)
    assert PyramidKV().layer_weights(1) == [1.0]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("length", [1, 2, 45])
def test_every_policy_scores_a_prompt_of_any_length(policy, length, layer):
    seen, _ = layer
    seen = Prefill(*(x[:, :length] for x in (seen.q, seen.k, seen.v)), seen.lse[:, :, :length], rope=torch.ones(8))
    scores = policy().score(seen)
    assert scores.shape == (1, 2, length)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_policy_keeps_to_the_budget(policy):
    """Blocks in use after a compression of two prompts of different lengths, over layers and heads."""
    cache = kvops.PagedKVCache(
        num_layers=4, num_kv_heads=2, head_dim=16, num_blocks=400, max_batch=2, max_tokens=160, block_size=4
    )
    compression = Compression(ratio=4, policy=policy(), protect_first=2, protect_last=6)
    budget = 0
    for row, length in enumerate((150, 61)):
        rows = slice(row, row + 1)
        positions = cache.extend(length, rows=rows)
        for index in range(4):
            q, k, v = torch.randn(1, length, 6, 16), torch.randn(1, length, 2, 16), torch.randn(1, length, 2, 16)
            cache.append(index, k, v, positions, rows=rows)
            _, lse = kvops.flash_attention(q, k, v, causal=True)
            seen = Prefill(q, k, v, lse, layer=index, num_layers=4, rope=torch.ones(8))
            cache.set_scores(index, compression.policy.score(seen), rows=rows)
        compression.apply(cache, [length], rows)
        budget += cache.blocks_for(length) // 4
    lengths = cache.stats().lengths
    assert cache.stats().blocks_in_use == budget
    assert (lengths >= 8).all()
    if policy.scope == "head":
        assert (lengths[..., 0] - lengths[..., 1]).abs().max() <= 4, "heads of a layer that do not compete"
    if policy.scope != "sequence" and policy is not PyramidKV:
        layers = -(-lengths // 4)
        assert (layers.sum(-1).amax(0) - layers.sum(-1).amin(0)).max() <= 2, "heads have equal shares, give or take one"


def test_every_named_policy_is_exported():
    named = {value for value in vars(kvops.policies).values() if isinstance(value, type) and issubclass(value, Policy)}
    assert set(POLICIES.values()) == named - {Policy}


@pytest.mark.parametrize("scope", ["head", "sequence"])
def test_a_budget_for_each_layer_is_kept_by_each_layer_alone(backend, scope):
    layers, rows, heads, size = 3, 2, 2, 4
    cache = kvops.PagedKVCache(
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=16,
        num_blocks=layers * rows * heads * 8,
        max_batch=rows,
        max_tokens=8 * size,
        block_size=size,
    )
    positions = cache.extend(30)
    for layer in range(layers):
        cache.append(layer, torch.randn(rows, 30, heads, 16), torch.randn(rows, 30, heads, 16), positions)
        cache.set_scores(layer, torch.rand(rows, heads, 30))
    budgets = [[2, 5, 9], [16, 4, 3]]
    expected = [
        kvops.select_blocks(
            cache.scores,
            cache.block_tables[layer],
            cache.seq_lens[layer],
            torch.tensor([row[layer] for row in budgets], dtype=torch.int32),
            positions=cache.positions,
            protect_last=2,
            scope=scope,
        )
        for layer in range(layers)
    ]
    before = {key: cache.gather(*key)[2] for key in itertools.product(range(layers), range(rows), range(heads))}
    cache.evict(budgets, protect_last=2, scope=scope)
    for (layer, row, head), positions in before.items():
        new_lens, keep = expected[layer]
        assert cache.seq_lens[layer, row, head] == new_lens[row, head]
        assert torch.equal(cache.gather(layer, row, head)[2], positions[keep[row, head, :30]])
    assert cache.stats().blocks_in_use == sum(map(sum, budgets))


@pytest.mark.parametrize(
    "budget", [[[1, 2]], [[1, 2], [3, 4], [5, 6]], torch.ones(2, 3, dtype=torch.int32), [1, [2, 2]]]
)
def test_a_budget_that_fits_neither_rows_nor_layers_is_named(budget):
    cache = kvops.PagedKVCache(num_layers=2, num_kv_heads=1, head_dim=16, num_blocks=9, max_batch=2, max_tokens=16)
    with pytest.raises(ValueError, match=r"^budget: expected"):
        cache.evict(budget)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SnapKV(scope="heads"), ValueError, "scope: expected one of 'head', 'layer', 'sequence', got 'heads'"),
        (lambda: KVCompress(observe=0), ValueError, "observe: expected at least 1, got 0"),
        (lambda: RKV(floor=1.5), ValueError, "floor: expected a number from 0 to 1, got 1.5"),
        (lambda: PyramidKV(pooling="maximum"), ValueError, "pooling: expected one of 'max', 'mean', got 'maximum'"),
        (lambda: SnapKV(pool=5.5), TypeError, "pool: expected an int, got 5.5"),
        (lambda: PyramidKV(steepness=float("inf")), ValueError, "steepness: expected a finite number, got inf"),
        (lambda: Compression(ratio="4"), TypeError, "ratio: expected a number, got '4'"),
        (lambda: Compression(tokens=1.5), TypeError, "tokens: expected an int, got 1.5"),
        (lambda: Compression(mib=float("inf")), ValueError, "mib: expected a finite number, got inf"),
        (lambda: share_out(9, [1.0, 0.0], least=0, most=9), ValueError, r"weights: .* above 0, got \[1.0, 0.0\]"),
        (lambda: Compression(policy="snapkv"), TypeError, r"policy: expected a kvops.policies.Policy, .*got 'snapkv'"),
    ],
)
def test_what_a_policy_cannot_follow_is_refused_when_it_is_made(make, error, message):
    """A misspelt scope was taken for "sequence", a misspelt pooling for "mean", and no queries for all of them."""
    with pytest.raises(error, match=f"^{message}"):
        make()


class Careless(Policy):
    """What authors of policies get wrong: the layout, or the newest key."""

    wrong: ClassVar[str] = ""

    def score(self, seen):
        scores = torch.zeros_like(seen.earlier)
        return (
            scores.transpose(1, 2) if self.wrong == "layout" else scores[..., :-1] if self.wrong == "newest" else scores
        )

    def layer_weights(self, num_layers):
        return [1.0] * (num_layers + (self.wrong == "weights"))


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("layout", r"Careless.score: expected shape \[B, Hkv, S\] = \[1, 2, \d+\], got \[1, \d+, 2\]"),
        ("newest", r"Careless.score: expected shape \[B, Hkv, S\]"),
        ("weights", "policy: expected 2 layer_weights, one for each layer, got 3 from Careless"),
    ],
)
def test_a_policy_that_is_wrong_is_named(wrong, message, chunk, monkeypatch):
    """Scores for all keys but the newest were taken, and the newest was worth nothing."""
    monkeypatch.setattr(Careless, "wrong", wrong)
    compression = Compression(ratio=2, policy=Careless(), protect_last=2, chunk=chunk)
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), [list(range(1, 20))], max_new_tokens=2, compression=compression)
