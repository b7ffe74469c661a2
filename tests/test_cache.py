"""The paged cache: rows that grow, are compressed and leave; what it refuses, and what it says of itself."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from cache_helpers import BLOCKS, HEADS, LAYERS, ROWS, SIZE, feed, make_cache, name_of, raw_state, sides, whole_state

import kvops


def test_the_last_block_is_handed_out_and_one_more_is_refused(device):
    cache = make_cache(device, num_layers=1, num_kv_heads=1, num_blocks=3)
    cache.extend(9, rows=0)
    before = cache.block_tables.clone(), cache.seq_lens.clone(), cache.next_positions.clone()
    with pytest.raises(kvops.OutOfBlocksError, match=r"needs 1 more blocks, but 0 of 3 are free: .* num_blocks >= 4"):
        cache.extend(1, rows=1)
    for old, new in zip(before, (cache.block_tables, cache.seq_lens, cache.next_positions), strict=True):
        assert torch.equal(old, new)
    cache.extend(3, rows=0)
    assert cache.stats().blocks_free == 0
    with pytest.raises(ValueError, match="a list would hold 41 tokens, more than the 40 of max_tokens"):
        cache.extend(29, rows=0)


def test_a_long_extension_gets_neighbouring_blocks_also_after_others_left(device):
    cache = make_cache(device)
    for row in (0, 1):
        for _ in range(6):
            cache.extend(4, rows=row)  # interleaves the lists
    cache.free(0)
    cache.free(1)
    cache.extend(24, rows=slice(0, 2))
    tables = cache.block_tables[:, :2, :, :6].cpu()
    assert (tables.diff(dim=-1) == 1).all()


def test_freed_blocks_serve_new_sequences(device):
    cache = make_cache(device, num_blocks=2 * 2 * 10)
    feed(cache, 40, rows=[0])
    with pytest.raises(kvops.OutOfBlocksError):
        cache.extend(20, rows=1)
    for layer in range(LAYERS):
        cache.set_scores(layer, torch.rand(1, HEADS, 40, device=device), rows=0)
    cache.evict(20, rows=0)
    feed(cache, 20, rows=[1])
    assert cache.stats().blocks_free == 0
    assert cache.gather(1, 1, 1)[2].tolist() == list(range(20))


def test_rolled_back_tokens_leave_their_blocks_with_the_list(device):
    cache = make_cache(device)
    cache.extend(10, rows=0)
    tables = cache.block_tables.clone()
    cache.rollback(7, rows=0)
    assert cache.seq_lens[:, 0].unique().tolist() == [3]
    assert cache.stats().blocks_in_use == 12
    assert cache.extend(9, rows=0).tolist() == [list(range(3, 12))]
    assert torch.equal(cache.block_tables, tables)
    assert cache.stats().blocks_in_use == 12


def test_what_was_evicted_cannot_be_taken_back(monkeypatch, device):
    """A rollback past an eviction took the slots of other tokens: how many a list had lost, it did not know."""
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    cache = make_cache(device)
    feed(cache, 12)
    cache.evict(10**6)  # takes nothing
    cache.rollback(2)
    for layer in range(LAYERS):
        cache.set_scores(layer, torch.rand(ROWS, HEADS, 10, device=device))
    cache.evict(4, rows=[0, 2], scope="head")
    kept = torch.ones(1, HEADS, 10, dtype=torch.bool, device=device)
    kept[:, 1, 3] = False
    cache.keep(1, kept, rows=1)
    cache.fork(0, 2)
    feed(cache, 2)
    for row in range(ROWS):
        with pytest.raises(ValueError, match=r"num_tokens: expected at most the tokens that came in .* got 1 more"):
            cache.rollback(3, rows=row)
        with pytest.raises(ValueError, match="keep: expected at most the tokens that came in after the last eviction"):
            cache.retain(torch.tensor([[True, True, False]], device=device), rows=row)
    cache.rollback(2)
    assert cache.next_positions.tolist() == [10] * ROWS
    cache.free(0)
    feed(cache, 3, rows=[0])
    cache.rollback(3, rows=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_as_the_original_would(copied, device):
    """Views of tensors were pickled as tensors of their own: a cache that had been pickled never saw new scores."""
    cache = make_cache(device)
    feed(cache, 9)
    cache.attend(1, torch.randn(ROWS, 1, HEADS, 3, device=device))  # the cache keeps views of its tables from here on
    other = copied(cache)
    q = torch.randn(ROWS, 2, HEADS, 3, device=device)
    for each in (cache, other):
        feed(each, 8, rows=[1])
        for layer in range(LAYERS):
            each.set_scores(layer, torch.arange(17.0, device=device).expand(ROWS, HEADS, 17))
        each.evict(8)
        feed(each, 2)
    for layer in range(LAYERS):
        assert torch.equal(cache.attend(layer, q), other.attend(layer, q))
        assert cache.gather(layer, 1, 0)[2].tolist() == other.gather(layer, 1, 0)[2].tolist()


def test_a_pickled_error_keeps_its_numbers():
    error = pickle.loads(pickle.dumps(kvops.OutOfBlocksError(3, 1, 8, "rows")))
    assert (error.needed, error.free, error.total) == (3, 1, 8)
    assert str(error) == str(kvops.OutOfBlocksError(3, 1, 8, "rows"))


@pytest.mark.parametrize("lists", [(1, 1), (2, 2)])
@pytest.mark.parametrize("alike", [True, False])
def test_scales_are_the_caches_own(device, lists, alike):
    """Of the shape that the cache keeps, they were the caller's tensors."""
    scale = torch.ones(() if alike else lists, device=device)
    layers, heads = lists
    options = {"dtype": torch.float8_e4m3fn, "k_scale": scale, "v_scale": scale}
    cache = make_cache(device, num_layers=layers, num_kv_heads=heads, **options)
    scale.mul_(2)
    cache.k_scale.mul_(4)
    assert cache.k_scale.unique().tolist() == [4]
    assert cache.v_scale.unique().tolist() == [1]
    assert scale.unique().tolist() == [2]


