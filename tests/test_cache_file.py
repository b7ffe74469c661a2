"""A cache in a file: every byte comes back, what was shared is shared again, and what was freed is not in it."""

import os
import subprocess
import sys

import pytest
import torch
from cache_helpers import HEADS, LAYERS, feed, make_cache, whole_state
from safetensors import safe_open

import kvops


def lists_of(cache):
    places = [(a, b, c) for a in range(LAYERS) for b in range(cache.max_batch) for c in range(HEADS)]
    contents = {place: [side.view(torch.uint8).tolist() for side in cache.gather(*place)] for place in places}
    scores = [cache.scores[cache.block_tables[place].long()].flatten()[: cache.seq_lens[place]] for place in places]
    return contents, [score.tolist() for score in scores]


def a_used_cache(device, **changes):
    """A prompt, remembered and forked; a compressed fork, one that rolled back, and an empty row."""
    cache = make_cache(device, max_batch=4, **changes)
    feed(cache, 14, rows=[0], first=0.125)
    cache.remember(0, range(14))
    cache.fork(0, [1, 2], num_tokens=10)
    for layer in range(LAYERS):
        cache.set_scores(layer, torch.rand(1, HEADS, 10, device=device), rows=1)
    cache.evict(7, rows=1, protect_last=2)
    feed(cache, 5, rows=[2])
    cache.rollback(4, rows=2)
    return cache


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float8_e4m3fn, {"k_scale": torch.rand(LAYERS, HEADS) * 1000 + 100, "v_scale": 300.0}),
        (torch.int8, {"k_scale": torch.rand(LAYERS, HEADS) * 100 + 10, "v_dtype": torch.bfloat16}),
        (torch.float32, {"v_dtype": torch.float8_e5m2, "v_scale": 3.0}),
        (torch.int8, {"slot_scales": True}),
        (torch.int8, {"slot_scales": True, "v_dtype": torch.bfloat16}),
    ],
)
def test_every_byte_comes_back_and_the_rows_go_on_alike(device, tmp_path, dtype, scales):
    cache = a_used_cache(device, dtype=dtype, **scales)
    cache.extend(2, rows=3)
    cache.rollback(2, rows=3)  # its blocks are kept in memory, but not in the file
    cache.save(tmp_path / "cache")
    loaded = kvops.PagedKVCache.load(tmp_path / "cache", device=device)
    cache.free(3)
    cache.extend(3, rows=2)  # into blocks that it kept
    loaded.extend(3, rows=2)
    cache.rollback(3, rows=2)
    loaded.rollback(3, rows=2)
    assert whole_state(loaded) == whole_state(cache)
    for both in (cache, loaded):
        assert both.recall(3, [*range(12), -1]) == 12
        feed(both, 3, rows=[0, 1, 2, 3])
        both.evict(9, rows=[1, 3])
    assert whole_state(loaded) == whole_state(cache)
    assert str(loaded.stats()) == str(cache.stats())
    for both in (cache, loaded):
        both.free()
        both.forget()
        assert both.stats().blocks_free == both.num_blocks


def test_a_loaded_cache_knows_what_was_evicted(monkeypatch, device, tmp_path):
    """The saved cache refused to roll back past an eviction, the loaded one did it and lost survivors."""
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    cache = make_cache(device)
    feed(cache, 12, rows=[0])
    cache.evict(4, rows=0, scope="head")
    feed(cache, 2, rows=[0])
    cache.save(tmp_path / "cache")
    loaded = kvops.PagedKVCache.load(tmp_path / "cache", device=device)
    for both in (cache, loaded):
        with pytest.raises(ValueError, match="tokens that came in after the last eviction, got 2 more"):
            both.rollback(4, rows=0)
        both.rollback(2, rows=0)
    assert whole_state(loaded) == whole_state(cache)


def test_the_file_has_every_part_of_the_state(device):
    """A new attribute belongs into the file and into whole_state(), unless it follows from what is there."""
    cache = make_cache(device)
    stored = {
        "_config": "num_layers num_kv_heads head_dim v_head_dim num_blocks max_batch max_tokens block_size dtype "
        "v_dtype device",
        "_storage": "k_cache v_cache positions scores _scores k_scale v_scale k_slot_scale v_slot_scale",
        "_states": "next_positions settled compressed",
        "_prefixes": "pool entries _clock",
        "_pool": "num_blocks max_tokens max_blocks block_size tables lens held sharers free free_count in_order exact "
        "prefixes bound _list_starts _columns",
    }
    for part, names in stored.items():
        assert set(vars(getattr(cache, part))) == set(names.split())
    without_state = {"_selector", "_allocator", "_evictor"}
    assert {name for name in vars(cache) if name.startswith("_")} == {*stored, *without_state}


