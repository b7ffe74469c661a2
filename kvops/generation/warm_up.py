"""Compile what a generation launches before the first request comes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from kvops import checks
from kvops.generation.generate import generate
from kvops.generation.options import GenerationOptions
from kvops.generation.passes import Decoder

# Tiles are powers of two: of a few rows, of a prompt that fills one, of a prompt that fills several.
_LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128, 300)


def warm_up(
    model: Decoder,
    options: GenerationOptions | None = None,
    *,
    lengths: Sequence[int] = _LENGTHS,
    progress: Callable[[str], None] | None = None,
) -> float:
    """Compile every kernel that :func:`~kvops.generation.generate.generate` launches for this model with these options,
    by short generations on the model's device. What is compiled is kept on disk: later processes load it.

    Another dtype, head size, feature or tile compiles a kernel again; another batch, length or layer does not.
    So a few prompts are enough, one at a time and two together.

    Args:
        model: the decoder; its weights do not matter, its shapes and dtype do.
        options: as the requests will have them; ``max_new_tokens`` and ``stop_tokens`` are not used. None is greedy
            decoding with the whole cache. Call it once for each set of options that will be used. Of an option with a
            value for each prompt, the first value is used.
        lengths: tokens of the prompts; those that the model cannot read are left out.
        progress: called with a line after each generation, such as ``print``.

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
    for place, length in enumerate(fitting):
        # A short period, so that prompt lookup has something to draft.
        prompt = [token % min(3, model.config.vocab_size) for token in range(length)]
        for batch in (1, 2):
            generate(model, [prompt] * batch, **settings)
        if progress is not None:
            seconds = time.perf_counter() - started
            progress(f"{place + 1} of {len(fitting)}: prompts of {length} tokens, {seconds:.1f} s")
    # After refused drafts a prompt gets shorter ones.
    shorter = options.num_draft // 2 if options.draft else 0
    while shorter:
        generate(model, [prompt, prompt], **{**settings, "num_draft": shorter})
        shorter //= 2
    return time.perf_counter() - started


_PER_PROMPT = {field.name for field in dataclasses.fields(GenerationOptions)} - {"bad_words", "stop_tokens", "draft"}
