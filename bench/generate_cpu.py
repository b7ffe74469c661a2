"""Generation with kvops and with transformers: the same weights, threads and prompts, interleaved in one run.

    python bench/generate_cpu.py --json bench/results/cpu/generate.json

Three tasks: a question about a document (new text), a passage to correct and repeat (prompt lookup helps), and a
continuation of random words at temperature 1 (prompt lookup finds nothing, and must cost almost nothing). All
contenders must emit the same greedy tokens; otherwise the run fails. Times are medians over the rounds, with the first
token separate. Ratios carry over to other machines; times do not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tabulate import tabulate
from tqdm import tqdm

import kvops
from kvops.cli.console import positive, quiet_without_reader
from kvops.cli.environment import processor
from kvops.generation.generate import stream
from kvops.models.llama import Llama
from kvops.models.loading import LoadedModel, find_default_model, load

PASSAGE = " ".join(topics["with"][20:800].split())
DOCUMENT = topics["with"] + topics["try"]
WORDS = sorted({word for topic in topics.values() for word in topic.split() if word.isalpha()})
TASKS = {
    "question": f"{DOCUMENT}\n\nWhat is the try statement good for? Explain it in your own words.",
    "quoting": f"Correct the spelling of the following text and give the whole text back:\n\n{PASSAGE}",
    "random": " ".join(random.Random(0).choices(WORDS, k=300)),
}
SAMPLED = ("random",)

Timed = tuple[list[int], float, float]
"""New tokens, seconds until the first of them, seconds for the others."""


class _Clock(transformers.generation.streamers.BaseStreamer):
    """Records when the generate of transformers emits each piece; the first piece is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


Run = Callable[[list[int], int, bool], Timed]
"""Prompt, number of new tokens, and whether they are drawn at temperature 1."""


def with_transformers(model: transformers.PreTrainedModel, **options: object) -> Run:
    def run(prompt: list[int], new_tokens: int, sampled: bool) -> Timed:
        clock = _Clock()
        ids = torch.tensor([prompt])
        started = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=sampled,
            top_k=0 if sampled else None,
            streamer=clock,
            **options,
        )
        ended = time.perf_counter()
        return out[0, len(prompt) :].tolist(), clock.times[1] - started, ended - clock.times[1]

    return run


def with_kvops(model: Llama, **options: object) -> Run:
    def run(prompt: list[int], new_tokens: int, sampled: bool) -> Timed:
        tokens: list[int] = []
        started = time.perf_counter()
        first = started
        for (new,) in stream(model, [prompt], max_new_tokens=new_tokens, temperature=float(sampled), **options):
            if not tokens:
                first = time.perf_counter()
            tokens += new
        return tokens, first - started, time.perf_counter() - first

    return run


def contenders_of(loaded: LoadedModel, path: Path) -> dict[str, Run]:
    """Both libraries with and without prompt lookup, on the same weights."""
    ours = Llama(loaded.config, loaded.weights)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return {
        "transformers": with_transformers(theirs),
        "transformers, prompt lookup": with_transformers(theirs, prompt_lookup_num_tokens=7, max_matching_ngram_size=4),
        "kvops": with_kvops(ours),
        "kvops, prompt lookup": with_kvops(ours, draft="prompt_lookup"),
    }


def measure(
    contenders: dict[str, Run], task: str, prompt: list[int], new_tokens: int, rounds: int
) -> dict[str, list[Timed]]:
    """Run all contenders in turn, ``rounds`` times after one to warm up. Exits where greedy tokens differ."""
    times: dict[str, list[Timed]] = {name: [] for name in contenders}
    for turn in tqdm(range(rounds + 1), desc=task, unit="round", disable=None):
        for name, run in contenders.items():
            timed = run(prompt, new_tokens, task in SAMPLED)
            if turn:  # the first round warms up
                times[name].append(timed)
    tokens = {name: runs[0][0] for name, runs in times.items()}
    different = [name for name in tokens if tokens[name] != tokens["transformers"]]
    if different and task not in SAMPLED:
        raise SystemExit(f"{task}: expected the tokens of transformers, got others from {', '.join(different)}")
    return times


def rows_of(task: str, prompt: list[int], new_tokens: int, times: dict[str, list[Timed]]) -> list[dict[str, Any]]:
    """One row per contender: medians over the rounds, and ratios to transformers and to kvops without drafts."""
    base_decode = statistics.median(decode for _, _, decode in times["transformers"])
    base_total = statistics.median(first + decode for _, first, decode in times["transformers"])
    rows = []
    for name, runs in times.items():
        decode = statistics.median(decode for _, _, decode in runs)
        total = statistics.median(first + decode for _, first, decode in runs)
        rows.append(
            {
                "task": task,
                "contender": name,
                "prompt_tokens": len(prompt),
                "new_tokens": new_tokens,
                "first_token_seconds": statistics.median(first for _, first, _ in runs),
                "total_seconds": total,
                "decode_tokens_per_second": (new_tokens - 1) / decode,
                "decode_speed_ratio": base_decode / decode,
                "decode_speed_ratio_to_kvops": statistics.median(
                    without / own for (_, _, without), (_, _, own) in zip(times["kvops"], runs, strict=True)
                ),
                "total_speed_ratio": base_total / total,
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    columns = {
        "task": "{task}",
        "contender": "{contender}",
        "prompt": "{prompt_tokens}",
        "first token s": "{first_token_seconds:.2f}",
        "decode tokens/s": "{decode_tokens_per_second:.1f}",
        "decode ratio": "{decode_speed_ratio:.2f}",
        "of kvops": "{decode_speed_ratio_to_kvops:.2f}",
        "total ratio": "{total_speed_ratio:.2f}",
    }
    cells = [[pattern.format(**row) for pattern in columns.values()] for row in rows]
    return tabulate(cells, headers=[*columns], disable_numparse=True, colalign=("left", "left", *6 * ["right"]))


@quiet_without_reader
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--new-tokens", type=positive, default=96)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    path = find_default_model()
    loaded = load(path)
    contenders = contenders_of(loaded, path)
    rows = []
    for task in arguments.tasks:
        text = loaded.tokenizer.apply_chat_template([{"role": "user", "content": TASKS[task]}])
        prompt = loaded.tokenizer.encode(text)
        times = measure(contenders, task, prompt, arguments.new_tokens, arguments.rounds)
        rows += rows_of(task, prompt, arguments.new_tokens, times)
    setting = {
        "processor": processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvops": kvops.__version__,
        "model": loaded.name,
        "dtype": "float32",
        "rounds": arguments.rounds,
        "date": datetime.date.today().isoformat(),
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")
    print(table_of(rows))
    print("\n" + ", ".join(f"{name} {value}" for name, value in setting.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
