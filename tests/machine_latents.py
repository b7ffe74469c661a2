"""Cases of the machine for PTX (see ``machine_cases.py``): attention over latents."""

import torch
from machine_call import Call, case
from paged_lists import make_lists


def _decode(lengths, heads, num_tokens, value_dim):
    from kvops.kernels.paged_latent_attention import paged_latent_attention as launch

    lists = make_lists(lengths, block_size=16, head_dim=value_dim + 64, dtype=torch.float16)
    q = torch.randn(len(lengths), num_tokens, heads, value_dim + 64).half()
    args = q, lists.k_cache, lists.block_tables, lists.seq_lens
    operator = torch.ops.kvops.paged_latent_attention
    return Call(launch, operator, args, {"value_dim": value_dim, "scale": 192**-0.5}, 1e-2)


@case
def paged_latents():
    """Rows of several tiles, and on Hopper the products of 64 rows."""
    return _decode([[40], [0], [33]], 20, 2, 64)


@case
def paged_latents_wide():
    return _decode([[90], [0], [33]], 16, 1, 512)
