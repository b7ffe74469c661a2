"""``python -m bench soak``: random requests in the real vLLM must lose no page and no token.

Each round is an engine with drawn settings (ratio, policy, pool, sizes of pages and steps, scheduling). It serves drawn
requests: lengths from 1 to 2,000 tokens, several samples, priorities, aborts. A small model of random weights is used.
After every step each page is either free or held by one request. Every attention is compared with dense attention in
float32 over the kept tokens. At the end every request has its tokens and every page is free. A round that fails raises
AssertionError.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.serving.engine import Watch, page_bytes, scheduling_ahead, start
from bench.serving.small import small
from bench.timing import setting
from kvops.extras import require
from kvops.integrations.vllm.rule import Rule

LONGEST = 2000
MOST_ERROR = 2e-4
"""The largest difference from dense attention in float32 that is rounding, for values of this model's size."""
_POLICIES = ("standout", "kv-compress", "snapkv", "h2o", "ada-kv", "pyramid-kv", "knorm", "defensive-kv", "keydiff")


@dataclass(frozen=True)
class Round:
    """The settings of an engine, drawn from ``seed``."""

    seed: int
    ratio: float
    policy: str
    chunk: int
    slack: int
    protect_first: int
    protect_last: int
    pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    scheduling_policy: str
    async_scheduling: bool
    drafts: int
    most_new: int
    max_model_len: int

    @classmethod
    def drawn(cls, seed: int, longest: int = LONGEST) -> Round:
        """``longest``: the most tokens of a prompt. It is less where the pool has no room for it."""
        draw = random.Random(seed)
        ratio = draw.choice([1, 1.5, 2, 4, 8, 12.5, 16])
        chunk, slack, page_size = draw.choice([1, 2, 4]), draw.choice([0, 1, 3]), draw.choice([16, 32])
        pages, batched = draw.randrange(25, 201), draw.choice([64, 128, 256, 512])
        drafts = draw.choice([0, 0, 3])
        concurrent = draw.choice([False, True]) and not drafts
        first, last = draw.choice([0, 4]), draw.choice([0, 7, 40])
        rule = Rule(ratio, slack, chunk, page_size, first, last)
        # Long answers grow until the pool is full: requests are preempted.
        most_new = draw.choice([20, 60, 300])
        room = longest + most_new
        while rule.peak(room, batched * (2 if concurrent else 1)) > pages:
            room -= 1
        return cls(
            seed=seed,
            ratio=ratio,
            policy=draw.choice(_POLICIES),
            chunk=chunk,
            slack=slack,
            protect_first=first,
            protect_last=last,
            pages=pages,
            page_size=page_size,
            max_num_seqs=draw.choice([4, 8, 16]),
            max_num_batched_tokens=batched,
            scheduling_policy=draw.choice(["fcfs", "priority"]),
            async_scheduling=concurrent,
            drafts=drafts,
            most_new=most_new,
            max_model_len=room,
        )

    def engine(self, model: Path) -> Any:
        config = require("transformers").AutoConfig.from_pretrained(model)
        options = {
            "ratio": self.ratio,
            "policy": self.policy,
            "chunk": self.chunk,
            "slack": self.slack,
            "protect_first": self.protect_first,
            "protect_last": self.protect_last,
            "check": True,
        }
        drafts = {"method": "ngram", "num_speculative_tokens": self.drafts, "prompt_lookup_max": 3}
        return start(
            model,
            options,
            block_size=self.page_size,
            kv_cache_memory_bytes=(self.pages + 1) * page_bytes(config, self.page_size),  # page 0 is vLLM's own
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            scheduling_policy=self.scheduling_policy,
            speculative_config=drafts if self.drafts else None,
        )


