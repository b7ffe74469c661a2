"""Compile what a generation launches before the first request comes."""

from __future__ import annotations

import dataclasses
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kvops import checks
from kvops.generation.generate import generate
from kvops.generation.options import GenerationOptions
from kvops.generation.passes import Decoder
from kvops.models.llama import Llama
from kvops.ops.compile_ahead import compile_ahead
from kvops.ops.registry import backend

# Tiles are powers of two: of a few rows, of a prompt that fills one, of a prompt that fills several.
_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 300)


def warm_up(
    model: Decoder,
    options: GenerationOptions | None = None,
    *,
    lengths: Sequence[int] = _LENGTHS,
    jobs: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> float:
    """Compile every kernel that :func:`~kvops.generation.generate.generate` launches for this model with these options,
    by short generations on the model's device. What is compiled is kept on disk: later processes load it.

    Another dtype, head size, feature or tile compiles a kernel again; another batch, length or layer does not.
    So a few prompts are enough, one at a time and two together.

    For a GPU the kernels of a :class:`~kvops.models.llama.Llama` are compiled first, by ``jobs`` processes that make
    the same generations with a small model on the CPU; the generations on the GPU then find them.

    Args:
        model: the decoder; its weights do not matter, its shapes and dtype do.
        options: as the requests will have them; ``max_new_tokens`` and ``stop_tokens`` are not used. None is greedy
            decoding with the whole cache. Call it once for each set of options that will be used. Of an option with a
            value for each prompt, the first value is used.
        lengths: tokens of the prompts; those that the model cannot read are left out.
        jobs: processes that compile for a GPU, by default one for each core, at most 16; 0 compiles each kernel where
            it is launched first.
        progress: called with a line after each kernel that is compiled and after each generation, such as ``print``.

    Returns:
        The seconds that it took.

    Raises:
        ValueError, TypeError: as ``generate`` for options that do not fit.
    """
    options = options or GenerationOptions()
    lengths = checks.ints("lengths", lengths)
    compressions = options.compression if isinstance(options.compression, Sequence) else [options.compression]
    every = max((entry.every for entry in compressions if entry), default=0)
    new_tokens = max(4, options.num_draft + 1 if options.draft else 0, every + 2 if every else 0)
    room = options.tree * options.num_draft if options.draft else 0
    longest = model.config.max_positions - new_tokens - room
    fitting = [length for length in lengths if 0 < length <= longest]
    if not fitting:
        raise ValueError(f"lengths: expected at least one from 1 to {longest}, as the model reads, got {list(lengths)}")
    # One option for each request of a batch: those of the first serve here.
    settings = {
        name: value[0] if isinstance(value, Sequence) and not isinstance(value, str) and name in _PER_PROMPT else value
        for name, value in vars(options).items()
    }
    settings |= {"max_new_tokens": new_tokens, "stop_tokens": ()}
    started = time.perf_counter()

    def tell(line: str) -> None:
        if progress is not None:
            progress(f"{line}, {time.perf_counter() - started:.1f} s")

    if backend(model.embedding.weight.device) == "triton" and jobs != 0:
        _compile_in_parallel(model, settings, fitting, jobs or min(16, os.cpu_count() or 1), tell)
    for place, length in enumerate(_generations(model, settings, fitting)):
        tell(f"{place + 1} of {len(fitting)}: prompts of {length} tokens")
    return time.perf_counter() - started


def _generations(model: Decoder, settings: dict[str, Any], lengths: Sequence[int]) -> Iterator[int]:
    """Generate after prompts of each length, and yield it."""
    for length in lengths:
        # A short period, so that prompt lookup has something to draft.
        prompt = [token % min(3, model.config.vocab_size) for token in range(length)]
        for batch in (1, 2):
            generate(model, [prompt] * batch, **settings)
        if length == lengths[-1]:  # after refused drafts a prompt gets shorter ones
            shorter = settings["num_draft"] // 2 if settings["draft"] else 0
            while shorter:
                generate(model, [prompt, prompt], **{**settings, "num_draft": shorter})
                shorter //= 2
        yield length


def run_generations(model: Decoder, settings: dict[str, Any], lengths: Sequence[int]) -> None:
    for _ in _generations(model, settings, lengths):
        pass


def _compile_in_parallel(
    model: Decoder, settings: dict[str, Any], lengths: Sequence[int], jobs: int, tell: Callable[[str], None]
) -> None:
    draft = settings["draft"]
    if not isinstance(model, Llama) or not (draft is None or isinstance(draft, (str, Llama))):
        return
    longest = 2 * max(lengths) + 1024  # and what is generated
    small = {**settings, "draft": stand_in(draft, longest) if isinstance(draft, Llama) else draft}
    compiled: list[str] = []

    def told(name: str) -> None:
        compiled.append(name)
        tell(f"{len(compiled)} kernels compiled: {name}")

    try:
        compile_ahead(run_generations, (stand_in(model, longest), small, lengths), jobs, told)
    except (*_NOT_PICKLED, RuntimeError) as error:
        warnings.warn(f"warm_up: each kernel is compiled where it is launched first: {error}", stacklevel=3)


def stand_in(model: Llama, longest: int) -> Llama:
    """A model on the CPU that launches the same kernels: two narrow layers of the same heads, with random weights. It
    reads up to ``longest`` tokens."""
    config = dataclasses.replace(
        model.config, hidden_size=16, intermediate_size=16, num_layers=min(2, model.config.num_layers),
        max_positions=min(longest, model.config.max_positions), rope_scaling=None,
    )  # fmt: skip
    dtype = model.embedding.weight.dtype
    shapes = config.weight_shapes()
    return Llama(config, {name: torch.randn(shape, device="cpu").to(dtype) for name, shape in shapes.items()})


# What pickle raises for lambdas and local classes, by version of Python.
_NOT_PICKLED = (AttributeError, TypeError, pickle.PicklingError)
_PER_PROMPT = {field.name for field in dataclasses.fields(GenerationOptions)} - {
    "bad_words",
    "logit_bias",
    "stop_tokens",
    "draft",
}
