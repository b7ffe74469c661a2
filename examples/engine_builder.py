"""The raw operators, as an engine calls them. The engine owns the blocks, the tables and the lengths.

    python examples/engine_builder.py

Two sequences of one layer are read, lose three quarters of their blocks (each head at its own rate), and decode on.
"""

import torch

import kvops

ops = torch.ops.kvops
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HEADS, KV_HEADS, D, SIZE, MAX_BLOCKS = 2, 8, 2, 64, 16, 32

# One pool of blocks for all heads of all sequences. A block holds 16 slots of one head.
blocks = BATCH * KV_HEADS * MAX_BLOCKS
k_cache, v_cache = (torch.zeros(blocks, SIZE, D, device=DEVICE) for _ in range(2))
positions = torch.zeros(blocks, SIZE, dtype=torch.int32, device=DEVICE)
scores = torch.zeros(blocks, SIZE, device=DEVICE)
free = torch.randperm(blocks).tolist()
tables = torch.zeros(BATCH, KV_HEADS, MAX_BLOCKS, dtype=torch.int32, device=DEVICE)
lens = torch.zeros(BATCH, KV_HEADS, dtype=torch.int32, device=DEVICE)


def grow(tokens: int) -> None:
    """Make room for the next tokens of every head: whole blocks, from the pool."""
    for b in range(BATCH):
        for head in range(KV_HEADS):
            used = int(lens[b, head])
            for place in range(-(-used // SIZE), -(-(used + tokens) // SIZE)):
                tables[b, head, place] = free.pop()
    lens.add_(tokens)


def attend(tokens: int, first_position: int) -> torch.Tensor:
    """Append new tokens and let them attend. The same pass records how much attention every slot receives."""
    q, k, v = (torch.randn(BATCH, tokens, heads, D, device=DEVICE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    k[:, : tokens // 8, 0] *= 4  # the first head looks at few keys
    grow(tokens)
    at = torch.arange(first_position, first_position + tokens, dtype=torch.int32, device=DEVICE).expand(BATCH, -1)
    ops.paged_append(k, v, k_cache, v_cache, tables, lens, positions=positions, token_positions=at, scores=scores)
    schedule = ops.paged_schedule(lens, SIZE)  # divides the slots evenly, whatever the lengths of the heads
    out, _ = ops.paged_attention(q, k_cache, v_cache, tables, lens, scores=scores, schedule=schedule)
    return out


attend(400, first_position=0)
before = blocks - len(free)

budget = torch.full((BATCH,), before // BATCH // 4, dtype=torch.int32, device=DEVICE)
_, keep = ops.select_blocks(
    scores, tables, lens, budget, positions=positions, protect_first=4, protect_last=32, scope="sequence"
)
old = lens.clone()
freed = ops.compact(k_cache, v_cache, tables, lens, keep, positions=positions, scores=scores)
for b, head in torch.cartesian_prod(torch.arange(BATCH), torch.arange(KV_HEADS)).tolist():
    end = -(-int(old[b, head]) // SIZE)  # the last blocks of a list come free
    free += tables[b, head, end - int(freed[b, head]) : end].tolist()

print(f"{kvops.backend(DEVICE)}: {before} blocks, {blocks - len(free)} after eviction; lengths {lens.tolist()}")
for step in range(8):
    out = attend(1, first_position=400 + step)
print(f"decoded 8 tokens from what was kept, output {list(out.shape)}; lengths {lens.tolist()}")
