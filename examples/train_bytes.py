"""Train a small byte-level decoder on Python's own manual, through kvops and through torch's attention.

    python examples/train_bytes.py --plot losses.png

Both start from the same weights and see the same bytes, so their losses may differ by rounding only. A third run in
float64 measures that rounding. If kvops is at most twice as far from float64 as torch in float32, plus one rounding,
then it is at most three times that distance from torch, plus one rounding. (On a CPU kvops uses torch's kernel where it
can; the losses are then often equal to the bit.)
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import kvops

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""q [B, T, Hq, D], k and v [B, T, Hkv, D], how many keys before its own a query sees (-1: all) -> [B, T, Hq, D]"""


def with_kvops(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    out, _ = kvops.flash_attention(q, k, v, causal=True, window_left=window)
    return out


def with_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    mask = None
    if window >= 0:  # torch has no windows: a mask over all pairs expresses it
        position = torch.arange(q.shape[1], device=q.device)
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance <= window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of [B, T, H, D]."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** -(torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None, None] * frequency
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * angle.cos() - right * angle.sin(), left * angle.sin() + right * angle.cos()], dim=-1)


class Block(nn.Module):
    def __init__(self, attend: Attention, width: int, heads: int, kv_heads: int, window: int) -> None:
        super().__init__()
        self.attend, self.window = attend, window
        self.heads, self.head_dim = [heads, kv_heads, kv_heads], width // heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        x = x + self.out(self.attend(rotate(q), rotate(k), v, self.window).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Bytes [B, T] -> logits [B, T, 256]. Every second layer sees ``window`` bytes back, the others all of them."""

    def __init__(self, attend: Attention, layers=3, width=128, heads=4, kv_heads=2, window=32) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        windows = [window if layer % 2 else -1 for layer in range(layers)]
        self.blocks = nn.Sequential(*(Block(attend, width, heads, kv_heads, window) for window in windows))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))))


def batches(batch: int, length: int, seed: int = 0) -> Iterator[Tensor]:
    """Random pieces [batch, length + 1] of the manual, int64."""
    text = torch.tensor(list("\n\n".join(topics[name] for name in sorted(topics)).encode()))
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(len(text) - length, (batch, 1), generator=generator)
        yield text[start + torch.arange(length + 1)]


def loss_of(model: Callable[[Tensor], Tensor], piece: Tensor) -> Tensor:
    """Mean cross entropy of each next byte, in nats."""
    return F.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten())


def train(model: Decoder, pieces: Iterator[Tensor], steps: int, compiled: bool = False, title: str = "") -> Tensor:
    """Losses, float64 [steps]."""
    forward = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in tqdm(range(steps), desc=title, unit="step", disable=None if title else True):
        loss = loss_of(forward, next(pieces).to(model.head.weight.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the curves into this file (needs matplotlib)")
    arguments = parser.parse_args()

    runs = {
        "kvops": (with_kvops, torch.float32),
        "torch": (with_sdpa, torch.float32),
        "torch in float64": (with_sdpa, torch.float64),
    }
    curves = {}
    for name, (attend, dtype) in runs.items():
        torch.manual_seed(0)
        model = Decoder(attend).to(arguments.device, dtype)
        curves[name] = train(model, batches(batch=4, length=128), arguments.steps, arguments.compile, title=name)

    ours, theirs, exact = curves.values()
    shown = range(arguments.steps - 1, -1, -max(1, arguments.steps // 10))[::-1]
    rows = [(step, *(f"{curve[step]:.6f}" for curve in curves.values())) for step in shown]
    print(tabulate(rows, headers=["step", *curves], disable_numparse=True, colalign=["right"] * 4))
    allowed = 3 * (theirs - exact).abs().max() + torch.finfo(torch.float32).eps * exact.max()
    difference = (ours - theirs).abs().max()
    if arguments.plot:
        import matplotlib.pyplot as plt

        for (name, curve), style in zip(curves.items(), ("-", "--", ":"), strict=True):
            plt.plot(curve, style, label=name)
        plt.legend(title="loss (nats per byte)")
        plt.xlabel("step")
        plt.savefig(arguments.plot)
    if not difference <= allowed:
        raise SystemExit(
            f"kvops and torch differ by {difference:.2e}, more than the {allowed:.2e} that rounding explains"
        )
    print(
        f"After {arguments.steps} steps the loss is {ours[-1]:.3f} nats per byte, down from {ours[0]:.3f}. kvops and "
        f"torch never differ by more than {difference:.2g}; rounding explains up to {allowed:.2g}."
    )


if __name__ == "__main__":
    main()