@pytest.mark.parametrize("lists", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("into", [[1, 3], [3, 1], [2], [], slice(1, 4, 2)])
def test_a_row_is_forked_into_any_rows(device, lists, into):
    """Into rows that are no ascending range torch refused the assignment, with sharers counted: blocks leaked."""
    layers, heads = lists
    cache = make_cache(device, num_layers=layers, num_kv_heads=heads, max_batch=4)
    feed(cache, 6, rows=[0])
    held = cache.gather(0, 0, 0)[0].tolist()
    feed(cache, 2, rows=[1, 3])
    cache.fork(0, into)
    numbers = list(range(4))[into] if isinstance(into, slice) else into
    assert all(cache.gather(0, row, 0)[0].tolist() == held for row in [0, *numbers])
    cache.free()
    assert cache.stats().blocks_free == cache.num_blocks


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 0], [2, 2, 2], [1, 0, 1]])
def test_rows_continue_from_other_rows_in_any_order(device, order):
    cache = make_cache(device)
    feed(cache, 9, q_lens=[9, 2, 6])
    cache.keep(0, torch.arange(4, device=device).expand(1, HEADS, 4) > 0, rows=[2])
    before = [[cache.gather(layer, row, 1) for layer in range(LAYERS)] for row in range(ROWS)]
    positions, compressed = cache.next_positions.tolist(), list(cache.compressed)
    in_use = cache.stats().blocks_in_use
    cache.reorder(torch.tensor(order, device=device))
    assert cache.stats().blocks_in_use <= in_use  # nothing is copied
    for row, source in enumerate(order):
        for layer in range(LAYERS):
            for now, then in zip(cache.gather(layer, row, 1), before[source][layer], strict=True):
                assert torch.equal(now, then)
    assert cache.next_positions.tolist() == [positions[row] for row in order]
    assert cache.compressed == [compressed[row] for row in order]
    feed(cache, 1, first=100_000.0)  # rows that share a block get copies of their own
    for row, source in enumerate(order):
        expected = 100_000 + name_of(0, row, 1, positions[source])
        assert cache.gather(0, row, 1)[0][-1].tolist() == [expected] * 3
    cache.free()
    assert cache.stats().blocks_free == cache.num_blocks