class Served:
    """The requests of a round, what they asked for and what they got."""

    def __init__(self, round_: Round, engine: Any, number: int) -> None:
        self.round, self.engine, self.watch = round_, engine, Watch(engine)
        self.draw = random.Random(f"requests of {round_.seed}")
        self.number = number
        self.wanted: dict[str, tuple[int, int]] = {}
        self.aborted: set[str] = set()
        self.got: dict[str, list[int]] = {}
        self.tokens = self.longest = 0

    def run(self) -> None:
        for number in range(self.number):
            self._add(str(number))
            for _ in range(self.draw.randrange(6)):
                self._step()
            if self.draw.random() < 0.1:
                aborted = str(self.draw.randrange(number + 1))
                if aborted not in self.got:
                    self.engine.abort_request([aborted])
                    self.aborted.add(aborted)
        while self.engine.has_unfinished_requests():
            self._step()
        assert self.watch.pool.get_num_free_blocks() == self.round.pages, "pages are lost"
        assert not self.watch.pages_held()
        expected = set(self.wanted) - self.aborted
        assert set(self.got) - self.aborted == expected, f"without an end: {expected - set(self.got)}"
        for name in expected:
            samples, new = self.wanted[name]
            assert self.got[name] == [new] * samples, (
                f"request {name}: expected {samples} x {new}, got {self.got[name]}"
            )

    def _add(self, name: str) -> None:
        draw, vllm = self.draw, require("vllm")
        new = draw.randrange(1, self.round.most_new + 1)
        most = self.round.max_model_len - self.round.most_new
        length = draw.choice([draw.randrange(1, 41), draw.randrange(1, most + 1), most])
        # Words that return, so that there are drafts to verify.
        words = [draw.randrange(3, 128) for _ in range(draw.choice([5, 2000]))]
        prompt = [words[place % len(words)] for place in range(length)]
        # Without a seed of its own: vLLM 0.32 fails on a CPU where a prompt with one is read in chunks.
        sampling = vllm.SamplingParams(
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            n=draw.choice([1, 1, 1, 2]),
            output_kind=vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        self.wanted[name] = sampling.n, new
        self.tokens, self.longest = self.tokens + length, max(self.longest, length)
        priority = draw.randrange(3) if self.round.scheduling_policy == "priority" else 0
        self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling, priority=priority)

    def _step(self) -> None:
        for out in self.engine.step():
            if out.finished:
                self.got[out.request_id] = [len(sample.token_ids) for sample in out.outputs]
        held = self.watch.pages_held()
        assert len(set(held)) == len(held), "a page belongs to two requests"
        assert len(held) + self.watch.pool.get_num_free_blocks() == self.round.pages, "a page is neither held nor free"


def checks_of(engine: Any) -> list[Any]:
    """What compared the attention of each group of layers, and the compressed layers, if there are any."""
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    builders = [group.get_metadata_builder(0) for groups in runner.attn_groups for group in groups]
    return [builder._check if builder._compressed is None else builder._compressed.check for builder in builders]


def run_round(round_: Round, model: Path, number: int) -> dict[str, Any]:
    """Serve ``number`` requests; the counts of the round."""
    begin = time.monotonic()
    with scheduling_ahead() if round_.async_scheduling else nullcontext():
        llm = round_.engine(model)
    served = Served(round_, llm.llm_engine, number)
    with served.watch:
        served.run()
    compared = checks_of(llm.llm_engine)
    assert all(check is not None and check.count for check in compared)
    worst = max(check.worst for check in compared)
    assert worst < MOST_ERROR, f"attention differs by {worst}"
    (manager,) = served.watch.managers
    return asdict(round_) | {
        "requests": number,
        "prompt_tokens": served.tokens,
        "longest": served.longest,
        "aborted": len(served.aborted),
        "preemptions": served.watch.preemptions,
        "steps": len(served.watch.running),
        "pages_freed_early": getattr(manager, "num_freed", 0),
        "checks": sum(check.count for check in compared),
        "worst_difference": worst,
        "seconds": round(time.monotonic() - begin, 1),
    }


def run(json_path: Path | None, *, requests: int, per_round: int, seconds: float) -> int:
    """Rounds of seeds 0, 1, ... until there were ``requests`` requests; goes on with those in ``json_path``."""
    rows = list(results.load(json_path)["rows"]) if json_path and json_path.exists() else []
    facts = setting(torch.device("cpu")) | {"vllm": require("vllm").__version__}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        model = small(Path(folder))
        for seed in range(-(-requests // per_round)):
            if any(row["seed"] == seed for row in rows):
                continue
            if time.monotonic() > end:
                break
            rows.append(run_round(Round.drawn(seed), model, per_round))
            gc.collect()
            print(rows[-1], flush=True)
            if json_path:
                results.save(json_path, "soak", facts, rows)
    print(f"{sum(row['requests'] for row in rows)} of {requests} requests")
    return 0
