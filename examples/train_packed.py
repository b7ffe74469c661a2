"""Train on packed documents of any length: no padding, no attention across documents, sliding windows.

    python examples/train_packed.py
    python examples/train_packed.py --tokens 16384 --window 1024

The documents are the pages of Python's own manual, as bytes. A batch is one row of tokens: documents one after the
other, with their ends in ``offsets``. Positions start again in each document. Every second layer sees a window, the
others the whole document. Activations are recomputed in the backward pass, so memory grows with the length of a batch
and hardly with the number of layers.
"""

import argparse
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kvops


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of [T, H, D] at ``positions`` int64 [T]."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** -(torch.arange(half, device=x.device) / half)
    angle = positions[:, None, None] * frequency
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()], dim=-1)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, window: int) -> None:
        super().__init__()
        self.window, self.heads, self.head_dim = window, [heads, kv_heads, kv_heads], width // heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, positions: Tensor, offsets: Tensor, longest: int) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=1)
        q, k = rotate(q, positions), rotate(k, positions)
        lengths = offsets, offsets, longest, longest
        out, _ = kvops.flash_attention_varlen(q, k, v, *lengths, causal=True, window_left=self.window)
        x = x + self.out(out.flatten(1))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self, window: int, layers: int = 4, width: int = 128, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        windows = [window if layer % 2 else -1 for layer in range(layers)]
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, window) for window in windows)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        """Bytes int64 [T] of documents that end at ``offsets`` int32 [B + 1], a 0 first -> logits [T, 256]."""
        lengths = offsets.diff()
        starts = torch.repeat_interleave(offsets[:-1], lengths, output_size=len(tokens))
        positions = torch.arange(len(tokens), device=tokens.device) - starts
        x, longest = self.embed(tokens), int(lengths.max())
        for layer in self.layers:
            x = checkpoint(layer, x, positions, offsets, longest, use_reentrant=False)
        return self.head(self.norm(x))


def losses_of(model: Decoder, tokens: Tensor, offsets: Tensor) -> Tensor:
    """Cross entropy of each next byte within its document, in nats: float32, one fewer than bytes in each document."""
    last = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    last[offsets[1:].long() - 1] = True  # the next byte belongs to another document
    losses = F.cross_entropy(model(tokens, offsets), tokens.roll(-1), reduction="none")
    return losses[~last]


def batches(tokens: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Random pages of the manual, packed until they have ``tokens`` bytes; the last one is cut."""
    pages = [torch.tensor(list(topics[name].encode())) for name in sorted(topics)]
    generator = torch.Generator().manual_seed(seed)
    while True:
        packed, left = [], tokens
        while left:
            page = pages[int(torch.randint(len(pages), (), generator=generator))][:left]
            packed.append(page)
            left -= len(page)
        lengths = torch.tensor([0, *map(len, packed)])
        yield torch.cat(packed), lengths.cumsum(0).to(torch.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch, and at most in a document")
    parser.add_argument("--window", type=int, default=256, help="how far back every second layer sees")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = Decoder(arguments.window).to(arguments.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    source = batches(arguments.tokens)
    for step in range(arguments.steps):
        tokens, offsets = (tensor.to(arguments.device) for tensor in next(source))
        loss = losses_of(model, tokens, offsets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step + 1 == arguments.steps:
            print(f"step {step}: documents {len(offsets) - 1}, loss {loss.item():.3f} nats a byte")

    # Packed documents do not see each other: each has the losses that it has alone.
    tokens, offsets = (tensor.to(arguments.device) for tensor in next(source))
    with torch.no_grad():
        packed = losses_of(model, tokens, offsets)
        alone = [
            losses_of(model, tokens[start:end], torch.tensor([0, end - start], dtype=torch.int32, device=tokens.device))
            for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    print(f"The losses are the same packed and alone; documents compared: {len(alone)}")


if __name__ == "__main__":
    main()
