"""Serving simulated: ``python -m bench.throughput --json PATH``.

As many requests as fit, 6000 tokens in and 500 out each (the setting of KV-Compress, Rehg 2024), on the reference model
with random weights in Llama-3.1-8B's shape, its cache compressed 1x, 8x and 64x, without and with drafts. A smaller
device gets a smaller shape.

What is measured, and what is computed from it:

- the prefill of one request, scored by SnapKV, with the eviction down to its share of the cache;
- a step of decoding (model, cache, attention, verification; with drafts also the lookup and the rollback) of the whole
  batch half way through its answers: every row holds the prompt and half of the new tokens, compressed. Keys and values
  are random, scores differ from head to head, so that lists end at different lengths as in a real eviction. On a GPU
  the step is a CUDA graph;
- the eviction of one row, which every row needs after each ``every`` new tokens, to the same ratio;
- tokens/s = batch x new tokens / (batch x prefill + steps x step + evictions): every request of the batch is prefilled,
  one after another, and then all decode together. ``decoding`` leaves the prefill out.

With random weights no draft would be accepted. Acceptance is simulated: each draft is accepted with the probability
``--accept``, in order, up to the first refusal. All other parts of a step with drafts run, including the verification.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.gpu.units import FAILED, PASSED, report
from bench.measure import reason
from bench.table import render
from bench.timing import captured, setting
from kvops.cache import PagedKVCache
from kvops.cli.console import positive, quiet_without_reader
from kvops.cli.environment import chosen_device
from kvops.generation.passes import decode, prefill
from kvops.models.config import LlamaConfig
from kvops.models.llama import Llama
from kvops.ops.verify import prompt_lookup, verify_draft
from kvops.policies import Compression

PUBLISHED = {8: 3.44, 64: 5.18}
"""KV-Compress' throughput over vLLM's, with Llama-3.1-8B and 256 prompts."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The workload: a model, and the tokens in and out of each request."""

    model: LlamaConfig
    dtype: torch.dtype
    tokens_in: int
    tokens_out: int
    every: int
    """New tokens after which a row is compressed again."""
    max_batch: int
    steps: int
    """Steps of decoding that are timed."""
    needs: int
    """Bytes of device memory below which the next smaller shape is taken."""


_LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    max_positions=8192,
)
SHAPES = {
    "llama-8b": Shape(_LLAMA_8B, torch.bfloat16, 6000, 500, 100, 1024, 50, needs=36 << 30),
    "llama-8b-8-layers": Shape(
        dataclasses.replace(_LLAMA_8B, num_layers=8), torch.bfloat16, 6000, 500, 100, 512, 50, needs=12 << 30
    ),
    "small": Shape(
        LlamaConfig(4096, 256, 768, 4, 8, 2, 64, max_positions=2048), torch.float32, 750, 62, 16, 32, 20, needs=0
    ),
    "tiny": Shape(LlamaConfig(97, 32, 48, 2, 4, 2, 8, max_positions=256), torch.float32, 96, 8, 4, 3, 2, needs=0),
}
# The most memory of a pool on the CPU, where time is the limit.
_CPU_BYTES = {"small": 24 << 20, "tiny": 128 << 10}


def shape_for(device: torch.device) -> str:
    if device.type == "cpu":
        return "small"
    memory = torch.cuda.get_device_properties(device).total_memory
    return next(name for name, shape in SHAPES.items() if memory >= shape.needs)


def random_model(shape: Shape, device: torch.device) -> Llama:
    """Weights of a size that keeps activations finite through all layers."""
    weights = {
        name: torch.ones(size, dtype=shape.dtype, device=device)
        if len(size) == 1
        else torch.randn(size, dtype=shape.dtype, device=device) * size[-1] ** -0.5
        for name, size in shape.model.weight_shapes().items()
    }
    return Llama(shape.model, weights)


