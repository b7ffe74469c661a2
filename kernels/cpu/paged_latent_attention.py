"""Attention over a paged cache of latents on the CPU: a tile of slots is in the caches of the processor when it is read
as values, after it came from memory as keys."""

from collections.abc import Callable
from typing import Any

import torch

from kvops.kernels.cpu.paged_attention import paged_attention
from kvops.prepared import prepared

Results = tuple[torch.Tensor, torch.Tensor]


def _prepare(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    value_dim: int,
    cache_scale: torch.Tensor | None = None,
    **options: Any,
) -> Callable[..., Results]:
    launch: Callable[..., Results] = paged_attention.prepare(  # type: ignore[attr-defined]
        q, cache, cache[..., :value_dim], block_tables, seq_lens, k_scale=cache_scale, v_scale=cache_scale, **options
    )
    return launch


@prepared(_prepare)
def paged_latent_attention(
    attend: Callable[..., Results],
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    value_dim: int,
    cache_scale: torch.Tensor | None = None,
    **options: Any,
) -> Results:
    """See :func:`kvops.paged_latent_attention`."""
    options |= {"k_scale": cache_scale, "v_scale": cache_scale}
    return attend(q, cache, cache[..., :value_dim], block_tables, seq_lens, **options)
