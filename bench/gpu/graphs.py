"""Captures CUDA graphs of every operator and of a whole decoding step with drafts.

``operators``: each benchmark case runs with CUDA's check for synchronisation switched on, is captured, and is replayed
with other data in its inputs: the outputs must have the bits of a launch.

``step``: prompt lookup, extending and appending, attention with scores, verification and rollback of a small model,
captured once and replayed while lengths change, rows end (length 0), are evicted from and start again, beside the same
steps launched one by one. Tokens, lengths, scores and caches must have the same bits after every step.

Without a GPU the replay is another call.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case import SCALES, Case, Inputs
from bench.cases import all_cases, select
from bench.gpu.cases import copies, same_bits
from bench.gpu.units import FAILED, PASSED, report
from bench.measure import build, reason
from bench.timing import captured
from kvops.cache import PagedKVCache
from kvops.generation.passes import decode, prefill
from kvops.models.config import LlamaConfig
from kvops.models.llama import Llama
from kvops.ops.verify import prompt_lookup, verify_draft

NUM_DRAFT = 3
FOLLOWS_DATA = "its inputs' numbers follow the data: no replay with other data"


@contextlib.contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """On a GPU: operations that synchronise raise."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The replay of ``run``, which has run once by then."""
    if device.type == "cuda":
        return captured(run, device)
    run()
    return run


def check_operator(case: Case, device: torch.device, dtype: torch.dtype) -> str:
    """The error message; empty if the check passes."""
    inputs, others = (build(case, device, dtype, seed) for seed in (0, 1))

    def reset() -> None:
        if case.reset is not None:
            case.reset(inputs)

    reset()
    case.run(inputs)  # compiles
    reset()
    with no_synchronisation(device):
        case.run(inputs)
    reset()
    replay = capture(lambda: case.run(inputs), device)
    if not _take_data(inputs, others):
        return FOLLOWS_DATA
    reset()
    replayed = copies(replay())
    reset()
    launched = copies(case.run(inputs))
    wrong = [place for place, pair in enumerate(zip(replayed, launched, strict=True)) if not same_bits(*pair)]
    return f"replayed outputs {wrong} differ from those launched" if wrong else ""


