"""copy_blocks against plain indexing, and rows that share blocks, in the eager implementation and in the kernels."""

import pytest
import torch
from cache_helpers import HEADS, LAYERS, feed, make_cache

import kvops

NUMBA = True


def random_bytes(*shape, dtype):
    """Any bits, those of NaN among them."""
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype)[..., 0]


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize(
    ("dtype", "size", "widths"),
    [
        (torch.float16, 5, (7, 33)),
        (torch.bfloat16, 16, (64, 64)),
        (torch.float8_e4m3fn, 1, (3, 1)),
        (torch.float8_e5m2, 2, (32, 5)),
        (torch.int8, 4, (16, 24)),
        (torch.float64, 3, (1, 2)),
    ],
)
def test_blocks_are_copied_byte_for_byte_and_no_others(backend, device, dtype, size, widths):
    blocks = 9
    k, v = (random_bytes(blocks, size, width + 2, dtype=dtype).to(device) for width in widths)
    sides = {
        "positions": random_bytes(blocks, size, dtype=torch.int32).to(device),
        "scores": random_bytes(blocks, size, dtype=torch.float32).to(device),
    }
    arrays = k[..., 1:-1], v[..., 1:-1], *sides.values()  # strided views, whose neighbours must stay
    expected = [array.cpu().clone() for array in arrays]
    around = [array[..., [0, -1]].cpu().clone() for array in (k, v)]
    pairs = {3: 8, 0: 2, 4: 5}
    for old in expected:
        for source, target in pairs.items():
            as_bytes_of = old.view(torch.uint8) if old.dtype.itemsize == 1 else old
            as_bytes_of[target] = as_bytes_of[source].clone()
    # Entries whose target is negative are left out, whatever their source says.
    source = torch.tensor([3, 1, 0, 2**31 - 1, 4], dtype=torch.int32, device=device)
    target = torch.tensor([8, -1, 2, -7, 5], dtype=torch.int32, device=device)
    kvops.copy_blocks(*arrays[:2], source, target, positions=arrays[2], scores=arrays[3])
    for array, old in zip(arrays, expected, strict=True):
        assert torch.equal(as_bytes(array.cpu()), as_bytes(old))
    for array, old in zip((k, v), around, strict=True):
        assert torch.equal(as_bytes(array[..., [0, -1]].cpu()), as_bytes(old))


def test_nothing_to_copy_changes_nothing(backend, device):
    cache = torch.randn(3, 2, 4, device=device)
    before = cache.clone()
    none = torch.empty(0, dtype=torch.int32, device=device)
    kvops.copy_blocks(cache, cache, none, none)
    kvops.copy_blocks(cache, cache, torch.zeros(4, dtype=torch.int32, device=device), none.new_full((4,), -1))
    assert torch.equal(cache, before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_cache": torch.zeros(3, 2)}, ValueError, "k_cache: expected"),
        ({"v_cache": torch.zeros(3, 1, 4)}, ValueError, r"v_cache: expected shape .* = \[3, 2, any\], got \[3, 1, 4\]"),
        ({"k_cache": torch.zeros(3, 4, 2).transpose(1, 2)}, ValueError, "k_cache: expected the last dimension"),
        ({"k_cache": torch.zeros(3, 2, 4, dtype=torch.complex128)}, TypeError, "k_cache: expected elements of 1, 2, 4"),
        ({"source": torch.zeros(2)}, TypeError, "source: expected dtype int32, got float32"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, ValueError, "target: expected shape .* got"),
        ({"positions": torch.zeros(3, 2)}, TypeError, "positions: expected dtype int32, got float32"),
        ({"scores": torch.zeros(3, 3)}, ValueError, "scores: expected shape"),
        ({"source": torch.full((2,), 3, dtype=torch.int32)}, ValueError, r"source: expected blocks from 0 to 2"),
        ({"target": torch.full((2,), 3, dtype=torch.int32)}, ValueError, "target: expected blocks up to 2"),
    ],
)
def test_bad_input_to_copy_blocks_is_named(change, error, message, monkeypatch):
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    entries = torch.zeros(2, dtype=torch.int32)
    arguments = {"k_cache": torch.zeros(3, 2, 4), "v_cache": torch.zeros(3, 2, 4), "source": entries, "target": entries}
    with pytest.raises(error, match=message):
        kvops.copy_blocks(**{**arguments, **change})


def contents(cache, row):
    return [
        [side.tolist() for side in cache.gather(layer, row, head)] for layer in range(LAYERS) for head in range(HEADS)
    ]


def test_forks_go_their_own_ways_and_share_what_neither_writes(backend, device):
    """A prompt of 10 tokens, two forks of it: blocks 0 and 1 of each list stay shared whatever happens to the last."""
    cache = make_cache(device)
    feed(cache, 10, rows=[0])
    prompt = contents(cache, 0)
    cache.fork(0, [1, 2])
    assert cache.stats().blocks_in_use == 4 * 3
    feed(cache, 3, rows=[1])
    feed(cache, 1, rows=[2])
    assert contents(cache, 0) == prompt
    # Rows 1 and 2 copied the last block before they wrote it, and row 1 took one more.
    assert cache.stats().blocks_in_use == 4 * (3 + 2 + 1)
    for layer in range(LAYERS):
        q = torch.ones(1, 1, HEADS, 3, device=device)
        cache.attend(layer, q, rows=1, accumulate="sum")
    assert not cache.scores[cache.block_tables[:, 0, :, :3].long()].any()
    assert not cache.scores[cache.block_tables[:, 2, :, :3].long()].any()
    others = contents(cache, 0), contents(cache, 2)
    cache.evict(4, rows=1)
    assert (contents(cache, 0), contents(cache, 2)) == others
    cache.rollback(3, rows=2)
    feed(cache, 5, rows=[2], first=50_000.0)
    assert contents(cache, 0) == prompt
    cache.free([0])
    assert contents(cache, 2)[0][2] == [*range(8), *range(8, 13)]
    cache.free()
    assert cache.stats().blocks_in_use == 0


def test_a_fork_that_cannot_be_copied_changes_nothing(device):
    cache = make_cache(device, num_layers=1, num_kv_heads=1, num_blocks=3)
    feed(cache, 10, rows=[0])
    cache.fork(0, 1, num_tokens=7)
    before = [cache.gather(0, row, 0)[0].tolist() for row in (0, 1)]
    with pytest.raises(kvops.OutOfBlocksError, match="needs 1 more blocks, but 0 of 3 are free"):
        cache.extend(1, rows=1)
    with pytest.raises(kvops.OutOfBlocksError, match="copies of shared blocks take 2 more blocks"):
        cache.unshare(1)
    assert [cache.gather(0, row, 0)[0].tolist() for row in (0, 1)] == before
    cache.free(0)
    cache.extend(1, rows=1)  # nobody shares it now


def test_bad_forks_are_named(device, monkeypatch):
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    cache = make_cache(device)
    cache.extend(6, rows=0)
    cases = [
        (lambda: cache.fork(0, [1, 0]), r"into: expected rows other than 0 itself, got \[1, 0\]"),
        (lambda: cache.fork(0, 3), r"rows: expected different row numbers in 0..2, got \[3\]"),
        (lambda: cache.fork(0, 1, num_tokens=7), "num_tokens: expected at most the 6 of row 0, got 7"),
        (lambda: cache.fork(0, 1, num_tokens=-1), "num_tokens: expected at least 0, got -1"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            bad()
    cache.evict(4, rows=0)
    with pytest.raises(ValueError, match="num_tokens: expected None, as row 0 is compressed, got 3"):
        cache.fork(0, 1, num_tokens=3)