class Stopwatch:
    """Measures seconds of calls on a device, including the device's work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], Any]) -> float:
        self.wait()
        started = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclasses.dataclass
class Server:
    """One model, one compression; caches are made for each batch."""

    name: str
    shape: Shape
    model: Llama
    device: torch.device
    compression: int
    num_draft: int
    accept: float

    @property
    def blocks_per_request(self) -> int:
        """The most blocks of a request: compressed, plus the tokens between two evictions and the drafts."""
        config, shape = self.model.config, self.shape
        lists, size = config.num_layers * config.num_kv_heads, 16
        total = shape.tokens_in + shape.tokens_out
        if self.compression == 1:
            return lists * -(-(total + self.num_draft) // size)
        kept = max(lists * -(-total // size) // self.compression, lists * 3)  # Compression's protected tokens
        return kept + lists * (1 + -(-(shape.every + self.num_draft) // size))

    def capacity(self) -> tuple[int, int]:
        """(blocks of the pool, the largest batch that fits in it)."""
        config, shape = self.model.config, self.shape
        itemsize = shape.dtype.itemsize
        block_bytes = 16 * (2 * config.head_dim * itemsize + 8)
        # A table entry for each block that a list could have before it is compressed.
        row_bytes = config.num_layers * config.num_kv_heads * -(-self.max_tokens // 16) * 4
        # The prefill's feed-forward activations, twice, and room for the allocator and for graphs.
        work = 4 * shape.tokens_in * config.intermediate_size * itemsize + (2 << 30)
        logits = (self.num_draft + 1) * config.vocab_size * (itemsize + 4)  # of one row, twice over in part
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0] - work
        else:
            free, logits, row_bytes = _CPU_BYTES[self.name], 0, 0
        prompt = config.num_layers * config.num_kv_heads * -(-shape.tokens_in // 16)  # one request before eviction
        batch = int((free - prompt * block_bytes) // (self.blocks_per_request * block_bytes + row_bytes + logits))
        batch = max(1, min(batch, shape.max_batch))
        return batch * self.blocks_per_request + prompt, batch

    @property
    def max_tokens(self) -> int:
        return self.shape.tokens_in + self.shape.tokens_out + self.shape.steps * (self.num_draft + 1)

    def cache(self, blocks: int, batch: int) -> PagedKVCache:
        config = self.model.config
        return PagedKVCache(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_blocks=blocks,
            max_batch=batch,
            max_tokens=self.max_tokens,
            dtype=self.shape.dtype,
            device=self.device,
        )

    def compress(self, cache: PagedKVCache, row: int, tokens: int) -> None:
        if self.compression > 1:
            Compression(ratio=self.compression).apply(cache, [tokens], rows=slice(row, row + 1))

    def prefill_seconds(self, cache: PagedKVCache, watch: Stopwatch, rounds: int = 3) -> float:
        """One request, compressed at its end; the least of a few runs, the first of which compiles."""
        compression = Compression(ratio=self.compression)
        policy = compression.policy if self.compression > 1 else None
        prompt = torch.randint(0, self.model.config.vocab_size, (1, self.shape.tokens_in), device=self.device)
        first = slice(0, 1)

        def run() -> None:
            hidden = prefill(self.model, cache, prompt, 0, policy)
            self.model.logits(hidden[:, -1:])
            self.compress(cache, 0, self.shape.tokens_in)

        seconds = []
        for _ in range(rounds):
            seconds.append(watch(run))
            cache.free(first)
        return min(seconds)

    def fill(self, cache: PagedKVCache, batch: int, watch: Stopwatch) -> float:
        """Fill rows with half of their answers. Returns the seconds of the eviction of one row."""
        config, tokens = self.model.config, self.shape.tokens_in + self.shape.tokens_out // 2
        keys, values = torch.randn(2, 1, tokens, config.num_kv_heads, config.head_dim, device=self.device).to(
            self.shape.dtype
        )
        scores = torch.rand(1, config.num_kv_heads, tokens, device=self.device)
        taken = []
        for row in range(batch):
            rows = slice(row, row + 1)
            positions = cache.extend(tokens, rows=rows)
            for layer in range(config.num_layers):
                cache.append(layer, keys, values, positions, rows=rows)
                if self.compression > 1:
                    # Heads have different lengths: from a quarter to four times the mean.
                    weight = torch.rand(config.num_kv_heads, 1, device=self.device).mul_(4).sub_(2).exp2_()
                    cache.set_scores(layer, scores * weight, rows=rows)
            if self.compression == 1:
                continue
            if row < 4:
                taken.append(watch(lambda row=row: self.compress(cache, row, tokens)))  # type: ignore[misc]
            else:
                self.compress(cache, row, tokens)
        watch.wait()
        return min(taken, default=0.0)

    def step(self, cache: PagedKVCache, batch: int, drafts_on: bool) -> Callable[[], None]:
        """A step of decoding, without synchronisation."""
        device, vocab = self.device, self.model.config.vocab_size
        tokens = torch.randint(0, vocab, (batch, 1), device=device)
        none = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        if not drafts_on:

            def plain() -> None:
                hidden = decode(self.model, cache, tokens)
                tokens.copy_(verify_draft(self.model.logits(hidden), none)[0])

            return plain
        history = torch.randint(0, vocab, (batch, self.max_tokens), device=device)
        lens = torch.full((batch,), self.shape.tokens_in, dtype=torch.int32, device=device)

        def drafted() -> None:
            # Run for its time: random text hardly ever gives a draft.
            lookup, _ = prompt_lookup(history, lens, num_draft=self.num_draft)
            drafts = torch.where(lookup < 0, history[:, : self.num_draft], lookup)
            hidden = decode(self.model, cache, torch.cat((tokens, drafts), 1))
            emitted, _ = verify_draft(self.model.logits(hidden), drafts)
            agreed = (torch.rand(batch, self.num_draft, device=device) < self.accept).cumprod(1).sum(1)
            cache.rollback((self.num_draft - agreed).to(torch.int32))
            tokens.copy_(emitted[:, :1])

        return drafted

    @torch.no_grad()
    def measure(self, batch: int | None, watch: Stopwatch) -> list[dict[str, Any]]:
        """Rows without and with drafts; ``batch`` None is the largest that fits."""
        blocks, largest = self.capacity()
        rows_of_batch = largest if batch is None else min(batch, largest)
        cache = self.cache(blocks, rows_of_batch)
        prefill_seconds = self.prefill_seconds(cache, watch)
        evict_seconds = self.fill(cache, rows_of_batch, watch)
        held = cache.stats()
        found = []
        for drafts_on in (False, True):
            run = self.step(cache, rows_of_batch, drafts_on)
            if self.device.type == "cuda":
                run = captured(run, self.device)
            run()
            steps = self.shape.steps // 2  # without and with drafts, the lists grow by half each
            step_seconds = statistics.median(watch(run) for _ in range(steps))
            found.append(
                self.row(rows_of_batch, batch is None, drafts_on, prefill_seconds, step_seconds, evict_seconds)
                | {"slots": held.slots_in_use, "bytes": held.bytes_in_use, "bytes_reserved": held.bytes_reserved}
            )
        return found

    def row(
        self, batch: int, largest: bool, drafts_on: bool, prefill_seconds: float, step_seconds: float, evicting: float
    ) -> dict[str, Any]:
        shape = self.shape
        per_step = expected_tokens(self.accept, self.num_draft) if drafts_on else 1.0
        evictions = 0 if self.compression == 1 else shape.tokens_out // shape.every
        decoding = shape.tokens_out / per_step * step_seconds + evictions * batch * evicting
        total = batch * prefill_seconds + decoding
        return {
            "shape": self.name,
            "compression": self.compression,
            "drafts": drafts_on,
            "batch": batch,
            "largest_batch": largest,
            "accept": self.accept if drafts_on else None,
            "num_draft": self.num_draft if drafts_on else 0,
            "tokens_in": shape.tokens_in,
            "tokens_out": shape.tokens_out,
            "prefill_seconds": prefill_seconds,
            "step_seconds": step_seconds,
            "evict_seconds": evicting,
            "tokens_per_second": batch * shape.tokens_out / total,
            "decode_tokens_per_second": batch * shape.tokens_out / decoding,
        }


def expected_tokens(accept: float, num_draft: int) -> float:
    """The mean number of tokens of a step if each draft is accepted with this probability."""
    return sum(accept**count for count in range(num_draft + 1))


def multiples(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with ``times`` and ``decode_times``: over the row at 1x without drafts, of the same kind of batch."""
    base = {row["largest_batch"]: row for row in rows if row["compression"] == 1 and not row["drafts"]}
    found = []
    for row in rows:
        one = base.get(row["largest_batch"])
        times = {
            name: row[value] / one[value] if one else None
            for name, value in (("times", "tokens_per_second"), ("decode_times", "decode_tokens_per_second"))
        }
        found.append({**row, **times})
    return found


