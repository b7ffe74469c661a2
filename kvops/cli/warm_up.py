"""``python -m kvops warm-up``: compile what ``generate`` launches, before the first request comes."""

from __future__ import annotations

import argparse
import sys

from kvops.cli import models, options
from kvops.cli.environment import chosen_device
from kvops.cli.generate import settings_of
from kvops.generation.warm_up import warm_up
from kvops.ops.registry import backend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_sampling(parser)
    options.add_compression(parser)
    options.add_drafts(parser)
    options.add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    options.expect_effect(arguments)
    compression = options.compression_of(arguments)
    device = chosen_device(arguments.device)
    model, tokenizer, _ = models.load_model(arguments.model, device)
    settings = settings_of(arguments, tokenizer, compression, device)
    seconds = warm_up(model, settings, progress=lambda line: print(line, file=sys.stderr, flush=True))
    print(f"The kernels of these options are compiled and kept on disk ({backend(device)}, {seconds:.1f} s).")
