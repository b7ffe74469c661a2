"""The sizes of a paged cache, its dtype and its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvops import checks

_DTYPES = (*checks.FLOAT_DTYPES, torch.float8_e4m3fn)


@dataclass(frozen=True)
class CacheConfig:
    """The sizes of a :class:`kvops.PagedKVCache`, checked; its docstring describes them."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    num_blocks: int
    max_batch: int
    max_tokens: int
    block_size: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        for name in _SIZES:
            checks.expect_int(name, getattr(self, name), 1)
        if self.dtype not in _DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {checks.shown(self.dtype)}")
        if self.num_blocks >= 2**31:
            raise ValueError(f"num_blocks: expected less than 2**31 (tables are int32), got {self.num_blocks}")
        device = torch.device(self.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        object.__setattr__(self, "device", device)

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest possible list, which is the width of the block tables."""
        return -(-self.max_tokens // self.block_size)

    @property
    def lists(self) -> tuple[int, int, int]:
        """The shape ``[layers, rows, heads]`` of arrays with one entry for each list."""
        return self.num_layers, self.max_batch, self.num_kv_heads

    @property
    def lists_per_row(self) -> int:
        return self.num_layers * self.num_kv_heads


_SIZES = ("num_layers", "num_kv_heads", "head_dim", "v_head_dim", "num_blocks", "max_batch", "max_tokens", "block_size")