def table(rows: Sequence[Mapping[str, Any]], style: str = "simple") -> str:
    cells = []
    for row in multiples(rows):
        published = PUBLISHED.get(row["compression"]) if row["largest_batch"] and not row["drafts"] else None
        cells.append(
            [
                f"{row['compression']}x",
                f"{row['num_draft']}, accepted {row['accept']:.0%}" if row["drafts"] else "off",
                "largest" if row["largest_batch"] else "equal",
                str(row["batch"]),
                f"{row['bytes'] / 2**30:.2f}",
                f"{1e3 * row['prefill_seconds']:.1f}",
                f"{1e3 * row['step_seconds']:.2f}",
                f"{row['decode_tokens_per_second']:.0f}",
                f"{row['tokens_per_second']:.0f}",
                *("" if row[name] is None else f"{row[name]:.2f}" for name in ("decode_times", "times")),
                "" if published is None else f"{published:.2f}",
            ]
        )
    headers = ["cache", "drafts", "batch", "requests", "GiB", "prefill ms", "step ms", "decoding tok/s", "tok/s"]
    return render(cells, [*headers, "x, decoding", "x", "published x"], style, left=3)


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--shape", choices=["auto", *SHAPES], default="auto", help="default: by the device's memory")
    parser.add_argument("--compression", type=positive, nargs="+", default=[1, 8, 64])
    parser.add_argument("--equal-batch", type=positive, help="default: what fits at 1x")
    parser.add_argument("--num-draft", type=int, default=3)
    parser.add_argument("--accept", type=float, default=0.5, help="probability of a draft, simulated (%(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=Path, help="of the GPU run: a line for each row")
    return parser.parse_args(words)


@quiet_without_reader
def main() -> int:
    arguments = arguments_of()
    try:
        device = chosen_device(arguments.device)
    except ValueError as error:
        print(f"python -m bench.throughput: {error}", file=sys.stderr)
        return 2
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    name = shape_for(device) if arguments.shape == "auto" else arguments.shape
    torch.manual_seed(0)
    with torch.no_grad():
        model = random_model(SHAPES[name], device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what laying the weights together left counts as free again
    servers = [
        Server(name, SHAPES[name], model, device, ratio, arguments.num_draft, arguments.accept)
        for ratio in arguments.compression
    ]
    equal = arguments.equal_batch or dataclasses.replace(servers[0], compression=1).capacity()[1]
    facts = setting(device) | {"shape": name, "accept": arguments.accept, "published": str(PUBLISHED)}
    rows: list[dict[str, Any]] = []
    for server, batch in itertools.product(servers, (equal, None)):
        same = equal >= server.capacity()[1]  # the largest batch is the equal one: measured once
        if batch is not None and same:
            continue
        label = f"{name}, {server.compression}x, {'equal' if batch else 'largest'} batch"
        failure = ""
        try:
            found = server.measure(batch, Stopwatch(device))
        except Exception as error:  # a failure, for instance of memory, does not stop the others
            if arguments.rows is None:
                raise
            traceback.print_exc()
            failure, found = reason(error), []
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if same:
            found = [row | {"largest_batch": largest} for largest in (False, True) for row in found]
        rows += found
        if arguments.rows:
            report(arguments.rows, label, FAILED if failure else PASSED, failure)
        if arguments.json:
            results.save(arguments.json, "throughput", facts, rows)
    print(table(rows))
    print(
        f"{facts['runs']}; {SHAPES[name].tokens_in} tokens in, {SHAPES[name].tokens_out} out, random weights; "
        f"each draft accepted with probability {arguments.accept} (simulated). Published multiples: KV-Compress."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