def test_a_cache_with_other_rows_holds_what_they_held(device):
    cache = make_cache(device)
    feed(cache, 9, q_lens=[9, 2, 6])
    new = cache.with_rows([2, 0, 0, 1, 2], num_blocks=BLOCKS + 8)
    assert new.next_positions.tolist() == [6, 9, 9, 2, 6]
    for row, source in enumerate([2, 0, 0, 1, 2]):
        assert torch.equal(new.gather(1, row, 0)[0], cache.gather(1, source, 0)[0])
    assert new.stats().blocks_in_use == cache.stats().blocks_in_use
    feed(new, 1)
    assert cache.next_positions.tolist() == [9, 2, 6]
    with pytest.raises(ValueError, match="num_blocks: expected at least 64, got 1"):
        cache.with_rows([0], num_blocks=1)
    with pytest.raises(ValueError, match=r"order: expected a row number in 0..2, got 3"):
        cache.with_rows([3])
    with pytest.raises(ValueError, match="order: expected a row for each of the 3 rows, got 2"):
        cache.reorder([0, 1])


def test_max_tokens_is_the_capacity_of_a_list(device):
    """A list that filled whole blocks had room for more than was asked for."""
    cache = make_cache(device, max_tokens=25, block_size=16)
    cache.extend(25, rows=0)
    before = raw_state(cache)
    for num_tokens in (1, 25, 2**32, 2**40):
        for call in (cache.extend, cache.prepare):
            with pytest.raises(ValueError, match=rf"num_tokens: .* max_tokens|num_tokens: a list .* {25 + num_tokens}"):
                call(num_tokens, rows=0)
    with pytest.raises(ValueError, match="num_tokens: a list would hold 26 tokens, more than the 25 of max_tokens"):
        cache.extend(40, q_lens=torch.tensor([1], dtype=torch.int32, device=device), rows=0)
    assert raw_state(cache) == before
    assert "rows of up to 25 tokens" in repr(cache)


@pytest.mark.parametrize("exact", [True, False])
def test_numbers_that_int32_does_not_hold_are_refused(device, exact):
    """They wrapped around: 2**32 tokens were rolled back as 0."""
    cache = make_cache(device)
    feed(cache, 6, rows=[0])
    cache._pool.exact = exact
    for number in (2**31, 2**32, 2**32 + 2, 2**40):
        for call in (
            lambda number=number: cache.rollback(number, rows=0),
            lambda number=number: cache.fork(0, 1, num_tokens=number),
        ):
            with pytest.raises(ValueError, match=rf"num_tokens: expected at most max_tokens = 40, got {number}"):
                call()


