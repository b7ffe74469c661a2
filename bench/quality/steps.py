"""How long a decoding step takes from caches of different sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from kvops.cache import PagedKVCache
from kvops.generation.passes import decode
from kvops.models.llama import Llama

_TIMED_STEPS = 7


@torch.no_grad()
def step_ms(model: Llama, caches: Mapping[str, PagedKVCache]) -> dict[str, float]:
    """Milliseconds of decoding one token from each cache, medians of a few, taken in turn and back again."""
    gpu = next(iter(caches.values())).device.type == "cuda"
    samples: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(-1, _TIMED_STEPS):
        for name, cache in caches.items():
            token = torch.zeros(1, 1, dtype=torch.int64, device=cache.device)
            started = time.perf_counter()
            model.logits(decode(model, cache, token))
            if gpu:
                torch.cuda.synchronize(cache.device)
            if turn >= 0:
                samples[name].append(1e3 * (time.perf_counter() - started))
            cache.rollback(1)
    return {name: statistics.median(times) for name, times in samples.items()}
