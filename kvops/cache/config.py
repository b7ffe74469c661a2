"""The sizes of a paged cache, its dtype and its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvops import checks

_DTYPES = (*checks.FLOAT_DTYPES, *checks.QUANTISED_DTYPES)


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
    v_dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        for name in _SIZES:
            checks.expect_int(name, getattr(self, name), 1)
        for name in ("dtype", "v_dtype"):
            dtype = getattr(self, name)
            if dtype not in _DTYPES:
                raise TypeError(f"{name}: expected one of {', '.join(map(str, _DTYPES))}, got {checks.shown(dtype)}")
        if self.dtype != self.v_dtype and not {self.dtype, self.v_dtype} & set(checks.QUANTISED_DTYPES):
            raise TypeError(
                f"v_dtype: expected that of the keys, {self.dtype}, or one of float8 and int8 on at least one side, "
                f"got {self.v_dtype}"
            )
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
