"""Remembered prefixes: found by their tokens alone, shared, given back when room is needed, and harmless to rows."""

import pytest
import torch
from cache_helpers import HEADS, LAYERS, SIZE, feed, make_cache, raw_state

import kvops

LISTS = LAYERS * HEADS


def remembered(device, tokens, **sizes):
    cache = make_cache(device, **sizes)
    feed(cache, len(tokens), rows=[0])
    cache.remember(0, tokens)
    return cache


def test_a_prompt_begins_with_what_an_earlier_one_left(device):
    tokens = list(range(100, 111))
    cache = remembered(device, tokens)
    first = [[side.tolist() for side in cache.gather(1, 0, head)] for head in range(HEADS)]
    cache.free()
    assert cache.stats().blocks_in_use == 2 * LISTS  # two full blocks of every list stay, the part of a third goes
    assert cache.recall(2, torch.tensor([*tokens, 7, 7, 7])) == 8
    assert cache.next_positions.tolist() == [0, 0, 8]
    assert [[side.tolist() for side in cache.gather(1, 2, head)] for head in range(HEADS)] == [
        [side[:8] for side in sides] for sides in first
    ]
    assert cache.stats().blocks_in_use == 2 * LISTS
    assert feed(cache, 3, rows=[2]).tolist() == [[8, 9, 10]]


def test_a_chunk_behind_a_recalled_prefix_attends_as_if_the_row_had_read_it_all(backend, device):
    """To the bit: the same slots in the same order, wherever they lie."""
    k, v = (torch.randn(1, 13, HEADS, width, device=device) for width in (3, 2))
    q = torch.randn(1, 5, 2 * HEADS, 3, device=device)
    cache = make_cache(device, num_layers=1)

    def read(row, start):
        positions = cache.extend(13 - start, rows=row)
        cache.append(0, k[:, start:], v[:, start:], positions, rows=row)
        return cache.attend(0, q, rows=row, window_left=9)

    alone = read(0, 0)
    cache.remember(0, range(13))
    cache.free(0)
    cache.extend(3, rows=2)  # takes what is free in between
    assert torch.equal(read(1, cache.recall(1, range(13))), alone)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 1, "num_kv_heads": 1},  # one list
        {"max_batch": 1, "max_tokens": SIZE},  # tables of one block: the lists lie side by side
        {"num_layers": 1, "num_kv_heads": 1, "max_batch": 2, "max_tokens": SIZE},
    ],
)
def test_a_remembered_prefix_does_not_change_with_the_row_it_came_from(device, sizes):
    """The blocks of the prefix were a view of the row's table, and followed it to other blocks."""
    cache = make_cache(device, **sizes)
    last = cache.max_batch - 1
    feed(cache, 4, rows=[0], first=1.0)
    known = [cache.gather(layer, 0, 0)[0].tolist() for layer in range(cache.num_layers)]
    cache.remember(0, [1, 2, 3, 4])
    cache.free(0)
    feed(cache, 4, rows=[last], first=91.0)
    cache.free(0)
    feed(cache, 3, rows=[0], first=191.0)
    assert cache.recall(0, [1, 2, 3, 4, 5]) == 4
    assert [cache.gather(layer, 0, 0)[0].tolist() for layer in range(cache.num_layers)] == known


def test_copies_that_would_not_fit_without_prefixes_either_leave_them_alone(device):
    """Every prefix was forgotten first, then the request was refused all the same."""
    cache = remembered(device, range(8), num_blocks=2 * LISTS)
    cache.fork(0, 1)
    before = raw_state(cache)
    scores = torch.zeros(2, HEADS, 8, device=device)
    for bad in (
        lambda: cache.unshare([0, 1]),
        lambda: cache.set_scores(0, scores, rows=[0, 1]),
        lambda: cache.prepare(0, rows=[0, 1], evicts=True),
    ):
        with pytest.raises(kvops.OutOfBlocksError, match=f"{4 * LISTS} more blocks, but 0 of"):
            bad()
        assert raw_state(cache) == before
    cache.free(1)
    assert cache.recall(1, [*range(8), 0]) == 8


def test_the_last_token_is_never_recalled(device):
    cache = remembered(device, range(8))
    assert cache.recall(1, range(8)) == 4
    assert cache.recall(1, range(9)) == 8
    assert cache.recall(1, []) == 0
    assert cache.seq_lens[:, 1].unique().tolist() == [0]


