"""Tables and caches of FlashInfer and vLLM: converted exactly both ways, attended to and compressed where they lie."""

from functools import partial

import pytest
import torch
from no_sync import no_synchronisation
from oracle import assert_accurate, attention, attention_mask
from rounding import rounded

import kvops
from kvops.cache.tables import HeadBlocks, from_flashinfer, slot_mapping, to_flashinfer

SIZE, HEADS, D, DV = 4, 3, 8, 5
LENGTHS = [9, 0, 1, 3, 4, 5]  # with SIZE: several pages, none, and all around a full one
PAGES = 12


def int32(*numbers, device="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def tables_of(lengths, size, device):
    """Pages in any order; past a sequence's end stands what must not be read."""
    pages = iter(torch.randperm(PAGES).tolist())
    tables = [[next(pages) for _ in range(-(-length // size))] for length in lengths]
    return int32(*[table + [2**30] * (4 - len(table)) for table in tables], device=device), int32(
        *lengths, device=device
    )


def flashinfer_nhd(device):
    kv = torch.full((PAGES, 2, SIZE, HEADS, D), torch.nan, device=device)
    return kv, kv[:, 0], kv[:, 1]


def flashinfer_hnd(device):
    kv = torch.full((PAGES, 2, HEADS, SIZE, D), torch.nan, device=device)
    return kv, kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2)


def vllm(device):
    kv = torch.full((2, PAGES, SIZE, HEADS, D), torch.nan, device=device)
    return kv, kv[0], kv[1]


def vllm_fused(device):
    kv = torch.full((PAGES, SIZE, HEADS, D + DV), torch.nan, device=device)
    return kv, kv[..., :D], kv[..., D:]


def padded_pages(device):
    """Pages that end with something else, as where layers of several kinds share one pool."""
    memory = torch.full((2, PAGES, HEADS * SIZE * D + D), torch.nan, device=device)
    k_cache, v_cache = memory[..., :-D].view(2, PAGES, HEADS, SIZE, D).transpose(2, 3)
    return memory, k_cache, v_cache


LAYOUTS = [flashinfer_nhd, flashinfer_hnd, vllm, vllm_fused, padded_pages]


def test_flashinfer_arrays_are_those_of_plain_python(device):
    tables, lens = tables_of(LENGTHS, SIZE, device)
    indptr, indices, last = to_flashinfer(tables, lens, SIZE)
    assert (indptr.dtype, indices.dtype, last.dtype) == (torch.int32,) * 3
    assert indptr.tolist() == [0, 3, 3, 4, 5, 6, 8]
    assert indices.tolist() == [page for row in tables.tolist() for page in row if page < PAGES]
    assert last.tolist() == [1, 0, 1, 3, 4, 1]


def test_converted_tables_are_not_views_of_the_arguments(device):
    """The lengths of heads that were joined were the caller's own where there was one head."""
    tables, lens = int32([0, 1], [2, 3], device=device), int32(5, 8, device=device)
    pages = torch.zeros(4, SIZE, 1, D, device=device)
    blocks = HeadBlocks.of(pages, pages)
    results = [
        *blocks.split(tables, lens),
        *blocks.join(*blocks.split(tables, lens)),
        *to_flashinfer(tables, lens, SIZE),
    ]
    results += blocks.join(tables[:, None], lens[:, None])
    results += from_flashinfer(*to_flashinfer(tables, lens, SIZE), SIZE)
    kept = [result.clone() for result in results]
    tables.zero_(), lens.zero_()
    assert all(map(torch.equal, results, kept))


@pytest.mark.parametrize("size", [1, 3, 16])
def test_tables_are_converted_exactly_both_ways(device, size):
    lens = torch.randint(0, 4 * size + 1, (20,), dtype=torch.int32, device=device)
    lens[:3] = int32(0, 1, 4 * size)
    tables = torch.arange(80, dtype=torch.int32, device=device).view(20, 4)
    used = torch.arange(4, device=device) * size < lens[:, None]
    there = to_flashinfer(tables, lens, size)
    back = from_flashinfer(*there, size)
    assert torch.equal(back[0], torch.where(used, tables, 0))
    assert torch.equal(back[1], lens)
    for again, array in zip(to_flashinfer(*back, size), there, strict=True):
        assert torch.equal(again, array)
    for none in (to_flashinfer(tables[:0], lens[:0], size), to_flashinfer(tables[:2], lens[:2] * 0, size)):
        assert from_flashinfer(*none, size)[1].tolist() == [0] * (len(none[0]) - 1)


def test_with_the_width_given_nothing_is_read(device):
    tables, lens = tables_of(LENGTHS, SIZE, device)
    arrays = to_flashinfer(tables, lens, SIZE)
    spare = torch.nn.functional.pad(arrays[1], (0, 9))  # FlashInfer's buffers for graphs are longer than what is in use
    with no_synchronisation():
        back = from_flashinfer(arrays[0], spare, arrays[2], SIZE, max_blocks=5)
    assert back[0].shape == (6, 5)
    assert torch.equal(back[0][:, :3], from_flashinfer(*arrays, SIZE)[0])
    assert torch.equal(back[1], lens)


@pytest.mark.parametrize(
    ("backend", "layout"),
    [*(("eager", layout) for layout in LAYOUTS), ("triton", flashinfer_nhd), ("triton", flashinfer_hnd)],
    indirect=["backend"],
)
def test_tokens_go_where_the_engine_would_put_them_and_are_attended_to_in_place(backend, device, layout):
    """Appended and read through views, as pages and as blocks of one head each: the engine's memory, no copy of it."""
    memory, k_cache, v_cache = layout(device)
    tables, lens = tables_of(LENGTHS, SIZE, device)
    T, B = max(LENGTHS), len(LENGTHS)
    k = torch.randn(B, T, HEADS, D, device=device)
    v = torch.randn(B, T, HEADS, v_cache.shape[3], device=device)
    kvops.paged_append(k, v, k_cache, v_cache, tables, lens, q_lens=lens)
    mapping = slot_mapping(tables, lens, SIZE, T, q_lens=lens)
    new = mapping >= 0
    assert new.sum(1).tolist() == LENGTHS
    page, slot = mapping[new] // SIZE, mapping[new] % SIZE
    assert torch.equal(k_cache[page, slot], k[new])
    assert torch.equal(v_cache[page, slot], v[new])
    written = (~memory.isnan()).sum()
    assert written == sum(LENGTHS) * HEADS * (D + v_cache.shape[3])  # nothing else was

    heads = HeadBlocks.of(k_cache, v_cache)
    assert heads.k_cache.data_ptr() == k_cache.data_ptr()
    q = torch.randn(B, 2, 2 * HEADS, D, device=device)
    uniform, _ = kvops.paged_attention(q, k_cache, v_cache, tables, lens)
    split, _ = kvops.paged_attention(q, heads.k_cache, heads.v_cache, *heads.split(tables, lens))

    def alone(q, k, v):
        rows = [(q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length]) for b, length in enumerate(LENGTHS)]
        return torch.cat([attention(*row, mask=attention_mask(2, row[1].shape[1], causal=True))[0] for row in rows])

    inputs = q.cpu(), k.cpu(), v.cpu()
    exact, same = alone(*inputs), rounded(q.dtype, alone, *inputs)
    assert_accurate(uniform, exact, same)
    assert_accurate(split, exact, same)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_are_split_and_joined_exactly(device, layout):
    _, k_cache, v_cache = layout(device)
    tables, lens = tables_of(LENGTHS, SIZE, device)
    heads = HeadBlocks.of(k_cache, v_cache)
    per_head = heads.split(tables, lens)
    for head in range(HEADS):
        block = int(per_head[0][0, head, 1])
        assert heads.k_cache[block].data_ptr() == k_cache[tables[0, 1], 0, head].data_ptr()
        assert heads.v_cache[block].data_ptr() == v_cache[tables[0, 1], 0, head].data_ptr()
    joined = heads.join(*per_head)
    used = torch.arange(4, device=device) * SIZE < lens[:, None]
    assert torch.equal(joined[0], torch.where(used, tables, 0))
    assert torch.equal(joined[1], lens)
    with pytest.raises(ValueError, match="block_tables: expected the heads of a sequence in the same pages"):
        heads.join(per_head[0].flip(1), per_head[1])


@pytest.mark.parametrize("pages_and_heads", [(1, 3), (5, 1), (1, 1)])
def test_sizes_of_one_have_strides_that_say_nothing(device, pages_and_heads):
    pages, heads = pages_and_heads
    cache = torch.randn(pages, SIZE, heads, D, device=device)
    odd = cache.as_strided(cache.shape, [77 if n == 1 else s for n, s in zip(cache.shape, cache.stride(), strict=True)])
    blocks = HeadBlocks.of(odd, odd)
    table, lens = int32([pages - 1], device=device), int32(SIZE, device=device)
    per_head = blocks.split(table, lens)
    for head in range(heads):
        assert torch.equal(blocks.k_cache[per_head[0][0, head, 0]], cache[pages - 1, :, head])


def test_the_memory_of_an_engine_is_compressed_per_head_where_it_lies(backend, device):
    """FlashInfer's HND cache: every head keeps its best slots; ragged heads are then no pages any more, and say so."""
    _, k_cache, v_cache = flashinfer_hnd(device)
    tables, lens = tables_of([16, 7], SIZE, device)
    k, v = torch.randn(2, 2, 16, HEADS, D, device=device)
    kvops.paged_append(k, v, k_cache, v_cache, tables, lens, q_lens=lens)
    heads = HeadBlocks.of(k_cache, v_cache)
    per_head, head_lens = heads.split(tables, lens)
    scores = torch.rand(heads.k_cache.shape[:2], device=device)
    before = [[scores[per_head[b, h, :4].long()].flatten() for h in range(HEADS)] for b in range(2)]
    budget = int32(7, 4, device=device)
    _, keep = kvops.select_blocks(scores, per_head, head_lens, budget, scope="sequence")
    kvops.compact(heads.k_cache, heads.v_cache, per_head, head_lens, keep, scores=scores)
    assert head_lens[0].unique().numel() > 1  # else the heads are not ragged

    q = torch.randn(2, 1, HEADS, D, device=device)
    out, _ = kvops.paged_attention(q, heads.k_cache, heads.v_cache, per_head, head_lens)
    arrays = to_flashinfer(per_head.flatten(0, 1), head_lens.flatten(), SIZE)  # a sequence for each head
    one_head = from_flashinfer(*arrays, SIZE)
    caches = heads.k_cache[:, :, None], heads.v_cache[:, :, None]
    alone, _ = kvops.paged_attention(q.view(2 * HEADS, 1, 1, D), *caches, *one_head)
    kept = [[keep[b, h].nonzero().flatten() for h in range(HEADS)] for b in range(2)]
    for b in range(2):
        for h in range(HEADS):
            best = before[b][h][: int(lens[b])].topk(len(kept[b][h])).indices.sort().values
            assert torch.equal(kept[b][h], best)

    def over_kept(q, k, v):
        exact = torch.empty(q.shape, dtype=torch.float64)
        for b in range(2):
            for h in range(HEADS):
                place, slots = (slice(b, b + 1), slice(None), slice(h, h + 1)), kept[b][h].cpu()
                exact[place] = attention(q[place], k[:, slots][place], v[:, slots][place])[0]
        return exact

    inputs = q.cpu(), k.cpu(), v.cpu()
    exact, same = over_kept(*inputs), rounded(q.dtype, over_kept, *inputs)
    assert_accurate(out, exact, same)
    assert_accurate(alone.view(out.shape), exact, same)
    with pytest.raises(ValueError, match=r"seq_lens: expected heads of one length, got \d+ to \d+ slots in sequence 0"):
        heads.join(per_head, head_lens)
    with pytest.raises(ValueError, match="a list for each head"):
        to_flashinfer(per_head, head_lens, SIZE)


def test_lengths_that_do_not_fit_are_named(monkeypatch):
    """A length beyond its table was converted to pages that were not there."""
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    ints = partial(torch.tensor, dtype=torch.int32)
    tables, lens = torch.arange(6, dtype=torch.int32).view(2, 3), ints([5, 9])
    indptr, indices, last = to_flashinfer(tables, lens, 4)
    cases = [
        (lambda: to_flashinfer(tables, ints([5, 13]), 4), "seq_lens: expected numbers from 0 to 12, .* first at .1"),
        (lambda: to_flashinfer(tables, ints([-1, 5]), 4), "seq_lens: expected numbers from 0 to 12"),
        (lambda: from_flashinfer(indptr, indices[:-1], last, 4), "kv_indptr: expected ascending numbers from 0 to 4"),
        (lambda: from_flashinfer(ints([0, 3, 1]), indices, last, 4), "kv_indptr: expected ascending numbers"),
        (lambda: from_flashinfer(indptr, indices, ints([1, 5]), 4), "kv_last_page_len: expected numbers from 0 to"),
        (lambda: from_flashinfer(indptr, indices, last, 4, max_blocks=2), "max_blocks: expected at least the pages"),
        (lambda: slot_mapping(tables, ints([5, 13]), 4, 2), "seq_lens: expected numbers from 0 to 12"),
        (lambda: slot_mapping(tables, lens, 4, 2, q_lens=ints([3, 1])), "q_lens: expected numbers from 0 to"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            bad()
    assert slot_mapping(tables[:, :0], ints([0, 0]), 4, 2).tolist() == [[-1, -1]] * 2


def test_bad_tables_are_named():
    tables, lens = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    cache = torch.zeros(5, SIZE, HEADS, D)
    cases = [
        (lambda: to_flashinfer(tables.long(), lens, 4), TypeError, "block_tables: expected dtype int32, got int64"),
        (lambda: to_flashinfer(tables, lens[:1], 4), ValueError, r"seq_lens: expected shape \[B\] = \[2\], got \[1\]"),
        (lambda: to_flashinfer(tables, lens, 0), ValueError, "page_size: expected at least 1, got 0"),
        (lambda: from_flashinfer(lens, lens, lens, 4), ValueError, r"kv_indptr: expected shape \[B \+ 1\] = \[3\]"),
        (lambda: slot_mapping(tables, lens, 4, -1), ValueError, "num_tokens: expected at least 0, got -1"),
        (lambda: slot_mapping(tables, lens, 4, 1, q_lens=lens[:1]), ValueError, "q_lens: expected shape"),
        (lambda: HeadBlocks.of(cache[0], cache[0]), ValueError, "k_cache: expected 4 dimensions"),
        (lambda: HeadBlocks.of(cache, cache[:4]), ValueError, "v_cache: expected shape"),
        (lambda: HeadBlocks.of(cache.mT, cache.mT), ValueError, "k_cache: expected the last dimension contiguous"),
        (
            lambda: HeadBlocks.of(cache, cache.transpose(1, 2).contiguous().transpose(1, 2)),
            ValueError,
            "v_cache: expected pages 12 and heads 1 blocks apart, as in k_cache, got 3 and 1",
        ),
        (lambda: HeadBlocks.of(cache, cache).join(tables, lens), ValueError, "seq_lens: expected shape"),
        (lambda: HeadBlocks.of(cache, cache).split(tables[0], lens), ValueError, "block_tables: expected 2 dimensions"),
    ]
    for bad, error, message in cases:
        with pytest.raises(error, match=message):
            bad()