def test_a_refused_operation_changes_nothing(device):
    """Rows were unshared, freed or prepared before the last thing that could be refused."""
    cache = make_cache(device, num_blocks=24)
    feed(cache, 9, rows=[0])
    cache.fork(0, [1])
    before = raw_state(cache)
    q = torch.randn(2, 1, HEADS, 3, device=device)
    elsewhere = "meta" if torch.device(device).type == "cpu" else "cpu"
    rows = [0, 1]
    for bad, error, message in (
        (lambda: cache.attend(0, q[..., :2], rows=rows, accumulate="sum"), ValueError, "k_cache: expected shape"),
        (lambda: cache.attend(0, q, rows=rows, accumulate="mean"), ValueError, "accumulate: expected one of 'sum'"),
        (lambda: cache.attend(0, q, rows=rows, accumulate="sum", decay=-1), ValueError, "decay: expected at l"),
        (lambda: cache.attend(2, q, rows=rows, accumulate="sum"), ValueError, "layer: expected"),
        (lambda: cache.attend(0, q[0], rows=rows, window_left=3), ValueError, "q: expected 4 dimensions"),
        (lambda: cache.keep(2, torch.ones(2, HEADS, 3).bool().to(device), rows=rows), ValueError, "layer: expected"),
        (lambda: cache.keep(0, torch.ones(2, HEADS, 3).bool().to(elsewhere), rows=rows), ValueError, "kept: .*device"),
        (lambda: cache.retain(torch.ones(2, 3).bool().to(elsewhere), rows=rows), ValueError, "keep: .* device"),
        (lambda: cache.set_scores(0, torch.ones(2, HEADS, 3).to(elsewhere), rows=rows), ValueError, "scores: .*device"),
        (lambda: cache.extend(2, q_lens=torch.ones(2).int().to(elsewhere), rows=rows), ValueError, "q_lens: .*device"),
        (lambda: cache.prepare(20, rows=rows, evicts=True), kvops.OutOfBlocksError, "needs 52 more blocks, but 12 of"),
        (lambda: cache.prepare(32, rows=rows, evicts=True), ValueError, "a list would hold 41 tokens"),
        (lambda: cache.remember(0, range(10)), ValueError, "tokens: expected at most"),
        (lambda: cache.remember(0, range(9), salt=None), TypeError, "salt: expected a str, got None"),
        (lambda: cache.fork(0, [1, 2], num_tokens=10), ValueError, "num_tokens: expected at most the 9 of row 0"),
    ):
        with pytest.raises(error, match=message):
            bad()
        assert raw_state(cache) == before


def test_marks_of_any_strides_are_kept(device):
    """Marks that were not contiguous were refused by the operator, once the rows had blocks of their own."""
    cache, other = make_cache(device), make_cache(device)
    kept = torch.rand(ROWS, cache.max_blocks * SIZE, HEADS, device=device) < 0.5
    for each, marks in ((cache, kept.transpose(1, 2)), (other, kept.transpose(1, 2).contiguous())):
        feed(each, 9)
        each.keep(0, marks)
    assert torch.equal(cache.seq_lens, other.seq_lens)


def a_step(cache, device):
    feed(cache, 5, rows=[0])
    cache.fork(0, [1])
    cache.remember(0, range(5))
    cache.attend(0, torch.ones(1, 2, HEADS, 3, device=device), rows=[1], accumulate="sum", window_left=3)
    feed(cache, 3, rows=[0, 1])
    cache.retain(torch.tensor([[True, False]] * 2, device=device), rows=[0, 1])
    cache.evict(8, rows=[1])
    cache.keep(1, torch.zeros(1, HEADS, 2, dtype=torch.bool, device=device), rows=1)
    feed(cache, 2, rows=[2, 0])
    cache.rollback(1, rows=[0, 2])
    cache.set_scores(0, torch.ones(1, HEADS, 4, device=device), rows=2)
    cache.free(1)
    cache.recall(1, range(5))


@pytest.mark.parametrize(
    "made",
    [
        make_cache,
        lambda device: copy.deepcopy(make_cache(device)),
        lambda device: pickle.loads(pickle.dumps(make_cache(device))),
    ],
)
def test_a_cache_first_used_in_inference_mode_goes_on_outside_of_it(device, made):
    """Its tensors were inference tensors, which nothing may write outside of that mode."""
    cache, other = None, make_cache(device)
    with torch.inference_mode():
        cache = made(device)
        a_step(cache, device)
    a_step(other, device)
    with torch.no_grad():
        a_step(cache, device)
    a_step(other, device)
    a_step(cache, device)
    a_step(other, device)
    assert whole_state(cache) == whole_state(other)
    assert not any(tensor.is_inference() for tensor in sides(cache))


