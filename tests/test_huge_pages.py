"""Large caches on a CPU ask Linux for huge pages, and nothing else changes."""

import copy
import mmap
import pickle
from pathlib import Path

import pytest
import torch

from kvops.cache import PagedKVCache, huge_pages

CPU = torch.device("cpu")
PAGE = 2 << 20
needs_linux = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without transparent huge pages"
)


def flags_of(tensor):
    """What the kernel says of the memory that a tensor begins in: ``VmFlags`` of /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word, *rest = line.split()
        if not word.endswith(":"):
            low, high = (int(end, 16) for end in word.split("-"))
            inside = low <= tensor.data_ptr() < high
        elif inside and word == "VmFlags:":
            return rest
    raise AssertionError("the tensor is in no mapping")


def small_cache():
    return PagedKVCache(
        num_layers=2, num_kv_heads=2, head_dim=64, num_blocks=600, max_batch=2, max_tokens=400, block_size=16
    )


@needs_linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_large_tensor_begins_at_a_huge_page_and_asks_for_more(dtype):
    tensor = huge_pages.empty((3, PAGE), dtype, CPU)
    assert (tensor.shape, tensor.dtype) == ((3, PAGE), dtype)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % PAGE == 0
    assert tensor.untyped_storage().nbytes() == tensor.nbytes, "pickle would store what is before and behind"
    assert "hg" in flags_of(tensor)


@needs_linux
def test_keys_and_values_of_a_cache_are_in_huge_pages():
    cache = small_cache()
    assert cache.k_cache.nbytes >= PAGE
    for side in (cache.k_cache, cache.v_cache):
        assert "hg" in flags_of(side)


def test_small_tensors_and_other_devices_are_left_to_torch():
    assert huge_pages.empty((4, 5), torch.float16, CPU).shape == (4, 5)
    assert huge_pages.empty((4, PAGE), torch.float32, torch.device("meta")).device.type == "meta"


def test_a_kernel_without_huge_pages_gives_plain_memory(monkeypatch):
    class Without(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Without)
    tensor = huge_pages.empty((2, PAGE), torch.float32, CPU)
    assert tensor.shape == (2, PAGE)
    assert tensor.fill_(1).sum() == 2 * PAGE


def test_a_cache_computes_the_same_without_huge_pages(monkeypatch):
    def decode():
        generator = torch.Generator().manual_seed(0)
        cache = small_cache()
        positions = cache.extend(300)
        q = torch.randn(2, 300, 4, 64, generator=generator)
        k = torch.randn(2, 300, 2, 64, generator=generator)
        cache.append(1, k, k, positions)
        return cache.attend(1, q)

    first = decode()
    monkeypatch.setattr(huge_pages, "_POSSIBLE", False)
    for a, b in zip(first, decode(), strict=True):
        assert torch.equal(a, b)


def test_copies_and_pickles_of_a_large_cache_hold_what_it_holds():
    cache = small_cache()
    cache.k_cache.normal_()
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(other.k_cache, cache.k_cache)
        other.k_cache.zero_()
        assert cache.k_cache.any()
