"""``python -m kvops generate PROMPT``: one answer, token by token, and its statistics."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

import torch

from kvops.cli import models, options
from kvops.cli.environment import chosen_device
from kvops.generation.generate import GenerationStats, stream
from kvops.generation.options import GenerationOptions
from kvops.generation.passes import Decoder
from kvops.models.tokenizer import Tokenizer
from kvops.policies import Compression


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="the prompt; - reads it from standard input")
    parser.add_argument("--prompt", metavar="TEXT", help="the same, as an option")
    parser.add_argument("--raw", action="store_true", help="continue the text instead of answering it as a chat")
    options.add_sampling(parser)
    options.add_compression(parser)
    options.add_drafts(parser)
    options.add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    options.expect_effect(arguments)
    compression = options.compression_of(arguments)
    if (arguments.text is None) == (arguments.prompt is None):
        raise ValueError("PROMPT: expected one text to answer, or - to read it from standard input")
    text = arguments.prompt if arguments.text is None else arguments.text
    device = chosen_device(arguments.device)
    model, tokenizer, _ = models.load_model(arguments.model, device)
    if text == "-":
        text = sys.stdin.read()
    if not arguments.raw:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    stats = GenerationStats()
    words = tokenizer.stream()
    steps = stream(
        model,
        [tokenizer.encode(text)],
        **vars(settings_of(arguments, tokenizer, compression, device)),
        stats=stats,
    )
    for (tokens,) in steps:
        for token in tokens:
            if token not in tokenizer.eos_token_ids:
                print(words.put(token), end="", flush=True)
    print(words.finish(), flush=True)
    print(f"\n{summary(stats)}", file=sys.stderr)


def settings_of(
    arguments: argparse.Namespace, tokenizer: Tokenizer, compression: Compression | None, device: torch.device
) -> GenerationOptions:
    """The options of a generation from the command line."""
    return GenerationOptions(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature or 0.0,
        seed=arguments.seed,
        stop_tokens=tokenizer.eos_token_ids,
        compression=compression,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        draft=draft_of(arguments, device),
        tree=1 if arguments.tree is None else arguments.tree,
    )


def draft_of(arguments: argparse.Namespace, device: torch.device) -> Literal["prompt_lookup"] | Decoder | None:
    """The drafter for ``--draft``."""
    if arguments.draft == "lookup":
        return "prompt_lookup"
    return None if arguments.draft is None else models.load_model(Path(arguments.draft), device).model


def summary(stats: GenerationStats) -> str:
    """The statistics of a generation, and a line for each option that was not met."""
    line = (
        f"{stats.prompt_tokens} tokens read, first token after {stats.first_token_seconds:.2f} s, "
        f"{stats.new_tokens} tokens generated at {stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.tokens_per_pass:.2f} tokens a pass, cache {stats.bytes_in_use / 2**20:.1f} MiB in "
        f"{stats.blocks_in_use} blocks, {stats.compression:.1f}x smaller than a whole one"
    )
    return "\n".join([line, *stats.unmet])
