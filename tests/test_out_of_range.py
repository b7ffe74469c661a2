"""Lengths and blocks that lead outside of a table or the cache: on a CPU always an error, and nothing is written.

On a GPU only ``KVOPS_DEBUG=1`` looks at them, so it is set for the kernels here.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import pytest
import torch
from paged_lists import Lists, make_lists

import kvops
from kvops import checks

NUMBA = True  # see conftest.py
HEAD_DIM, BLOCK_SIZE = 16, 8


@pytest.fixture
def lists(backend, device, monkeypatch) -> Lists:
    monkeypatch.setenv("KVOPS_DEBUG", "1" if backend == "triton" else "0")
    return make_lists([[20, 3], [9, 39]], block_size=BLOCK_SIZE, head_dim=HEAD_DIM, device=device)


def tokens(lists, heads, count=1):
    return torch.randn(len(lists.seq_lens), count, heads, HEAD_DIM, device=lists.k_cache.device)


def attend(lists, **options):
    return kvops.paged_attention(tokens(lists, 4), *lists.arguments, **options)


def attend_with_scores(lists):
    return attend(lists, scores=lists.scores)


def attend_to_latents(lists):
    cache = torch.cat([lists.k_cache, lists.v_cache], -1)
    q = torch.randn(2, 1, 6, 2 * HEAD_DIM, device=cache.device)
    return kvops.paged_latent_attention(q, cache, *lists.arguments[2:], value_dim=24, scale=0.2)


def append(lists, **options):
    kvops.paged_append(tokens(lists, 2, 3), tokens(lists, 2, 3), *lists.arguments, scores=lists.scores, **options)


def compact(lists):
    slots = lists.block_tables.shape[2] * BLOCK_SIZE
    keep = (torch.arange(slots, device=lists.k_cache.device) % 2 == 0).expand(2, 2, slots).contiguous()
    return kvops.compact(*lists.arguments, keep, scores=lists.scores)


def select(lists):
    budget = torch.full((2,), 3, dtype=torch.int32, device=lists.k_cache.device)
    return kvops.select_blocks(lists.scores, *lists.arguments[2:], budget)


FUNCTIONS = [attend, attend_with_scores, attend_to_latents, append, compact, select]
WRONG = {
    "a block behind the cache": ("block_tables", (1, 1, 4), 10_000, r"blocks from 0 to .* the first at \[1, 1, 4\]"),
    "a negative block": ("block_tables", (1, 1, 4), -1, r"blocks from 0 to .* the first at \[1, 1, 4\]"),
    "a length beyond the table": ("seq_lens", (1, 1), 57, r"lengths up to the 56 slots .* the first at \[1, 1\]"),
    "the largest length": ("seq_lens", (1, 1), 2**31 - 1, r"lengths up to the 56 slots .* the first at \[1, 1\]"),
    "a negative length": ("seq_lens", (1, 1), -1, r"lengths of at least 0, .* the first at \[1, 1\]"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_is_named_and_nothing_is_written(lists, function, wrong):
    function(make_lists([[20, 3], [9, 39]], block_size=BLOCK_SIZE, head_dim=HEAD_DIM, device=lists.k_cache.device))
    name, place, number, message = WRONG[wrong]
    getattr(lists, name)[place] = number
    before = {field.name: getattr(lists, field.name).clone() for field in fields(lists)}
    with pytest.raises(ValueError, match=f"{name}: expected {message}"):
        function(lists)
    for name, side in before.items():
        assert torch.equal(getattr(lists, name).nan_to_num(-7), side.nan_to_num(-7))


@pytest.mark.parametrize("count", [-1, 4])
def test_numbers_of_tokens(lists, count):
    q_lens = torch.tensor([1, count], dtype=torch.int32, device=lists.k_cache.device)
    before = lists.k_cache.clone()
    with pytest.raises(ValueError, match=r"q_lens: expected lengths from 0 to the 3 tokens of q, .* first at \[1\]"):
        kvops.paged_attention(tokens(lists, 4, 3), *lists.arguments, q_lens=q_lens)
    with pytest.raises(ValueError, match=r"q_lens: expected lengths from 0 to the 3 tokens of k, .* first at \[1\]"):
        append(lists, q_lens=q_lens)
    assert torch.equal(lists.k_cache.nan_to_num(-7), before.nan_to_num(-7))


def test_a_cache_with_all_heads_in_a_block(backend, device, monkeypatch):
    monkeypatch.setenv("KVOPS_DEBUG", "1" if backend == "triton" else "0")
    cache = torch.randn(5, BLOCK_SIZE, 2, HEAD_DIM, device=device)
    tables, lens = torch.tensor([[3, 5]], dtype=torch.int32, device=device), torch.tensor([16], dtype=torch.int32)
    q, k = (torch.randn(1, 1, heads, HEAD_DIM, device=device) for heads in (4, 2))
    with pytest.raises(ValueError, match="block_tables: expected blocks from 0 to 4"):
        kvops.paged_attention(q, cache, cache, tables, lens.to(device))
    with pytest.raises(ValueError, match="block_tables: expected blocks from 0 to 4"):
        kvops.paged_append(k, k, cache, cache.clone(), tables, lens.to(device))


@pytest.mark.parametrize(("source", "target", "wrong"), [(9, 0, "source"), (-1, 0, "source"), (0, 9, "target")])
def test_copies_of_blocks(backend, device, monkeypatch, source, target, wrong):
    monkeypatch.setenv("KVOPS_DEBUG", "1" if backend == "triton" else "0")
    cache = torch.arange(9.0, device=device)[:, None, None].expand(9, 2, 3).contiguous()
    blocks = torch.tensor([[1, source, 99], [2, target, -1]], dtype=torch.int32, device=device)  # the last is no copy
    with pytest.raises(ValueError, match=rf"{wrong}: expected blocks .* the first at \[1\]"):
        kvops.copy_blocks(cache, cache.clone(), *blocks)
    assert cache[:, 0, 0].tolist() == list(range(9))


def anything_in(lists, row):
    """The same lists, and those of one sequence full of numbers that lead anywhere."""
    changed = replace(lists, block_tables=lists.block_tables.clone(), seq_lens=lists.seq_lens.clone())
    changed.block_tables[row], changed.seq_lens[row] = 10**6, 10**6
    return changed


@pytest.mark.parametrize("packed", [False, True])
def test_lists_of_sequences_without_tokens_may_hold_anything(backend, lists, packed):
    if backend == "triton":
        pytest.skip("KVOPS_DEBUG=1 looks at them")
    options = {"q_lens": torch.tensor([0, 1], dtype=torch.int32)}
    q, k = tokens(lists, 4), tokens(lists, 2)
    if packed:
        options = {"cu_seqlens_q": torch.tensor([0, 0, 1], dtype=torch.int32), "max_seqlen_q": 1}
        q, k = q[1], k[1]
    changed = anything_in(lists, 0)
    for got, want in zip(
        kvops.paged_attention(q, *changed.arguments, **options),
        kvops.paged_attention(q, *lists.arguments, **options),
        strict=True,
    ):
        assert torch.equal(got, want)
    caches = [x.clone() for x in lists.arguments[:2]]
    kvops.paged_append(k, k, *caches, *changed.arguments[2:], **options)
    kvops.paged_append(k, k, *lists.arguments, **options)
    for got, want in zip(caches, lists.arguments, strict=False):
        assert torch.equal(got.nan_to_num(-7), want.nan_to_num(-7))


def test_blocks_that_are_not_read_may_be_anything(backend, lists):
    """Those before a window, and for new tokens those before their own."""
    if backend == "triton":
        pytest.skip("KVOPS_DEBUG=1 looks at them")
    q = tokens(lists, 4)
    want, _ = kvops.paged_attention(q, *lists.arguments, window_left=4)
    for block in (10**6, -5):
        lists.block_tables[1, 1, :4] = block  # of 39 slots the last 5 are seen, which are in block 4
        got, _ = kvops.paged_attention(q, *lists.arguments, window_left=4)
        assert torch.equal(got, want)
        append(lists)
        want, _ = kvops.paged_attention(q, *lists.arguments, window_left=4)
    with pytest.raises(ValueError, match="block_tables: expected blocks"):
        kvops.paged_attention(q, *lists.arguments, window_left=8)


def shared(tensor, count):
    return tensor[:1].expand(count, *tensor.shape[1:])


def test_what_is_written_has_a_place_for_each_element(lists):
    """Of an expanded tensor the last element written would stay."""
    blocks = len(lists.k_cache)
    wrong = "expected a place in memory for each element"
    with pytest.raises(ValueError, match=f"out: {wrong}"):
        attend(lists, out=shared(tokens(lists, 4), 2))
    with pytest.raises(ValueError, match=f"scores: {wrong}"):
        attend(lists, scores=shared(lists.scores, blocks))
    with pytest.raises(ValueError, match=f"k_cache: {wrong}"):
        append(replace(lists, k_cache=shared(lists.k_cache, blocks)))
    with pytest.raises(ValueError, match=f"v_cache: {wrong}"):
        append(replace(lists, v_cache=shared(lists.v_cache, blocks)))
    with pytest.raises(ValueError, match=f"seq_lens: {wrong}"):
        compact(replace(lists, seq_lens=shared(lists.seq_lens, 2)))


def test_other_threads_are_not_refused_what_no_kernel_reads():
    """While one thread names what is wrong as KVOPS_DEBUG=1 does, which looks at more."""
    with checks.naming(), ThreadPoolExecutor() as pool:
        assert checks.debug()
        assert not pool.submit(checks.debug).result()
    assert not checks.debug()
