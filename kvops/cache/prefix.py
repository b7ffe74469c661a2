"""Remembered prefixes: which blocks hold the keys and values of the first tokens of earlier prompts.

The key of a full block is a hash of its tokens and of the key of the block before it, so that a key identifies all
tokens up to the block's end (automatic prefix caching: Kwon et al. 2023, https://arxiv.org/abs/2309.06180, and the
design notes of vLLM). The hash is SHA-256, for which no collisions are known.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvops import checks
from kvops.cache.pool import BlockPool

KEY_BYTES = 32
# The parent of a first block. No hash is all zeros, so files can store this value as a key.
NO_PARENT = bytes(KEY_BYTES)

# The search reads all entries, so this share of the unused ones is dropped at once.
_LEAST_DROPPED = 1 / 8


def tokens_of(tokens: Sequence[int] | Tensor) -> list[int]:
    """A ``tokens`` argument as a list."""
    if isinstance(tokens, Tensor):
        checks.expect_rank("tokens", tokens, "[tokens]")
    return checks.ints("tokens", tokens)


@dataclass
class Entry:
    """One block of tokens: a block in each list.

    Attributes:
        parent: key of the block before it, NO_PARENT for the first.
        depth: the number of blocks before it.
        blocks: int32 ``[layers, heads]``, the blocks that hold the keys and values of its tokens.
        used: the time of its last use. A parent is never older than its children.
        children: entries that follow it.
    """

    parent: bytes
    depth: int
    blocks: Tensor
    used: int
    children: int = 0


class PrefixStore:
    """The entries by key. Each entry holds its blocks in the pool, as a row does. ``len()`` counts entries."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.entries: dict[bytes, Entry] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self.entries)

    def remember(self, row: int, tokens: Sequence[int], salt: str) -> int:
        """Add entries for the full blocks of ``tokens`` in ``row``. Returns the number of tokens that are
        remembered."""
        keys = list(self._keys(tokens, salt))
        known = self._touch(keys)
        if known < len(keys):
            held = self.pool.hold(row, known, len(keys))
            for parent, key, blocks in zip([NO_PARENT, *keys][known:], keys[known:], held, strict=False):
                self._insert(parent, key, blocks)
        return len(keys) * self.pool.block_size

    def find(self, tokens: Sequence[int], salt: str) -> Tensor | None:
        """The blocks ``[n, layers, heads]`` of the longest remembered prefix of ``tokens``; None without one."""
        keys = list(self._keys(tokens, salt))
        known = self._touch(keys)
        return torch.stack([self.entries[key].blocks for key in keys[:known]]) if known else None

    def restore(self, keys: Sequence[bytes], parents: Sequence[bytes], blocks: Tensor) -> None:
        """Add entries, in :meth:`oldest_first` order, whose ``blocks`` [n, layers, heads] the pool already holds."""
        for key, parent, own in reversed(list(zip(keys, parents, blocks, strict=True))):
            self._insert(parent, key, own)
        self._clock = len(keys)
        for place, key in enumerate(keys):
            self.entries[key].used = place

    def oldest_first(self) -> list[bytes]:
        """Keys in the order in which entries are dropped: least recently used first, children before parents."""
        return sorted(self.entries, key=lambda key: (self.entries[key].used, -self.entries[key].depth))

    def make_room(self, shortage: int, *, in_use: bool) -> bool:
        """Drop entries, least recently used first, so that ``shortage`` more blocks are free. Reads from the device.

        Without ``in_use`` only blocks that no row uses count. If there are too few of them, nothing is dropped. With
        ``in_use`` entries whose blocks rows use are dropped too. This serves requests that copy shared blocks: a block
        that only one row holds needs no copy.

        Returns whether anything was dropped. It may have to be called again: a block that two entries hold (of one row
        under two salts) is free only without both.
        """
        if not self.entries:
            return False
        order = self.oldest_first()
        blocks = torch.stack([self.entries[key].blocks for key in order])
        in_no_row = self.pool.holders() == 0
        gains = dict(zip(order, in_no_row[blocks.long()].flatten(1).sum(1).tolist(), strict=True))
        unused = int(in_no_row.sum() - self.pool.free_count)
        wanted = max(shortage, int(unused * _LEAST_DROPPED))
        if unused < shortage:
            if not in_use:
                return False
            gains, wanted = dict.fromkeys(order, blocks[0].numel()), shortage
        dropped: dict[bytes, Tensor] = {}
        for ends_only in (True, False):  # the last blocks may be in use although those before them are not
            for key in order:
                if wanted <= 0 or key in dropped or (ends_only and (self.entries[key].children or not gains[key])):
                    continue
                dropped[key] = self._remove(key)
                wanted -= gains[key]
        self.pool.drop(torch.stack(list(dropped.values())))
        return True

    def clear(self) -> None:
        """Drop all entries."""
        if self.entries:
            self.pool.drop(torch.stack([entry.blocks for entry in self.entries.values()]))
            self.entries.clear()

    def _keys(self, tokens: Sequence[int], salt: str) -> Iterator[bytes]:
        """The keys of the full blocks of ``tokens``, in order."""
        if not isinstance(salt, str):
            raise TypeError(f"salt: expected a str, got {salt!r}")
        size = self.pool.block_size
        key = hashlib.sha256(salt.encode()).digest()
        for start in range(0, len(tokens) - size + 1, size):
            key = hashlib.sha256(key + array("q", tokens[start : start + size]).tobytes()).digest()
            yield key

    def _touch(self, keys: Sequence[bytes]) -> int:
        """The number of ``keys``, from the first on, that are remembered. They count as used now."""
        self._clock += 1
        known = 0
        while known < len(keys) and (entry := self.entries.get(keys[known])) is not None:
            entry.used = self._clock
            known += 1
        return known

    def _insert(self, parent: bytes, key: bytes, blocks: Tensor) -> None:
        """Add an entry. Its parent, if it has one, must exist."""
        above = self.entries.get(parent)
        if above is not None:
            above.children += 1
        depth = 0 if above is None else above.depth + 1
        self.entries[key] = Entry(parent, depth, blocks, self._clock)

    def _remove(self, key: bytes) -> Tensor:
        entry = self.entries.pop(key)
        if (above := self.entries.get(entry.parent)) is not None:
            above.children -= 1
        return entry.blocks
