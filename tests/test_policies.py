"""Eviction policies: scores are what the papers' formulas say."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import attention, attention_mask

import kvops
from kvops.policies import H2O, POLICIES, KVCompress, Prefill, SnapKV, Streaming, share_out


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


@pytest.mark.parametrize("observe", [8, 100])
def test_snapkv_pools_the_attention_of_the_last_queries(layer, observe):
    seen, p = layer
    exact = F.max_pool1d(p[:, :, :, -observe:].sum((2, 3)), 5, stride=1, padding=2)
    assert_scores(SnapKV(observe=observe, pool=5).score(seen), exact)


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


def test_every_named_policy_is_exported():
    assert set(POLICIES.values()) == {H2O, KVCompress, SnapKV, Streaming}
    assert all(getattr(kvops.policies, policy.__name__) is policy for policy in POLICIES.values())


@given(
    st.integers(0, 400), st.lists(st.floats(0.05, 3), min_size=1, max_size=12), st.integers(0, 9), st.integers(9, 40)
)
def test_a_total_is_shared_out_whole_and_within_bounds(total, weights, least, most):
    parts = share_out(total, weights, least=least, most=most)
    assert all(least <= part <= most for part in parts)
    assert sum(parts) == min(max(total, least * len(weights)), most * len(weights))
    by_weight = [part for _, part in sorted(zip(weights, parts, strict=True), key=lambda pair: pair[0])]
    assert all(small <= large + 1 for small, large in itertools.pairwise(by_weight))


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
