"""What a generation did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(repr=False)
class GenerationStats:
    """What a generation did, over all its prompts.

    Attributes:
        prompt_tokens, new_tokens: tokens read and emitted.
        decoded_tokens: those emitted after each prompt's first, which the prefill gives.
        steps, sequence_steps: passes of the model after the prefill, and these times the sequences that took part.
        plain_steps: passes that would have been needed without drafts: the most tokens that any prompt decoded.
        drafted, accepted: draft tokens verified, and found to be what the model would have said.
        refused: prompts that ended early, at logits with a NaN, a +inf or nothing above -inf (all tokens forbidden).
        first_token_seconds: prefill, compression and the first token of every prompt.
        decode_seconds: everything after; ``draft_seconds`` of it went to drafting.
        undrafted_steps, undrafted_seconds: the passes that had no drafts to verify, and their time.
        blocks_in_use, bytes_in_use: the most that the cache held, looked at when a sequence ended.
        final_blocks, full_blocks: blocks that the sequences held when they ended, and those that their whole caches
            would have taken.
        unmet: a sentence for each thing that was asked for and did not happen: a compression that protected tokens
            prevent, a budget that new tokens exceed, drafts that were never made, filters without effect. Complete when
            the generation has ended.
        tokens_per_second: ``decoded_tokens / decode_seconds``.
        accepted_per_step: ``accepted / sequence_steps``.
        tokens_per_pass: ``decoded_tokens / sequence_steps``, 1 without drafts.
        compression: ``full_blocks / final_blocks``: how many times smaller the caches ended than whole ones.
        seconds_saved: an estimate: ``plain_steps`` passes at the mean time of those without drafts, less
            ``decode_seconds``. Where every pass had drafts it is an upper bound, for then their mean, drafting left
            out, stands for that of a pass without.
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