def _take_data(inputs: Inputs, others: Inputs) -> bool:
    """Copy the tensors of ``others`` into those of ``inputs``. Returns False if other values differ."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            if value.shape != others[name].shape:
                return False
            value.copy_(others[name])
        elif isinstance(value, (int, float, str)) and value != others[name]:
            return False
    return True


def small_model(device: torch.device, dtype: torch.dtype) -> Llama:
    config = LlamaConfig(
        vocab_size=331,
        hidden_size=96,
        intermediate_size=160,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        max_positions=512,
        tie_embeddings=True,
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).mul_(0.2).to(dtype).to(device)
        for name, shape in config.weight_shapes().items()
    }
    return Llama(config, weights)


@dataclass
class World:
    """Sequences in the middle of decoding; :meth:`step` touches nothing but these tensors."""

    model: Llama
    cache: PagedKVCache
    history: Tensor
    lens: Tensor
    running: Tensor

    @classmethod
    def start(cls, model: Llama, prompts: list[list[int]], device: torch.device) -> World:
        """Rows with an empty prompt are padding."""
        batch, dtype = len(prompts), model.embedding.weight.dtype
        cache = PagedKVCache(
            num_layers=2, num_kv_heads=2, head_dim=32, num_blocks=512, max_batch=batch, max_tokens=512, block_size=16,
            dtype=dtype, device=device,
        )  # fmt: skip
        cache.k_cache.zero_(), cache.v_cache.zero_()
        history = torch.zeros(batch, 512, dtype=torch.int64, device=device)
        lens = torch.tensor([max(1, len(prompt)) for prompt in prompts], dtype=torch.int32, device=device)
        running = torch.tensor([bool(prompt) for prompt in prompts], dtype=torch.int32, device=device)
        for row, prompt in enumerate(prompts):
            tokens = torch.tensor([prompt], dtype=torch.int64, device=device)
            history[row, : len(prompt)] = tokens[0]
            if len(prompt) > 1:  # the last one is what the first step feeds
                prefill(model, cache, tokens[:, :-1], row)
        return cls(model, cache, history, lens, running)

    def step(self) -> tuple[Tensor, Tensor]:
        """The emitted tokens and the number of accepted drafts; rows that do not run get none."""
        drafts, draft_lens = prompt_lookup(self.history, self.lens, num_draft=NUM_DRAFT, min_ngram=1)
        draft_lens = draft_lens * self.running
        feed = torch.cat((self.history.gather(1, self.lens[:, None].long() - 1), drafts.clamp_min(0)), dim=1)
        hidden = decode(self.model, self.cache, feed, q_lens=self.running + draft_lens, accumulate="sum")
        logits = self.model.logits(hidden)
        tokens, accepted = verify_draft(logits, drafts, draft_lens=draft_lens, step=self.lens.long())
        self.cache.rollback((draft_lens - accepted) * self.running)
        columns = self.lens[:, None].long() + torch.arange(tokens.shape[1], device=self.lens.device)
        new = torch.where(self.running[:, None] > 0, tokens, self.history.gather(1, columns))
        self.history.scatter_(1, columns, new)
        self.lens += (accepted + 1) * self.running
        return tokens, accepted

    def state(self) -> dict[str, Tensor]:
        cache = self.cache
        tensors = {"history": self.history, "lens": self.lens, "lengths": cache.seq_lens, "tables": cache.block_tables}
        return tensors | {"keys": cache.k_cache, "values": cache.v_cache, "scores": cache.scores}

    def between(self, number: int) -> None:
        """What the host does before some steps: end a row, evict, start a row again."""
        if number == 3:
            self.running[0] = 0
        elif number == 4:
            self.cache.evict(12, rows=slice(2, 3), protect_first=2, protect_last=8)
            self.cache.free(slice(0, 1))
        elif number == 6:
            self.running[0] = 1  # from its last token alone: the first of an empty row
            self.lens[0] = 1


def check_step(device: torch.device, dtype: torch.dtype, steps: int) -> str:
    """The error message; empty if the check passes."""
    model = small_model(device, dtype)
    words = list(range(5, 40))
    prompts = [words[:9] * 3, [7], words * 4 + words[:3], []]
    with torch.no_grad():
        launched, replayed = (World.start(model, prompts, device) for _ in range(2))
        launched.step()
        replay = capture(replayed.step, device)
        accepted = 0
        for number in range(1, steps):
            launched.between(number)
            replayed.between(number)
            with no_synchronisation(device):
                expected = launched.step()
            result = replay()
            accepted += int(expected[1].sum())
            pairs = {"tokens": (expected[0], result[0]), "accepted": (expected[1], result[1])}
            pairs |= {name: (tensor, replayed.state()[name]) for name, tensor in launched.state().items()}
            wrong = [name for name, pair in pairs.items() if not same_bits(*pair)]
            if wrong:
                return f"step {number}: {', '.join(wrong)} differ"
    if int(launched.cache.seq_lens[:, 3].sum()):
        return "the padding row grew"
    return "" if accepted else "no draft was ever accepted: the test tests nothing"


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.graphs", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["operators", "step"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--ops", nargs="+", help="of operators (default: all)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=Path, required=True)
    return parser.parse_args(words)


def main() -> None:
    arguments = arguments_of()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    checks: list[tuple[str, Callable[[torch.dtype], str]]]
    if arguments.part == "step":
        checks = [("a step of decoding with drafts", lambda dtype: check_step(device, dtype, arguments.steps))]
    else:
        checks = [
            (case.name, lambda dtype, case=case: check_operator(case, device, dtype))  # type: ignore[misc]
            for case in select(all_cases(SCALES[arguments.scale]), arguments.ops)
        ]
    for (name, check), dtype_name in itertools.product(checks, arguments.dtypes):
        print(f"{name} {dtype_name}", flush=True)
        try:
            complaint = check(getattr(torch, dtype_name))
        except Exception as error:  # an error becomes a row
            traceback.print_exc()
            complaint = reason(error)
        if complaint:
            print(f"  failed: {complaint}", flush=True)
        report(arguments.rows, f"{name} {dtype_name}", FAILED if complaint else PASSED, complaint)
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises always after an illegal access


if __name__ == "__main__":
    main()