def test_a_bounded_host_knows_what_it_loaded(device, tmp_path):
    a_used_cache(device).save(tmp_path / "cache")
    loaded = kvops.PagedKVCache.load(tmp_path / "cache", device=device)
    stats, bound = loaded.stats(), loaded._pool.bound
    assert bound.total() == stats.blocks_in_use
    assert [bound.row_blocks(row) for row in range(4)] == loaded._pool.held.sum((0, 2)).tolist()
    assert bound.longest[:4] == loaded.seq_lens.amax((0, 2)).tolist()


def test_equal_caches_give_equal_files_without_what_was_freed(device, tmp_path):
    files = []
    for secret in (1234.5, 77.25):
        cache = make_cache(device)
        cache.k_cache.fill_(secret)
        cache.v_cache.fill_(secret)
        feed(cache, 9, rows=[1], first=secret)
        cache.free(1)
        feed(cache, 3 if secret > 100 else 6, rows=[2])  # other blocks
        feed(cache, 5, rows=[0])
        cache.free(2)
        cache.save(tmp_path / "cache")
        files.append((tmp_path / "cache").read_bytes())
    assert files[0] == files[1]
    with safe_open(tmp_path / "cache", "pt") as file:
        assert file.get_slice("k_cache").get_shape()[0] == 2 * LAYERS * HEADS
    assert os.listdir(tmp_path) == ["cache"]


def test_a_pool_may_be_loaded_larger_and_as_small_as_what_it_holds(device, tmp_path):
    cache = make_cache(device)
    feed(cache, 9, rows=[1])
    cache.save(tmp_path / "cache")
    for num_blocks in (12, 200):
        loaded = kvops.PagedKVCache.load(tmp_path / "cache", num_blocks=num_blocks, device=device)
        assert lists_of(loaded) == lists_of(cache)
        assert loaded.stats().blocks_free == num_blocks - 12
    with pytest.raises(ValueError, match="num_blocks: expected at least the 12 blocks that the file holds, got 11"):
        kvops.PagedKVCache.load(tmp_path / "cache", num_blocks=11)


def test_an_empty_cache_is_saved_and_loaded(device, tmp_path):
    make_cache(device).save(tmp_path / "cache")
    loaded = kvops.PagedKVCache.load(tmp_path / "cache", device=device)
    assert loaded.stats().blocks_in_use == 0
    feed(loaded, 3, rows=[0])


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"path: expected a file that PagedKVCache.save wrote, .* none at"):
        kvops.PagedKVCache.load(path)
    with pytest.raises(IsADirectoryError, match=r"path: expected a file, got the folder"):
        make_cache("cpu").save(tmp_path)
    path.write_bytes(b"\x07")
    with pytest.raises(ValueError, match=r"path: expected a file that PagedKVCache.save wrote"):
        kvops.PagedKVCache.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="path: expected a kvops paged cache of version 2, got version None"):
        kvops.PagedKVCache.load(path)
    cache = make_cache("cpu")
    feed(cache, 5, rows=[0])
    cache.save(path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name, value, message in (
        ("block_tables", 8, "path: expected block numbers below 8"),
        ("seq_lens", 41, "path: expected lengths from 0 to 40"),
        ("seq_lens", -1, "path: expected lengths from 0 to 40"),
    ):
        broken = {**tensors, name: tensors[name].clone()}
        broken[name].view(-1)[0] = value
        save_file(broken, path, metadata)
        with pytest.raises(ValueError, match=message):
            kvops.PagedKVCache.load(path)
    for name, part in (("settled", None), ("scores", tensors["scores"][:, :2]), ("prefix_parents", torch.zeros(1, 32))):
        broken = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(broken if part is None else {**broken, name: part.contiguous()}, path, metadata)
        with pytest.raises(ValueError, match=rf"path: expected {name} of shape \[.*\] in the file, got"):
            kvops.PagedKVCache.load(path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    cache = kvops.PagedKVCache(num_layers=1, num_kv_heads=1, head_dim=4, num_blocks=2, max_batch=1, max_tokens=16)
    with pytest.raises(FileNotFoundError, match="path: expected a file in a folder that exists"):
        cache.save(tmp_path / "none" / "cache.safetensors")


def test_without_safetensors_the_next_step_is_told(tmp_path):
    code = (
        "import sys; sys.modules['safetensors'] = sys.modules['safetensors.torch'] = None; import kvops;"
        "kvops.PagedKVCache(num_layers=1, num_kv_heads=1, head_dim=2, num_blocks=1, max_batch=1, max_tokens=1)"
        f".save({str(tmp_path / 'cache')!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "safetensors: expected to be installed" in result.stderr
    assert 'pip install "kvops[save]"' in result.stderr
    assert not os.listdir(tmp_path)
