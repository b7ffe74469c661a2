"""Statistics of a generation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(repr=False)
class GenerationStats:
    """Statistics of a generation, over all its prompts.

    Attributes:
        prompt_tokens, new_tokens: the number of tokens read and emitted.
        decoded_tokens: emitted tokens without the first of each prompt, which the prefill gives.
        steps, sequence_steps: passes of the model after the prefill, and their sum over the sequences in each pass.
        plain_steps: passes that decoding without drafts takes: the most tokens that any prompt decoded.
        drafted, accepted: drafted tokens that were verified, and those of them that were accepted.
        refused: prompts that ended early, at logits with a NaN, a +inf or nothing above -inf (all tokens forbidden).
        first_token_seconds: the time for prefill, compression and the first token of every prompt.
        decode_seconds: the time for all later steps; ``draft_seconds`` of it for drafting.
        undrafted_steps, undrafted_seconds: the passes without drafts, and their time.
        blocks_in_use, bytes_in_use: the most that the cache held at the end of any sequence.
        final_blocks, full_blocks: blocks that the sequences held when they ended, and those that they would have taken
            without compression.
        unmet: a sentence for each option that was not met: a compression that protected tokens prevent, a budget that
            new tokens exceed, drafts that were never made, filters without effect. Complete when the generation has
            ended.
        tokens_per_second: ``decoded_tokens / decode_seconds``.
        accepted_per_step: ``accepted / sequence_steps``.
        tokens_per_pass: ``decoded_tokens / sequence_steps``, 1 without drafts.
        compression: ``full_blocks / final_blocks``, how many times smaller the caches are at the end.
        seconds_saved: an estimate: ``plain_steps`` times the mean time of a pass without drafts, minus
            ``decode_seconds``. If every pass had drafts, it is an upper bound: the mean time of all passes without
            drafting takes the place of the time without drafts.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    decoded_tokens: int = 0
    steps: int = 0
    sequence_steps: int = 0
    plain_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    refused: int = 0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    draft_seconds: float = 0.0
    undrafted_steps: int = 0
    undrafted_seconds: float = 0.0
    blocks_in_use: int = 0
    bytes_in_use: int = 0
    final_blocks: int = 0
    full_blocks: int = 0
    unmet: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        parts = [
            f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new",
            f"{self.first_token_seconds:.3g} s to the first tokens",
            f"{self.tokens_per_second:.1f} tokens/s from there",
        ]
        if self.drafted:
            parts.append(f"{self.accepted} of {self.drafted} drafted tokens accepted")
        if self.full_blocks:
            parts.append(f"caches {self.compression:.1f} times smaller at the end")
        if self.refused:
            parts.append(f"{self.refused} prompts ended early")
        return f"GenerationStats({', '.join([*parts, *self.unmet])})"

    @property
    def compression(self) -> float:
        return self.full_blocks / self.final_blocks if self.final_blocks else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def accepted_per_step(self) -> float:
        return self.accepted / self.sequence_steps if self.sequence_steps else 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.decoded_tokens / self.sequence_steps if self.sequence_steps else 0.0

    @property
    def seconds_saved(self) -> float:
        if not self.steps or not self.drafted:
            return 0.0
        if self.undrafted_steps:
            pass_seconds = self.undrafted_seconds / self.undrafted_steps
        else:
            pass_seconds = (self.decode_seconds - self.draft_seconds) / self.steps
        return self.plain_steps * pass_seconds - self.decode_seconds