def test_keys_of_another_dtype_are_named(device):
    """The cache was blamed for them."""
    cache = make_cache(device)
    positions = cache.extend(1)
    k = torch.zeros(ROWS, 1, HEADS, 3, device=device)
    for keys, values, name in ((k.half(), k.half()[..., :2], "k"), (k, k.half()[..., :2], "v")):
        with pytest.raises(TypeError, match=rf"^{name}: expected the dtype of k(_cache)?, float32, got float16"):
            cache.append(0, keys, values, positions)
    with pytest.raises(TypeError, match=r"^q: expected the dtype of k_cache, float32, got bfloat16"):
        cache.attend(0, k.bfloat16())


def test_arrays_are_not_printed_whole(device):
    cache = make_cache(device)
    many, q = np.arange(10_000.0), torch.zeros(ROWS, 1, HEADS, 3, device=device)
    for bad, argument in (
        (lambda: cache.extend(many), "num_tokens: expected an int"),
        (lambda: cache.extend(1, rows=many), "rows: expected a slice"),
        (lambda: cache.extend(1, rows=np.arange(10_000)), "rows: expected different row numbers"),
        (lambda: cache.extend(1, rows=np.ones(10_000, dtype=bool).tolist()), "rows: expected row numbers"),
        (lambda: cache.evict(many), "budget: expected an int"),
        (lambda: cache.recall(0, many), "tokens: expected whole numbers"),
        (lambda: cache.evict(1, scope=many), "scope: expected one of"),
        (lambda: cache.attend(0, q, accumulate="sum", decay=many), "decay: expected a number"),
        (lambda: make_cache(device, num_blocks=many), "num_blocks: expected an int"),
        (lambda: make_cache(device, dtype=torch.float8_e4m3fn, k_scale=many), "k_scale: expected a number"),
    ):
        with pytest.raises((TypeError, ValueError), match=argument) as refusal:
            bad()
        assert len(str(refusal.value)) < 200


def test_the_bound_counts_a_copy_for_every_block_that_is_written_again(device):
    """Each time a little is rolled back and written again, the tokens alone bound fewer blocks than are copied."""
    cache = make_cache(device, num_layers=1, num_kv_heads=1)
    feed(cache, 12, rows=[0])
    cache.fork(0, 1)
    cache._pool.exact = False
    for number in (1, 5, 5):
        cache.rollback(number, rows=1)
        feed(cache, 1, rows=[1])
    assert cache.stats().blocks_in_use == 6
    assert cache._pool.bound.total() >= 6


def test_a_misspelt_argument_names_the_class(device):
    """The error named an internal base class."""
    with pytest.raises(TypeError, match=r"^PagedKVCache\.__init__\(\) got an unexpected keyword argument 'num_block'"):
        make_cache(device, num_block=3)


def test_rows_may_be_named_in_any_way(device):
    for rows in (1, [1], slice(1, 2), torch.tensor([1], device=device)):
        cache = make_cache(device)
        assert cache.extend(5, rows=rows).tolist() == [[0, 1, 2, 3, 4]]
        assert cache.next_positions.tolist() == [0, 5, 0]
        assert cache.seq_lens.amax((0, 2)).tolist() == [0, 5, 0]
    cache = make_cache(device)
    feed(cache, 3, rows=[2, 0], q_lens=[3, 1])
    assert cache.seq_lens[1].tolist() == [[1, 1], [0, 0], [3, 3]]
    assert cache.gather(1, 2, 0)[2].tolist() == [0, 1, 2]
    assert cache.extend(2, rows=slice(None, None, -2)).tolist() == [[3, 4], [1, 2]]
    cache.free()
    assert cache.stats().blocks_in_use == 0
    assert cache.extend(0).shape == (ROWS, 0)
    assert cache.extend(4, rows=[]).shape == (0, 4)
    cache.free([])


