"""Eviction policies: scores are what the papers' formulas say."""

import pytest
import torch
import torch.nn.functional as F
from oracle import attention, attention_mask

import kvops
from kvops.policies import H2O, POLICIES, KVCompress, SnapKV, Streaming


@pytest.fixture
def layer():
    """q, k, v of a prompt of 45 tokens with 6 query and 2 KV heads, and the causal probabilities in float64."""
    q, k, v = torch.randn(1, 45, 6, 16), torch.randn(1, 45, 2, 16), torch.randn(1, 45, 2, 16)
    _, lse, p = attention(q, k, v, mask=attention_mask(45, 45, causal=True))
    return q, k, v, lse.float(), p.unflatten(1, (2, 3))


def assert_scores(actual, exact):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, exact.float(), rtol=1e-5, atol=1e-6)


def test_h2o_sums_the_attention_of_all_queries(layer):
    q, k, v, lse, p = layer
    assert_scores(H2O().score(q, k, v, lse), p.sum((2, 3)))


def test_kv_compress_sums_squares_over_the_last_queries_and_the_group(layer):
    q, k, v, lse, p = layer
    assert_scores(KVCompress(observe=8).score(q, k, v, lse), (p[:, :, :, -8:] ** 2).sum((2, 3)))


@pytest.mark.parametrize("observe", [8, 100])
def test_snapkv_pools_the_attention_of_the_last_queries(layer, observe):
    q, k, v, lse, p = layer
    exact = F.max_pool1d(p[:, :, :, -observe:].sum((2, 3)), 5, stride=1, padding=2)
    assert_scores(SnapKV(observe=observe, pool=5).score(q, k, v, lse), exact)


def test_streaming_prefers_later_tokens_and_those_still_to_come(layer):
    q, k, v, lse, _ = layer
    scores = Streaming().score(q, k, v, lse)
    assert scores.shape == (1, 2, 45)
    assert (scores.diff(dim=-1) > 0).all()
    assert (scores < 0).all()


def test_a_window_is_passed_on(layer):
    q, k, v, _, _ = layer
    _, lse, p = attention(q, k, v, mask=attention_mask(45, 45, causal=True, window_left=7))
    assert_scores(H2O().score(q, k, v, lse.float(), window_left=7), p.unflatten(1, (2, 3)).sum((2, 3)))


def test_every_named_policy_is_exported():
    assert set(POLICIES.values()) == {H2O, KVCompress, SnapKV, Streaming}
    assert all(getattr(kvops.policies, policy.__name__) is policy for policy in POLICIES.values())
