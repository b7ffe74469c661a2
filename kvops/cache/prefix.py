"""Prefixes of tokens that are remembered: which blocks hold the keys and values of their first tokens.

The tokens of each full block are hashed together with the hash of all that comes before them, so that an entry stands
for everything up to its end (automatic prefix caching: Kwon et al. 2023, https://arxiv.org/abs/2309.06180, and the
design notes of vLLM). The hash is SHA-256: different prefixes meet neither by accident nor by design.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvops.cache.pool import BlockPool

KEY_BYTES = 32
# The parent of a first block. No hash is all zeros, so that it fits where keys are stored.
NO_PARENT = bytes(KEY_BYTES)

# Whoever looks for what to give up looks at all entries, so that much of what no row uses is given up at once.
_LEAST_GIVEN_UP = 1 / 8


@dataclass
class Entry:
    """One block of tokens and what it goes on from.

    Attributes:
        parent: key of the entry before it, NO_PARENT for the first.
        depth: entries before it.
        blocks: int32 ``[layers, heads]``, where the keys and values of its tokens are.
        used: when it was last remembered or found; no entry is older than those that go on from it.
        children: entries that go on from it.
    """

    parent: bytes
    depth: int
    blocks: Tensor
    used: int
    children: int = 0


class PrefixIndex:
    """Entries by their key. Each holds its blocks in the pool, as a row would; ``len()`` counts entries."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.entries: dict[bytes, Entry] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self.entries)

    def remember(self, row: int, tokens: Sequence[int], salt: str) -> int:
        """Hold what ``row`` has of ``tokens`` in whole blocks; returns how many tokens are remembered now."""
        keys = list(self._keys(tokens, salt))
        known = self._touch(keys)
        if known < len(keys):
            held = self.pool.hold(row, known, len(keys))
            for parent, key, blocks in zip([NO_PARENT, *keys][known:], keys[known:], held, strict=False):
                self._insert(parent, key, blocks)
        return len(keys) * self.pool.block_size

    def restore(self, keys: Sequence[bytes], parents: Sequence[bytes], blocks: Tensor) -> None:
        """Take in entries whose ``blocks`` [n, layers, heads] are held, in the order of :meth:`oldest_first`."""
        for key, parent, own in reversed(list(zip(keys, parents, blocks, strict=True))):
            self._insert(parent, key, own)
        self._clock = len(keys)
        for place, key in enumerate(keys):
            self.entries[key].used = place

    def oldest_first(self) -> list[bytes]:
        """Keys in the order in which entries are given up: what goes on from an entry comes before it."""
        return sorted(self.entries, key=lambda key: (self.entries[key].used, -self.entries[key].depth))

    def find(self, tokens: Sequence[int], salt: str) -> Tensor | None:
        """Blocks ``[n, layers, heads]`` of the longest remembered prefix of ``tokens``, None where there is none."""
        keys = list(self._keys(tokens, salt))
        known = self._touch(keys)
        return torch.stack([self.entries[key].blocks for key in keys[:known]]) if known else None

    def give_up(self, shortage: int, *, in_use: bool) -> bool:
        """Drop entries, least recently used first, for ``shortage`` more blocks to be free. Reads from the device.

        Entries whose blocks rows use are dropped only with ``in_use``, for requests that copy shared blocks: a block
        that no other row and no entry holds needs no copy. Where the entries that no row uses are too few, nothing is
        dropped without it. Returns whether anything was dropped. It may have to be called again: a block that two
        entries hold, of one row under two salts, is free when both are gone.
        """
        if not self.entries:
            return False
        order = self.oldest_first()
        blocks = torch.stack([self.entries[key].blocks for key in order])
        in_no_row = self.pool.holders() == 0
        gains = dict(zip(order, in_no_row[blocks.long()].flatten(1).sum(1).tolist(), strict=True))
        unused = int(in_no_row.sum() - self.pool.free_count)
        wanted = max(shortage, int(unused * _LEAST_GIVEN_UP))
        if unused < shortage:
            if not in_use:
                return False
            gains, wanted = dict.fromkeys(order, blocks[0].numel()), shortage
        dropped: dict[bytes, Tensor] = {}
        for ends_only in (True, False):  # an entry whose own blocks are in use may be the end of a chain that is not
            for key in order:
                if wanted <= 0 or key in dropped or (ends_only and (self.entries[key].children or not gains[key])):
                    continue
                dropped[key] = self._remove(key)
                wanted -= gains[key]
        self.pool.drop(torch.stack(list(dropped.values())))
        return True

    def clear(self) -> None:
        if self.entries:
            self.pool.drop(torch.stack([entry.blocks for entry in self.entries.values()]))
            self.entries.clear()

    def _keys(self, tokens: Sequence[int], salt: str) -> Iterator[bytes]:
        """The keys of the whole blocks of ``tokens``, in order."""
        if not isinstance(salt, str):
            raise TypeError(f"salt: expected a str, got {salt!r}")
        size = self.pool.block_size
        key = hashlib.sha256(salt.encode()).digest()
        for start in range(0, len(tokens) - size + 1, size):
            key = hashlib.sha256(key + array("q", tokens[start : start + size]).tobytes()).digest()
            yield key

    def _touch(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys`` are remembered, from the first on, all of which are used now."""
        self._clock += 1
        known = 0
        while known < len(keys) and (entry := self.entries.get(keys[known])) is not None:
            entry.used = self._clock
            known += 1
        return known

    def _insert(self, parent: bytes, key: bytes, blocks: Tensor) -> None:
        """The parent, where there is one, is there already."""
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