def test_a_step_reads_nothing_from_the_device_while_there_is_room(device, monkeypatch):
    cache = make_cache(device)
    cache._pool.exact = False

    def refuse(*_):
        raise AssertionError("the host read a number from the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__int__", "__bool__", "__index__", "nonzero", "cpu"):
            patch.setattr(torch.Tensor, name, refuse)
        for _ in range(30):  # many times what the pool holds
            cache.extend(9, rows=slice(0, 2))
            cache.rollback(4, rows=0)
            cache.free(slice(0, 2))
    cache.extend(16, rows=0)
    for _ in range(12):
        cache.extend(2, rows=0)
        cache.rollback(2, rows=0)
    # The bound says 24 tokens more than there are; the numbers themselves say that all fits.
    cache.extend(24, rows=0)
    assert cache.stats().blocks_in_use == 40


def test_statistics_count_blocks_and_bytes(device):
    cache = make_cache(device, dtype=torch.float16)
    cache.extend(5, rows=0)
    cache.extend(17, rows=2)
    stats = cache.stats()
    assert (stats.blocks_total, stats.blocks_in_use, stats.blocks_free) == (64, 4 * (2 + 5), 36)
    assert stats.bytes_per_block == 4 * (3 + 2) * 2
    assert stats.side_bytes_per_block == 4 * (4 + 4)
    assert (stats.bytes_in_use, stats.bytes_reserved) == (28 * 40, 64 * 40)
    assert stats.lengths[1].tolist() == [[5, 5], [0, 0], [17, 17]]
    assert stats.slots_in_use == 4 * 22
    report = str(stats)
    assert "28 of 64 blocks in use (43.8%), 36 free" in report
    assert "row 2: 68 tokens in 4 lists, shortest 17, longest 17" in report
    assert "row 1" not in report
    assert [cache.blocks_for(tokens) for tokens in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_statistics_tell_what_is_shared_remembered_and_compressed(device):
    cache = make_cache(device)
    cache.extend(16, rows=0)
    cache.remember(0, range(9))
    cache.fork(0, 1, num_tokens=8)
    cache.evict(8, rows=0)
    cache.free(1)
    stats = cache.stats()
    assert (stats.blocks_shared, stats.blocks_saved) == (0, 0)
    assert (stats.tokens_remembered, stats.blocks_in_use) == (8, 8 + stats.blocks_unused)
    report = str(stats).splitlines()
    assert report[2] == "32 tokens in 32 slots of 4 a block (100.0% filled)"
    assert report[3].startswith(f"8 tokens of prefixes are remembered; no row uses {stats.blocks_unused} of their")
    assert report[4] == "row 0: 32 tokens in 4 lists, shortest 8, longest 8: 50.0% of the 16 taken in"
    cache.recall(1, range(9))
    cache.recall(2, range(9))
    report = str(cache.stats()).splitlines()
    assert report[3].endswith("would be in use if every row had its own")
    assert "of the 8 taken in" in report[-1]


def test_bad_input_is_named(device, monkeypatch):
    monkeypatch.setenv("KVOPS_DEBUG", "1")  # on a GPU the numbers are only looked at on request
    cache = make_cache(device)
    cache.extend(6, rows=[0, 1])
    q_lens = torch.tensor([3, 1], dtype=torch.int32, device=device)
    k = torch.zeros(2, 1, HEADS, 3, device=device)
    cases = [
        (lambda: make_cache(device, num_blocks=0), "num_blocks: expected at least 1, got 0"),
        (lambda: make_cache(device, block_size=-4), "block_size: expected at least 1, got -4"),
        (lambda: make_cache(device, k_scale=2.0), "k_scale: expected only for .* int8, got one of torch.float32"),
        (lambda: make_cache(device, dtype=torch.int8, v_dtype=torch.float32, v_scale=2.0), "v_scale: expected only"),
        (
            lambda: make_cache(device, dtype=torch.float8_e4m3fn, v_scale=torch.ones(2)),
            r"v_scale: expected shape \[num_layers, num_kv_heads\] = \[2, 2\], got \[2\]",
        ),
        (lambda: cache.extend(-1), "num_tokens: expected at least 0, got -1"),
        (lambda: cache.extend(2, rows=3), r"rows: expected different row numbers in 0..2, got \[3\]"),
        (lambda: cache.extend(2, rows=[1, 1]), "rows: expected different row numbers"),
        (lambda: cache.extend(2, q_lens=q_lens), r"q_lens: expected shape \[rows\] = \[3\], got \[2\]"),
        (
            lambda: cache.extend(2, q_lens=q_lens, rows=[0, 1]),
            "q_lens: expected numbers from 0 to num_tokens = 2, got 1",
        ),
        (lambda: cache.append(2, k, k, q_lens), "layer: expected a number in 0..1, got 2"),
        (lambda: cache.set_scores(0, torch.zeros(3, HEADS + 1, 4)), "scores: expected shape"),
        (lambda: cache.set_scores(0, torch.zeros(3, HEADS, 41, device=device)), "scores: expected at most 40 slots"),
        (lambda: cache.rollback(7, rows=[0, 1]), "num_tokens: expected at most .* shortest list, got 1 more"),
        (lambda: cache.rollback(-1), "num_tokens: expected at least 0, got -1"),
        (lambda: cache.rollback(-q_lens, rows=[0, 1]), "num_tokens: expected numbers of at least 0, got 2"),
        (lambda: cache.evict(-1), "budget: expected at least 0, got -1"),
        (lambda: cache.evict([1, 2]), "budget: expected one number or 3, one for each row, got 2"),
        (lambda: cache.evict(4, scope="row"), "scope: expected one of 'head', 'sequence', got 'row'"),
        (lambda: cache.evict(7, rows=0, protect_last=5), "budget: .* alone take 8 blocks of a row, .* got 7"),
    ]
    before = cache.seq_lens.clone()
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            bad()
    for mask in (torch.tensor([True, False, False]), [True, False, False], True):
        with pytest.raises(TypeError, match="rows: expected row numbers, got"):
            cache.extend(2, rows=mask)
    for bad, argument in (
        (lambda: cache.extend(1.5, rows=0), "num_tokens: expected an int, got 1.5"),
        (lambda: cache.rollback(1.5, rows=0), "num_tokens: expected an int, got 1.5"),
        (lambda: cache.fork(0, 1, num_tokens=1.5), "num_tokens: expected an int, got 1.5"),
        (lambda: cache.fork([0, 2], 1), r"row: expected an int, got \[0, 2\]"),
        (lambda: cache.evict(1.5), "budget: expected an int, got 1.5"),
        (lambda: cache.extend(1, rows=1.0), "rows: expected a slice, a row number or several, got 1.0"),
        (lambda: cache.recall(1, "text"), "tokens: expected whole numbers, got 'text'"),
        (lambda: make_cache(device, num_blocks=2.5), "num_blocks: expected an int, got 2.5"),
    ):
        with pytest.raises(TypeError, match=argument):
            bad()
    k = torch.randn(2, 1, HEADS, 3, device=device)
    for bad in (lambda: cache.append(0, k, k, torch.zeros(2, 1)), lambda: cache.attend(0, k)):
        with pytest.raises(ValueError, match=r"[kq]: expected 3 rows, as many as `rows` names, got 2"):
            bad()
    for scale in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="k_scale: expected a finite number above 0"):
            make_cache(device, dtype=torch.float8_e4m3fn, k_scale=scale)
    for name, dtype in (("dtype", torch.int16), ("v_dtype", torch.float64)):
        with pytest.raises(TypeError, match=f"^{name}: expected one of .*, got {dtype}"):
            make_cache(device, **{name: dtype})
    with pytest.raises(TypeError, match=r"v_dtype: expected that of the keys, torch.float16, .*, got torch.bfloat16"):
        make_cache(device, dtype=torch.float16, v_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="q_lens: expected dtype int32, got int64"):
        cache.extend(2, q_lens=q_lens.long(), rows=[0, 1])
    assert torch.equal(cache.seq_lens, before)
