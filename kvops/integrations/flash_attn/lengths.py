"""Packed sequences of which only parts are attended to, as more and shorter packed sequences.

A sequence is cut where what a query may see changes, into pieces that have queries only, keys only, or both. Tokens
stay where they are: only cumulative lengths change, and they stay on the device. One launch serves all pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvops import checks


@dataclass(frozen=True)
class Lengths:
    """The lengths of packed sequences, as :func:`kvops.flash_attention_varlen` takes them.

    Attributes:
        pieces: into how many of these each of the caller's sequences was cut.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    pieces: int = 1

    @classmethod
    def of_rows(cls, batch: int, tokens_q: int, tokens_k: int, device: torch.device) -> Lengths:
        """Sequences that all have the same length."""
        rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
        return cls(rows * tokens_q, rows * tokens_k, tokens_q, tokens_k)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        return self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k

    def slopes(self, alibi_slopes: Tensor | None) -> Tensor | None:
        """``alibi_slopes`` of the caller's sequences, ``[B, Hq]`` or ``[Hq]``, for the pieces."""
        if alibi_slopes is None or alibi_slopes.dim() != 2 or self.pieces == 1:
            return alibi_slopes
        return alibi_slopes.repeat_interleave(self.pieces, 0)

    def cut(
        self,
        *,
        leftpad_k: Tensor | None = None,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        attention_chunk: int = 0,
    ) -> Lengths:
        """The pieces that attend to each other.

        Args:
            leftpad_k: int32 ``[B]``, how many keys at the beginning of a sequence are not part of it.
            seqused_q, seqused_k: int32 ``[B]``, how many queries and keys of each sequence are used, the padding of
                ``leftpad_k`` counted in. The other queries see nothing.
            attention_chunk: queries see the keys of their own chunk of so many positions; 0 for no chunks.
        """
        checks.expect_int("attention_chunk", attention_chunk, 0)
        len_q, len_k = self.cu_seqlens_q.diff(), self.cu_seqlens_k.diff()
        for name, given in (("leftpad_k", leftpad_k), ("seqused_q", seqused_q), ("seqused_k", seqused_k)):
            if given is not None:
                _check(name, given, len_q)
        if leftpad_k is seqused_q is seqused_k is None and not attention_chunk:
            return self
        used_q = len_q if seqused_q is None else seqused_q
        used_k = len_k if seqused_k is None else seqused_k
        first = torch.zeros_like(len_k) if leftpad_k is None else leftpad_k
        if checks.may_look(len_q):
            checks.expect_data("seqused_q", "numbers up to the lengths of cu_seqlens_q", used_q <= len_q)
            checks.expect_data("seqused_k", "numbers up to the lengths of cu_seqlens_k", used_k <= len_k)
            checks.expect_data("leftpad_k", "numbers up to the keys that are used", first <= used_k)
        none = torch.zeros_like(len_q)
        pairs = [] if leftpad_k is None else [(none, first)]  # queries and keys of each piece
        pairs += self._chunks(used_q, used_k - first, attention_chunk)
        pairs += [] if seqused_q is None else [(len_q - used_q, none)]
        pairs += [] if seqused_k is None else [(none, len_k - used_k)]
        cu_q, cu_k = (
            torch.nn.functional.pad(torch.stack(lens, 1).flatten().cumsum(0), (1, 0)).to(torch.int32)
            for lens in zip(*pairs, strict=True)
        )
        return Lengths(cu_q, cu_k, self.max_seqlen_q, self.max_seqlen_k, len(pairs))

    def _chunks(self, len_q: Tensor, len_k: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """Sequences of ``len_q`` queries and ``len_k`` keys, aligned at their ends, cut into chunks of keys."""
        if not size:
            return [(len_q, len_k)]
        before = (len_q - len_k).clamp(min=0)  # queries before the first key see nothing
        pairs, done_q, done_k = [(before, torch.zeros_like(before))], before, torch.zeros_like(before)
        for end in range(size, self.max_seqlen_k + size, size):
            end_k = len_k.clamp(max=end)
            end_q = torch.minimum((end + len_q - len_k).clamp(min=0), len_q).maximum(done_q)
            pairs.append((end_q - done_q, end_k - done_k))
            done_q, done_k = end_q, end_k
        return pairs


def _check(name: str, given: Tensor, like: Tensor) -> None:
    checks.expect_tensor(name, given)
    checks.expect_dtype(name, given, torch.int32)
    checks.expect_shape(name, given, "[batch]", len(like))
    checks.expect_same_device(name, given, "cu_seqlens_q", like)
    if checks.may_look(given):
        checks.expect_data(name, "numbers from 0 on", given >= 0)
