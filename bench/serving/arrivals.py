"""``python -m bench serving``: requests arrive at random in the real vLLM, with whole and with compressed caches.

Every engine has the same pool of pages and the same requests: vLLM's own CPU backend, then kvops at every ratio. Each
engine has a process of its own. There are two workloads:

- ``arrivals``: requests of a Poisson process. Some ask the questions of ``examples/questions.jsonl`` about their text,
  the others continue a part of the manual.
- ``burst``: eight prompts of 520 to 555 tokens at once, 64 new tokens each.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench import results
from bench.serving.answers import question_file, questions_of
from bench.serving.engine import Watch, page_bytes, start
from bench.serving.pages import OWN
from bench.timing import setting
from kvops.extras import require
from kvops.models.loading import load
from kvops.models.tokenizer import Tokenizer

PAGE, STEP, MOST_AT_ONCE, LONGEST = 32, 256, 16, 1024
_DOCS = Path(__file__).parent.parent.parent / "docs"


@dataclass(frozen=True)
class Request:
    """When a request arrives (seconds), its prompt, how many tokens it wants, and its answer if it is a question."""

    arrives: float
    prompt: list[int]
    new: int
    answer: list[int] | None = None


def arrivals(tokenizer: Tokenizer, number: int, gap: float, seed: int = 0) -> list[Request]:
    """``number`` requests of a Poisson process with ``gap`` seconds between two, and those that ask the questions."""
    draw, text = random.Random(seed), _text(tokenizer)
    asked = [(question.prompt, question.answer) for question in questions_of(question_file(tokenizer))]
    asked += [(_part(draw, text, draw.randrange(300, 901)), None) for _ in range(number - len(asked))]
    draw.shuffle(asked)
    when, found = 0.0, []
    for prompt, answer in asked[:number]:
        when += draw.expovariate(1 / gap)
        found.append(Request(when, prompt, draw.randrange(24, 65), answer))
    return found


def burst(tokenizer: Tokenizer) -> list[Request]:
    draw, text = random.Random(0), _text(tokenizer)
    return [Request(0.0, _part(draw, text, 520 + 5 * number), 64) for number in range(8)]


def _text(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("".join((_DOCS / name).read_text() for name in ("concepts.md", "compression.md")))


def _part(draw: random.Random, text: list[int], length: int) -> list[int]:
    begin = draw.randrange(len(text) - length)
    return text[begin : begin + length]


def serve(engine: Any, requests: Sequence[Request]) -> dict[str, Any]:
    """Run requests; the figures of a row."""
    waiting, first, got = list(enumerate(requests)), {}, {}
    with Watch(engine) as watch:
        begin = time.perf_counter()
        while waiting or engine.has_unfinished_requests():
            while waiting and waiting[0][1].arrives <= time.perf_counter() - begin:
                _add(engine, *waiting.pop(0))
            if not engine.has_unfinished_requests():
                time.sleep(0.005)
                continue
            for out in engine.step():
                number = int(out.request_id)
                first.setdefault(number, time.perf_counter() - begin - requests[number].arrives)
                if out.finished:
                    got[number] = list(out.outputs[0].token_ids)
        seconds = time.perf_counter() - begin
    asked = {number: request.answer for number, request in enumerate(requests) if request.answer is not None}
    return {
        "seconds": seconds,
        "steps": len(watch.running),
        "tokens_per_second": sum(map(len, got.values())) / seconds,
        "first_token_seconds": mean(first.values()),
        "most_at_once": max(watch.running),
        "mean_at_once": mean(watch.running),
        "preemptions": watch.preemptions,
        "right": [number for number, answer in asked.items() if got[number][: len(answer)] == answer],
        "questions": len(asked),
        "running": watch.running,
    }


def _add(engine: Any, number: int, request: Request) -> None:
    sampling = require("vllm").SamplingParams(temperature=0, max_tokens=request.new, ignore_eos=True, detokenize=False)
    engine.add_request(str(number), {"prompt_token_ids": request.prompt}, sampling)


def one(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """An engine in this process: a row of each workload."""
    ours = settings["kvops"]
    config = require("transformers").AutoConfig.from_pretrained(settings["model"])
    llm = start(
        settings["model"],
        ours,
        block_size=PAGE,
        max_model_len=LONGEST,
        max_num_seqs=MOST_AT_ONCE,
        max_num_batched_tokens=STEP,
        kv_cache_memory_bytes=(settings["pages"] + 1) * page_bytes(config, PAGE),
    )
    workloads = {name: [Request(**each) for each in given] for name, given in settings["workloads"].items()}
    serve(llm.llm_engine, [Request(0.0, next(iter(workloads.values()))[0].prompt[:STEP], 4)])  # to compile and warm up
    name = OWN if ours is None else f"{ours['ratio']:g}x"
    return [{"engine": name, "workload": what} | serve(llm.llm_engine, given) for what, given in workloads.items()]


def run(
    folder: Path, ratios: Sequence[float], *, number: int, pages: int, gap: float, policy: str, json_path: Path | None
) -> int:
    """Every engine, each in a process of its own; rows are written as they come."""
    loaded = load(progress=False)
    requests = {"arrivals": arrivals(loaded.tokenizer, number, gap), "burst": burst(loaded.tokenizer)}
    workloads = {what: [asdict(each) for each in given] for what, given in requests.items()}
    facts = setting(torch.device("cpu")) | {
        "vllm": require("vllm").__version__,
        "model": loaded.name,
        "requests": number,
        "seconds between requests": gap,
        "pages": pages,
        "tokens of a page": PAGE,
        "policy": policy,
        "load before": round(os.getloadavg()[0], 1),
    }
    rows: list[dict[str, Any]] = []
    for ours in (None, {"ratio": 1}, *({"ratio": ratio, "policy": policy} for ratio in ratios)):
        rows += _in_a_process({"model": str(folder), "pages": pages, "workloads": workloads, "kvops": ours})
        for row in rows[-len(workloads) :]:
            print({name: value for name, value in row.items() if name != "running"}, flush=True)
        if json_path:
            results.save(json_path, "serving", facts, rows)
    return 0


def _in_a_process(settings: dict[str, Any]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder, "settings.json"), Path(folder, "rows.json")
        given.write_text(json.dumps(settings))
        subprocess.run([sys.executable, "-m", "bench.serving.arrivals", str(given), str(result)], check=True)
        return json.loads(result.read_text())  # type: ignore[no-any-return]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(one(json.loads(Path(sys.argv[1]).read_text()))))