def test_a_prefix_is_all_of_its_tokens_in_order_and_its_salt(device):
    cache = remembered(device, [1, 2, 3, 4, 5, 6, 7, 8])
    for other in ([1, 2, 3, 9, 5, 6, 7, 8, 0], [5, 6, 7, 8, 0], [2, 1, 3, 4, 5, 6, 7, 8, 0]):
        assert cache.recall(1, other) == 0
    assert cache.recall(1, [1, 2, 3, 4, 5, 6, 7, 9, 0]) == 4
    assert cache.recall(1, [1, 2, 3, 4, 5, 6, 7, 8, 0], salt="tenant") == 0
    cache.remember(0, [1, 2, 3, 4], salt="tenant")
    assert cache.recall(1, [1, 2, 3, 4, 5, 6, 7, 8, 0], salt="tenant") == 4
    assert cache.recall(1, [-1, 2**62, 3, 4, 5]) == 0


def test_only_what_is_new_is_taken_in(device):
    cache = remembered(device, range(8))
    feed(cache, 12, rows=[1])
    assert cache.remember(1, range(12)) == 12  # its first two blocks are remembered already, from row 0
    cache.free()
    assert cache.stats().blocks_in_use == 3 * LISTS
    assert cache.stats().tokens_remembered == 12


def test_room_is_made_by_what_is_used_least_and_no_sharer_notices(device):
    cache = remembered(device, range(8), num_blocks=8 * LISTS, max_batch=4)
    for row in (1, 2):
        feed(cache, 8, rows=[row])
        cache.remember(row, range(100 * row, 100 * row + 8))
    cache.free()
    assert cache.recall(3, [*range(100, 108), 0]) == 8  # now in use, and the newest
    kept = cache.gather(0, 3, 0)[0].tolist()
    feed(cache, 16, rows=[0])  # two blocks of each list were free: the end of the oldest prefix goes first
    assert cache.stats().blocks_unused == 2 * LISTS
    assert cache.recall(1, [*range(8), 0]) == 0
    cache.free(1)
    assert cache.recall(1, [*range(200, 208), 0]) == 8
    cache.free(1)
    feed(cache, 8, rows=[2])
    assert cache.recall(1, [*range(200, 208), 0]) == 0
    assert cache.gather(0, 3, 0)[0].tolist() == kept
    cache.free(3)
    assert cache.recall(3, [*range(100, 108), 0]) == 8


def test_what_was_recalled_last_stays_longest(device):
    prompts = [[*range(100 * row, 100 * row + 8), -1] for row in range(3)]
    cache = make_cache(device, num_blocks=6 * LISTS)
    for row, tokens in enumerate(prompts):
        feed(cache, 8, rows=[row])
        cache.remember(row, tokens[:8])
    cache.free()
    assert cache.recall(0, prompts[0]) == 8
    cache.free()
    cache.extend(4, rows=2)  # the pool is full of prompts: the end of the second is what is needed least
    assert [cache.recall(0, tokens) for tokens in prompts] == [8, 4, 8]


def test_blocks_remembered_under_two_salts_are_given_back_too(device):
    cache = remembered(device, range(8), num_blocks=3 * LISTS)
    cache.remember(0, range(8), salt="another")
    cache.free()
    cache.extend(8, rows=1)
    cache.free()
    cache.extend(12, rows=1)
    assert cache.stats().tokens_remembered == 0


def test_a_row_alone_with_the_memory_of_it_is_compressed_in_place(device):
    """No block is free for a copy: rather than refusing, the cache forgets."""
    cache = remembered(device, range(16), num_blocks=4 * LISTS)
    for layer in range(LAYERS):
        cache.set_scores(layer, torch.rand(1, HEADS, 16, device=device), rows=0)
    assert cache.recall(1, range(17)) == 0
    cache.evict(2 * LISTS, rows=0)
    assert cache.stats().blocks_in_use == 2 * LISTS


def test_bad_prefixes_are_named(device):
    cache = remembered(device, range(8))
    with pytest.raises(ValueError, match="tokens: expected at most the 8 of row 0, got 9"):
        cache.remember(0, range(9))
    with pytest.raises(ValueError, match=r"tokens: expected 1 dimensions \[tokens\], got shape \[1, 8\]"):
        cache.recall(1, torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"row: expected a row number in 0\.\.2, got 3"):
        cache.recall(3, range(8))
    cache.evict(4, rows=0)
    with pytest.raises(ValueError, match="row: expected one that has not been compressed, got 0"):
        cache.remember(0, range(4))


def test_forgetting_gives_back_what_no_row_uses(device):
    cache = remembered(device, range(12))
    cache.recall(1, range(9))
    cache.free(0)
    cache.forget()
    assert cache.stats().blocks_in_use == 2 * LISTS
    assert cache.gather(0, 1, 0)[2].tolist() == list(range(2 * SIZE))
    assert cache.recall(0, range(9)) == 0
    cache.forget()
