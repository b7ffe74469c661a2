"""The eager implementation of paged attention: which way it takes through the lists, its memory and its precision."""

import pytest
import torch
from paged_lists import Lists, check, expected, make_lists, queries
from torch import Tensor

import kvops
from kvops.eager import paged as eager
from kvops.eager import paged_decode
from kvops.eager.paged_rows import Rows


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setenv("KVOPS_CPU", "eager")


@pytest.mark.parametrize(("num_tokens", "options"), [(1, {}), (1, {"softcap": 2.0}), (3, {}), (40, {})])
def test_eager_leaves_nothing_to_the_keys_beside_an_infinite_sink(num_tokens, options, monkeypatch):
    """A softcap and many tokens gave NaN, and NaN scores with them."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    lists = make_lists([[50, 61]], block_size=8, head_dim=16)
    q = queries(lists, 2, num_tokens)
    scores = lists.scores.clone()
    sinks = torch.tensor([float("inf"), float("inf"), 0.0, 0.0])
    out, lse = kvops.paged_attention(q, *lists.arguments, sinks=sinks, scores=scores, **options)
    expected, expected_lse = kvops.paged_attention(q, *lists.arguments, sinks=torch.zeros(4), **options)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :2] == float("inf")).all()
    torch.testing.assert_close(out[:, :, 2:], expected[:, :, 2:])
    torch.testing.assert_close(lse[:, 2:], expected_lse[:, 2:])
    assert torch.equal(scores.isnan(), lists.scores.isnan())


@pytest.mark.parametrize("consecutive", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
def test_eager_long_lists_in_place_and_gathered(consecutive, num_tokens, monkeypatch):
    """More slots than a gathered tile, than a short list, and than one core's share of a product."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    lists = make_lists([[2301, 700, 5], [1100, 0, 1027]], block_size=16, head_dim=32, consecutive=consecutive)
    lists.block_tables[0, 0, 30:60] = lists.block_tables[0, 0, 30:60].flip(0)
    if consecutive:  # the blocks moved in the table only: move what they hold too
        k, v = lists.k_cache.clone(), lists.v_cache.clone()
        held = lists.block_tables[0, 0, 30:60].long()
        lists.k_cache[held], lists.v_cache[held] = k[held.flip(0)], v[held.flip(0)]
    check(queries(lists, 3, num_tokens), lists, scores=True)
    check(queries(lists, 3, num_tokens), lists, scores=True, window_left=900)


@pytest.mark.parametrize(("block_size", "dtype"), [(1, torch.float32), (16, torch.float16), (24, torch.float32)])
@pytest.mark.parametrize(
    ("few", "pad", "chunk"), [(0, 0, 1), (0, 0, 1 << 19), (0, 1 << 30, 1), (0, 1 << 30, 1 << 19), (99, 0, 1)]
)
def test_eager_serves_few_rows_in_tiles(few, pad, chunk, block_size, dtype, monkeypatch):
    """Lists one by one, cut into tiles or padded to one each, all at once or some at a time."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(paged_decode, "_FEW", few)
    monkeypatch.setattr(paged_decode, "_CHUNK", chunk)
    monkeypatch.setattr(paged_decode, "_PAD", pad)
    served = []
    monkeypatch.setattr(eager, "attend_tiles", lambda *a, **k: served.append(1) or paged_decode.attend_tiles(*a, **k))
    lengths = [[0, 1, block_size - 1, block_size], [block_size + 1, 127, 128, 129], [900, 3, 0, 2], [7, 260, 5, 400]]
    lists = make_lists(lengths, block_size=block_size, head_dim=32, dtype=dtype)
    q_lens = torch.tensor([3, 0, 2, 3], dtype=torch.int32)
    sinks = torch.linspace(-1, 6, 12)
    check(queries(lists, 3, 1, dtype), lists, scores=True, score_decay=0.5)
    check(queries(lists, 3, 3, dtype), lists, scores=True, q_lens=q_lens, sinks=sinks, score_reduce="sumsq")
    check(queries(lists, 3, 5, dtype), lists, scores=True, score_reduce="max")
    check(queries(lists, 3, 3, dtype), lists, scores=True, q_lens=q_lens, causal=False)
    lists = make_lists([[max(length, 1) for length in row] for row in lengths], block_size=block_size, head_dim=32)
    check(queries(lists, 3, 1), lists, scores=True)  # no list is empty: one mask for all rows
    assert len(served) == 5


@pytest.mark.parametrize(("few", "pad"), [(0, 0), (0, 1 << 30), (99, 0)])
def test_eager_tiles_of_a_uniform_cache_are_those_of_its_ragged_form(few, pad, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(paged_decode, "_FEW", few)
    monkeypatch.setattr(paged_decode, "_PAD", pad)
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


def swap_blocks(lists: Lists, table: Tensor, first: int) -> None:
    """The same list with two of its blocks in each other's place in the pool."""
    a, b = int(table[first]), int(table[first + 1])
    for cache in (lists.k_cache, lists.v_cache, lists.positions, lists.scores):
        cache[[a, b]] = cache[[b, a]]
    table[first], table[first + 1] = b, a


