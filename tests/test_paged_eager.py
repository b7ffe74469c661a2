"""The eager implementation of paged attention: its tiles, its memory and its precision."""

import pytest
import torch
from paged_lists import check, expected, make_lists, queries
from torch import Tensor

import kvops
from kvops.eager import paged as eager


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setenv("KVOPS_CPU", "eager")


@pytest.mark.parametrize("bound", [1, 7000, 1 << 20])
@pytest.mark.parametrize(("block_size", "dtype"), [(1, torch.float32), (16, torch.float16), (24, torch.float32)])
def test_eager_holds_a_bounded_number_of_scores_at_once(block_size, dtype, bound, monkeypatch):
    """One token at a time, some, or all; a window begins inside a block, and inside another one for each token."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(eager, "_MAX_SCORES", bound)
    lengths = [[0, 1, block_size - 1, block_size], [block_size + 1, 127, 128, 129], [900, 3, 0, 2], [7, 260, 5, 400]]
    lists = make_lists(lengths, block_size=block_size, head_dim=32, dtype=dtype)
    q_lens = torch.tensor([3, 0, 2, 3], dtype=torch.int32)
    sinks = torch.linspace(-1, 6, 12)
    check(queries(lists, 3, 1, dtype), lists, scores=True, score_decay=0.5)
    check(queries(lists, 3, 3, dtype), lists, scores=True, q_lens=q_lens, sinks=sinks, score_reduce="sumsq")
    check(queries(lists, 3, 5, dtype), lists, scores=True, score_reduce="max", window_left=100)
    check(queries(lists, 3, 3, dtype), lists, scores=True, q_lens=q_lens, causal=False)
    check(queries(lists, 3, 40, dtype), lists, scores=True, window_left=33, score_decay=0.5)


def test_eager_gives_a_uniform_cache_the_bits_of_its_ragged_form(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    tables = torch.randperm(160).view(8, 20).int()
    lens = torch.tensor([300, 0, 7, 16, 1, 30, 2, 9], dtype=torch.int32)
    k_cache, v_cache = torch.randn(2, 160, 16, 2, 32)
    q, old_scores = torch.randn(8, 1, 6, 32), torch.rand(160, 16, 2)
    scores, ragged_scores = old_scores.clone(), old_scores.transpose(1, 2).reshape(-1, 16)
    out = kvops.paged_attention(q, k_cache, v_cache, tables, lens, scores=scores, score_decay=0.5)
    ragged = (tables[:, None] * 2 + torch.arange(2)[:, None]).int()
    caches = (cache.transpose(1, 2).reshape(-1, 16, 32) for cache in (k_cache, v_cache))
    options = {"scores": ragged_scores, "score_decay": 0.5}
    lists = kvops.paged_attention(q, *caches, ragged, lens[:, None].expand(8, 2), **options)
    assert all(torch.equal(a, b) for a, b in zip(out, lists, strict=True))
    assert torch.equal(scores.transpose(1, 2).reshape(-1, 16), ragged_scores)
    after = tables[2, 0], slice(7, None)  # past the end of a list
    assert torch.equal(scores[after], old_scores[after])


def test_eager_memory_is_linear_in_the_lengths(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and not tensor._is_view():
                    largest = max(largest, tensor.numel())
            return result

    lists = make_lists([[8000, 8000]], block_size=16, head_dim=16)
    with Watch():
        eager.paged_attention(queries(lists, 2, 256), *lists.arguments, scores=lists.scores, window_left=7900)
    assert largest <= 8000 * 132, "a matrix of queries by slots is 512 x 8000 for a list"


def test_eager_computes_in_float64_where_given_it():
    lists = make_lists([[70, 33]], block_size=16, head_dim=32, dtype=torch.float64)
    q = queries(lists, 3, 2, torch.float64)
    out, lse = eager.paged_attention(q, *lists.arguments)
    exact = expected(q, lists)
    assert (out - exact[0]).abs().max() < 1e-13
    assert (lse - exact[1]).abs().max() < 1e-13
