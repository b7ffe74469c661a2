"""transformers' continuous batching on this CPU, ``model.generate_batch``, with its own attention and with kvops'.

    python -m bench.batching_cpu --json bench/results/cpu/batching.json

The same weights, requests and engine; contenders take turns, and ratios are medians over the rounds. All must emit the
same greedy tokens, or the run fails.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tqdm import tqdm

from bench import results, table
from bench.timing import setting
from kvops.cli.console import positive, quiet_without_reader
from kvops.integrations.transformers import continuous_batching
from kvops.models.loading import find_default_model, load

KVOPS = "kvops"
CONTENDERS = (KVOPS, "sdpa", "eager")
# Lengths of a service: short questions beside long documents.
LENGTHS = (40, 900, 120, 60, 2000, 300, 80, 500)


def _prompts(tokenizer: Any) -> list[list[int]]:
    words = [tokenizer.encode(topics[name]) for name in ("with", "try", "typesseq", "specialnames")]
    text = [token for topic in words for token in topic]
    return [text[100 * place :][:length] for place, length in enumerate(LENGTHS)]


def _serve(model: Any, prompts: list[list[int]], contender: str, new_tokens: int) -> tuple[list[list[int]], float]:
    """The new tokens of each request, and the seconds for all of them."""
    options = transformers.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    engine = transformers.ContinuousBatchingConfig(
        page_size=16, num_blocks=1024, max_batch_tokens=512, use_cuda_graph=False
    )
    if contender != KVOPS:
        model.set_attn_implementation(contender)
    with continuous_batching(model) if contender == KVOPS else contextlib.nullcontext():
        started = time.perf_counter()
        out = model.generate_batch(prompts, options, engine, warmup=False, progress_bar=False)
        seconds = time.perf_counter() - started
    return [answer.generated_tokens for answer in out.values()], seconds


@quiet_without_reader
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--new-tokens", type=positive, default=24)
    parser.add_argument("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    path = find_default_model()
    loaded = load(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    prompts = _prompts(loaded.tokenizer)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in tqdm(range(arguments.rounds + 1), unit="round", disable=None):
        tokens = {}
        for name in CONTENDERS:
            tokens[name], taken = _serve(model, prompts, name, arguments.new_tokens)
            if turn:  # the first round warms up
                seconds[name].append(taken)
        different = [name for name in CONTENDERS if tokens[name] != tokens[KVOPS]]
        if different:
            raise SystemExit(f"expected the same tokens of all, got others from {', '.join(different)}")
    rows = [
        {
            "attention": name,
            "seconds": round(statistics.median(seconds[name]), 2),
            "new tokens/s": round(len(prompts) * arguments.new_tokens / statistics.median(seconds[name]), 1),
            "times as fast with kvops": round(
                statistics.median(b / a for a, b in zip(seconds[KVOPS], seconds[name], strict=True)), 2
            ),
        }
        for name in CONTENDERS
    ]
    facts = setting(torch.device("cpu")) | {
        "model": loaded.name, "transformers": transformers.__version__, "dtype": "float32",
        "prompts": ", ".join(map(str, LENGTHS)), "new_tokens": arguments.new_tokens, "rounds": arguments.rounds,
    }  # fmt: skip
    if arguments.json:
        results.save(arguments.json, "continuous batching", facts, rows)
    print(table.render([[*map(str, row.values())] for row in rows], list(rows[0]), "simple", left=1))
    print(table.setting_text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