def test_eager_runs_begin_and_end_anywhere(monkeypatch):
    """Runs of consecutive blocks between scattered ones; a window begins inside a run."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(paged_decode, "_FEW", 0)
    lists = make_lists([[1999, 1333]], block_size=16, head_dim=32, consecutive=True)
    for first in (0, 40, 77):
        for table in (lists.block_tables[0, 0], lists.block_tables[0, 1]):
            swap_blocks(lists, table, first)
    for window_left in (-1, 500, 1111):
        check(queries(lists, 3), lists, scores=True, window_left=window_left)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("broken", [False, True])
def test_eager_reads_what_all_lists_have_side_by_side_where_it_is(broken, threads, monkeypatch):
    """A run that all lists have alike, and what each has behind it: nothing, a part of a block, or scattered blocks."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(paged_decode, "_FEW", 0)
    monkeypatch.setattr(paged_decode, "_LONG", 256)
    monkeypatch.setattr(eager, "_LONG", 256)
    runs = []
    read = Rows.alike
    monkeypatch.setattr(Rows, "alike", lambda *arguments: runs.append(arguments[-1]) or read(*arguments))
    lists = make_lists([[608, 601], [607, 593]], block_size=16, head_dim=32, consecutive=True)
    if broken:
        swap_blocks(lists, lists.block_tables[1, 0], 25)
    run = 25 * 16 if broken else 37 * 16
    sinks = torch.linspace(-1, 6, 6)
    check(queries(lists, 3), lists, scores=True, score_decay=0.5, sinks=sinks)
    check(queries(lists, 3, 2), lists, scores=True, score_reduce="sumsq", causal=False)
    check(queries(lists, 3, 3), lists, scores=True, score_reduce="max")
    assert runs == 4 * [run] + 2 * [run if broken else 36 * 16]  # 593 slots, of which the first of 3 tokens sees 591
    q_lens = torch.tensor([2, 0], dtype=torch.int32)
    check(queries(lists, 3, 2), lists, scores=True, q_lens=q_lens)  # a list of which nobody sees anything
    whole = make_lists([[512, 512]], block_size=16, head_dim=32, consecutive=True)
    check(queries(whole, 3), whole, scores=True)
    assert runs[6:] == 2 * [512]


@pytest.mark.parametrize("threads", [1, 3])
def test_eager_reads_what_each_of_few_lists_begins_with_where_it_is(threads, monkeypatch):
    """Runs of different lengths, a list without one, and a list that is one run."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(paged_decode, "_LONG", 128)
    monkeypatch.setattr(paged_decode, "_PAD", 0)
    runs = []
    read = Rows.alike
    monkeypatch.setattr(Rows, "alike", lambda *arguments: runs.append(arguments[-1]) or read(*arguments))
    lists = make_lists([[608, 900, 512]], block_size=16, head_dim=32, consecutive=True)
    for head, first in ((0, 25), (1, 3)):
        swap_blocks(lists, lists.block_tables[0, head], first)
    sinks = torch.linspace(-1, 6, 9)
    check(queries(lists, 3), lists, scores=True, score_decay=0.5, sinks=sinks)
    assert runs == [400, 400, 512, 512]
    check(queries(lists, 3, 2), lists, scores=True, score_reduce="sumsq", causal=False)
    assert runs[4:] == [400, 400, 512, 512]
    check(queries(lists, 3, 3), lists, scores=True, score_reduce="max")
    assert runs[8:] == [400, 400, 496, 496]  # the first of 3 tokens sees 510 slots of the last list


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
