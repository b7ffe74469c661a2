"""SmolLM2's 64 greedy tokens on the GPU beside those of the CPU, without and with drafts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu.units import FAILED, PASSED, SKIPPED, report

PROMPT = (
    "The cache of keys and values grows with every token. Repeat this sentence: the cache of keys and values grows "
    "with every token, and what it keeps is what the model can look back on."
)


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.greedy", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=Path, required=True)
    return parser.parse_args(words)


def main() -> None:
    arguments = arguments_of()
    name = f"SmolLM2-135M, {arguments.tokens} greedy tokens"
    try:
        from kvops.generation.generate import generate
        from kvops.models.llama import Llama
        from kvops.models.loading import load

        loaded = load(progress=False)
    except (ImportError, FileNotFoundError) as error:
        print(f"skipped: {error}")
        report(arguments.rows, name, SKIPPED, str(error).splitlines()[0])
        return
    prompt = loaded.tokenizer.encode(PROMPT)
    tokens = {}
    for device in ("cpu", arguments.device):
        weights = {key: weight.to(device) for key, weight in loaded.weights.items()}
        model = Llama(loaded.config, weights)
        for draft in (None, "prompt_lookup"):
            (tokens[device, draft],) = generate(model, [prompt], max_new_tokens=arguments.tokens, draft=draft).tokens
    expected = tokens["cpu", None]
    for (device, draft), found in tokens.items():
        which = f"{name} on {torch.device(device).type}, {'drafts' if draft else 'no drafts'}"
        same = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
        good = found == expected
        print(f"{which}: {'the same' if good else f'differs from token {same}'}")
        report(arguments.rows, which, PASSED if good else FAILED, "" if good else f"differs from token {same}")


if __name__ == "__main__":
    main()
