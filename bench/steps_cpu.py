"""A decoding step of the real model by context and batch, from the full cache and from one of an eighth of the tokens.

    python -m bench.steps_cpu --json bench/results/cpu/steps.json

A step is the model, the cache and attention for one new token of each sequence, with the choice of the likeliest token.
Keys and values are random and all lists have the same length: what a step costs does not depend on either.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import results, table
from bench.timing import setting
from kvops.cli.console import positive, quiet_without_reader
from kvops.generation.passes import decode, new_cache
from kvops.models.llama import Llama
from kvops.models.loading import find_default_model, load

CONTEXTS = (37, 1000, 2860, 8000)
BATCHES = (1, 8)
RATIO = 8


@torch.no_grad()
def step_seconds(model: Llama, batch: int, context: int, steps: int) -> list[float]:
    """The seconds of ``steps`` decoding steps behind ``context`` tokens, after two to warm up."""
    config = model.config
    cache = new_cache(model, max_batch=batch, max_tokens=context + steps + 2)
    positions = cache.extend(context)
    keys = torch.randn(batch, context, config.num_kv_heads, config.head_dim)
    for layer in range(config.num_layers):
        cache.append(layer, keys, keys, positions)
    tokens, seconds = torch.ones(batch, 1, dtype=torch.int64), []
    for _ in range(steps + 2):
        started = time.perf_counter()
        tokens = model.logits(decode(model, cache, tokens)).argmax(-1)
        seconds.append(time.perf_counter() - started)
    return seconds[2:]


def measure(model: Llama, steps: int) -> list[dict[str, Any]]:
    """A row for each batch, context and cache: medians."""
    rows = []
    for batch in BATCHES:
        for context in tqdm(CONTEXTS, desc=f"batch {batch}", disable=None):
            full, small = (
                statistics.median(step_seconds(model, batch, max(1, context // ratio), steps)) for ratio in (1, RATIO)
            )
            for name, seconds in (("full", full), (f"{RATIO}x", small)):
                rows.append(
                    {
                        "batch": batch,
                        "context": context,
                        "cache": name,
                        "step_ms": 1e3 * seconds,
                        "tokens_per_second": batch / seconds,
                        "times_as_fast_as_full": full / seconds,
                    }
                )
    return rows


@quiet_without_reader
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=15)
    parser.add_argument("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    loaded = load(find_default_model())
    rows = measure(Llama(loaded.config, loaded.weights), arguments.steps)
    facts = setting(torch.device("cpu")) | {"model": loaded.name, "dtype": "float32", "steps": arguments.steps}
    if arguments.json:
        results.save(arguments.json, "steps", facts, rows)
    print(
        table.render(
            [[*map(str, list(row.values())[:3]), *(f"{x:.2f}" for x in list(row.values())[3:])] for row in rows],
            [name.replace("_", " ") for name in rows[0]],
            "simple",
            left=0,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
