"""Attention over the paged cache: schedules, equal bits at every call, and batch invariance."""

import math

import pytest
import torch
from paged_lists import POISON_BLOCK, Lists, check, make_lists, queries
from torch import Tensor

import kvops

NUMBA = True


@pytest.mark.parametrize("num_programs", [1, 3, 64])
def test_any_number_of_programs_gives_the_same_attention(backend, device, num_programs):
    lists = make_lists([[300, 0, 5], [41, 1, 130]], block_size=16, head_dim=32, device=device)
    schedule = kvops.paged_schedule(lists.seq_lens, 16, num_programs=num_programs)
    check(queries(lists, 3, 2), lists, scores=True, schedule=schedule)


@pytest.mark.parametrize(
    ("block_size", "unit", "least"), [(1, 16, 128), (16, 16, 128), (24, 24, 128), (128, 64, 128), (16, 256, 256)]
)
def test_a_schedule_gives_every_unit_to_one_program(backend, device, block_size, unit, least):
    options = {"num_programs": 7, "batch_invariant": unit == 256}
    lens = torch.randint(0, 500, (3, 2, 4), dtype=torch.int32, device=device)
    lens[0], lens[1, 0] = 0, 0
    schedule = kvops.paged_schedule(lens, block_size, **options)
    for layer in range(3):
        assert torch.equal(schedule[layer], kvops.paged_schedule(lens[layer], block_size, **options))
        share, prefix, first = schedule[layer, 0].item(), schedule[layer, 1:10].tolist(), schedule[layer, 10:].tolist()
        units = [-(-length // unit) for length in lens[layer].flatten().tolist()]
        assert prefix == [sum(units[:n]) for n in range(9)]
        assert 7 * share >= prefix[-1]
        assert share * unit >= least
        for program, index in enumerate(first):
            if program * share < prefix[-1]:
                assert prefix[index] <= program * share < prefix[index + 1]


def test_equal_inputs_give_equal_bits(backend, device):
    lists = make_lists([[300, 0, 5], [41, 1, 130]], block_size=16, head_dim=64, device=device)
    q = queries(lists, 3, 2)
    results = []
    for _ in range(2):
        scores = lists.scores.clone()
        results.append((*kvops.paged_attention(q, *lists.arguments, scores=scores), scores.nan_to_num(7.0)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def spread(lists: Lists, others: Lists, place: int) -> Lists:
    """The sequences of ``lists`` from row ``place`` on among those of ``others``, every block elsewhere in the pool."""
    own, other = lists.k_cache.shape[0], others.k_cache.shape[0]
    order = torch.randperm(own + other)
    merged = {}
    for name in ("k_cache", "v_cache", "positions", "scores"):
        both = torch.cat([getattr(lists, name), getattr(others, name)])
        merged[name] = torch.empty_like(both)
        merged[name][order] = both
    wide = max(lists.block_tables.shape[2], others.block_tables.shape[2])
    tables = []
    for part, first, count in ((lists, 0, own), (others, own, other)):
        table = torch.full((*part.block_tables.shape[:2], wide), POISON_BLOCK, dtype=torch.int32)
        real = part.block_tables < count
        table[..., : real.shape[2]][real] = order[first + part.block_tables[real].long()].int()
        tables.append(table)
    table = torch.cat([tables[1][:place], tables[0], tables[1][place:]])
    lens = torch.cat([others.seq_lens[:place], lists.seq_lens, others.seq_lens[place:]])
    return Lists(merged["k_cache"], merged["v_cache"], table, lens, merged["positions"], merged["scores"])


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "options"),
    [
        (1, torch.float32, {}),
        (3, torch.float16, {"score_reduce": "max", "window_left": 300, "sinks": torch.linspace(-1, 3, 6)}),
        (30, torch.float32, {"softcap": 4.0, "score_reduce": "sumsq"}),
    ],
)
def test_batch_invariant_attention_gives_a_sequence_the_same_bits_in_any_batch(
    backend, device, num_tokens, dtype, options
):
    """Alone, among others, at another place, with other programs; 520 slots are three units of the schedule."""
    own = make_lists([[520, 258]], block_size=16, head_dim=40, dtype=dtype)
    own_q = torch.randn(1, num_tokens, 6, 40).to(dtype)
    count = max(1, num_tokens - 1)
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    results = []
    for lengths, place, num_programs in (([], 0, 3), ([[0, 31], [60, 300]], 1, 2), ([[290, 0]], 0, 64)):
        lists, q, q_lens = own, own_q, [num_tokens] * len(lengths)
        q_lens.insert(place, count)
        if lengths:
            others = make_lists(lengths, block_size=16, head_dim=40, dtype=dtype)
            other_q = torch.randn(len(lengths), num_tokens, 6, 40).to(dtype)
            lists, q = spread(own, others, place), torch.cat([other_q[:place], own_q, other_q[place:]])
        lists = Lists(*(getattr(lists, name).to(device) for name in Lists.__dataclass_fields__))
        scores = lists.scores.clone()
        schedule = kvops.paged_schedule(lists.seq_lens, 16, num_programs=num_programs, batch_invariant=True)
        out, lse = kvops.paged_attention(
            q.to(device), *lists.arguments, q_lens=torch.tensor(q_lens, dtype=torch.int32, device=device),
            scores=scores, schedule=schedule, batch_invariant=True, **options,
        )  # fmt: skip
        results.append((out[place], lse[place], *(scores.cpu()[lists.slots(place, head)] for head in range(2))))
    for alone, *batched in zip(*results, strict=True):
        assert all(torch.equal(alone, other) for other in batched)


@pytest.mark.parametrize("num_tokens", [1, 40])
def test_batch_invariant_attention_is_as_accurate(backend, device, num_tokens):
    lists = make_lists([[0, 530, 1], [255, 256, 257], [0, 0, 0]], block_size=24, head_dim=32, device=device)
    check(queries(lists, 3, num_tokens), lists, scores=True, batch_invariant=True)
    check(queries(lists, 3, num_tokens), lists, window_left=300, batch_invariant=True)


def test_batch_invariant_attention_over_a_uniform_cache_and_its_ragged_form(backend, device):
    tables = torch.randperm(60, device=device).view(3, 20).int()
    lens = torch.tensor([300, 0, 257], dtype=torch.int32, device=device)
    k_cache, v_cache = torch.randn(2, 60, 16, 2, 32, device=device)
    q = torch.randn(3, 2, 6, 32, device=device)
    together = kvops.paged_attention(q, k_cache, v_cache, tables, lens, batch_invariant=True)
    for b in range(3):
        row = slice(b, b + 1)
        alone = kvops.paged_attention(q[row], k_cache, v_cache, tables[row], lens[row], batch_invariant=True)
        for a, part in zip(together, alone, strict=True):
            assert torch.equal(a[row], part)
    ragged = (tables[:, None] * 2 + torch.arange(2, device=device)[:, None]).int()
    caches = (cache.transpose(1, 2).reshape(-1, 16, 32) for cache in (k_cache, v_cache))
    lists = kvops.paged_attention(q, *caches, ragged, lens[:, None].expand(3, 2), batch_invariant=True)
    assert torch.equal(together[0], lists[0])
    assert torch.equal(together[1], lists[1])


@pytest.mark.parametrize("scored", [False, True])
def test_batch_invariant_attention_over_tables_without_room(backend, device, scored):
    """No list can have a part then; the merge took the buffer of parts to be missing, and failed."""
    q = torch.randn(2, 1, 4, 16, device=device)
    cache = torch.full((3, 8, 16), math.nan, device=device)
    lens = torch.zeros(2, 2, dtype=torch.int32, device=device)
    tables = torch.empty(2, 2, 0, dtype=torch.int32, device=device)
    scores = torch.rand(3, 8, device=device) if scored else None
    out, lse = kvops.paged_attention(q, cache, cache, tables, lens, scores=scores, batch_invariant=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
