"""A conversation: a text that grows turn by turn, in one cache that is compressed between turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence

import torch

from kvops import checks
from kvops.generation.batch import Batch
from kvops.generation.options import GenerationOptions
from kvops.generation.passes import Decoder, new_cache
from kvops.generation.sampler import Sampler
from kvops.generation.speculation import make_drafter
from kvops.generation.stats import GenerationStats
from kvops.policies import RecentQueries


class Conversation:
    """A text that the model reads and continues in turns. Each turn reads only the new tokens.

    Keys and values of earlier turns stay in the cache. With ``options.compression``, the whole cache is compressed
    after each reading, to the budget of the text so far. The policy scores old keys again with the queries of the new
    tokens. ``every`` also compresses while an answer is generated.

    Args:
        model: the decoder.
        options: the options of every turn, with one ``compression`` for the conversation. A drafting model reads the
            whole text again in each turn.
        max_tokens: the most tokens of the text.

    Attributes:
        cache: the cache, of one row.
        tokens: the text so far.
        stats: of the latest turn.
    """

    def __init__(self, model: Decoder, options: GenerationOptions, *, max_tokens: int) -> None:
        checks.expect_int("max_tokens", max_tokens, 1)
        if max_tokens > model.config.max_positions:
            raise ValueError(
                f"max_tokens: expected at most the model's {model.config.max_positions} positions, got {max_tokens}"
            )
        (self._compression,) = options.compressions(1)
        self.model, self.options, self.max_tokens = model, options, max_tokens
        room = options.num_draft * options.tree
        self.cache = new_cache(model, max_batch=1, max_tokens=max_tokens + room)
        self._recent: RecentQueries | None = None
        self.tokens: list[int] = []
        self.stats = GenerationStats()

    def clear(self) -> None:
        """Forget the text and empty the cache."""
        self.cache.free()
        self._recent = None
        self.tokens = []

    @torch.no_grad()
    def reply(self, tokens: Sequence[int]) -> Generator[list[int], None, None]:
        """Read ``tokens`` after the text so far and generate. Yields the new tokens of each step.

        Yielded tokens are part of the text, even if the caller stops early. An error empties the cache, and the next
        turn has to begin with the whole text.

        Raises ValueError if ``tokens`` is empty, or if the text would become longer than ``max_tokens``.
        """
        new = checks.ints("tokens", tokens)
        text = [*self.tokens, *new]
        if not new:
            raise ValueError("tokens: expected at least one, got none")
        if len(text) >= self.max_tokens:
            raise ValueError(
                f"tokens: expected fewer than {self.max_tokens - len(self.tokens)} more tokens in this conversation of "
                f"{len(self.tokens)}, got {len(new)}"
            )
        most = min(self.options.max_new_tokens, self.max_tokens - len(text))
        options = dataclasses.replace(self.options, max_new_tokens=most)
        self.stats = GenerationStats()
        sampler = Sampler.of(options, self.model, [len(text)])
        drafter = make_drafter(options, self.model, sampler, max_batch=1, max_tokens=self.max_tokens)
        batch = Batch(self.model, self.cache, sampler, drafter, [self._compression], options, self.stats, keep=True)
        batch.recent = self._recent = self._recent or batch.recent
        held = int(self.cache.next_positions[0])
        emitted: list[int] = []
        try:
            step = batch.read([text], held=held)[0]
            while True:
                emitted += step
                yield step
                if not any(batch.active):
                    break
                step = batch.step()[0]
            batch.finish()
        except GeneratorExit:
            self._keep([*text, *emitted])
            raise
        except BaseException:
            self.clear()
            raise
        self._keep([*text, *emitted])

    def _keep(self, text: list[int]) -> None:
        """Remove drafts from the cache that were accepted after a stop token."""
        beyond = int(self.cache.next_positions[0]) - len(text)
        if beyond > 0:
            self.cache.rollback(beyond)
        self.tokens = text
