"""A serving loop of your own on the raw operators: requests join a batch, are compressed, decode and leave.

    python examples/engine_builder.py

The engine owns the blocks, the tables and the lengths. Every head of every request has a list of blocks of its own.
After a prompt is read, three quarters of its blocks are evicted: the heads compete for the rest and end with different
lengths. The blocks that come free let the next request in.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kvops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KV_HEADS, D, SIZE = 8, 2, 64, 16  # query heads, KV heads, head size, slots in a block
ROWS, MAX_BLOCKS, POOL = 4, 32, 90  # requests at once, blocks that a list can have, blocks of all lists together


def blocks_of(tokens: int) -> int:
    return -(-tokens // SIZE)


@dataclass
class Request:
    prompt: list[int]
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)


class Model:
    """One attention layer with random weights: put yours here."""

    def __init__(self, vocab: int = 256, width: int = 128) -> None:
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(DEVICE)

        self.embedding, self.head = weight(vocab, width) * width**0.5, weight(vocab, HEADS * D)
        self.q, self.k, self.v = (weight(heads * D, width) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.bias = 4 * weight(D) * D**0.5  # the queries of the first KV head agree on the few keys that matter

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64 [B, T] -> q [B, T, HEADS, D], k and v [B, T, KV_HEADS, D]."""
        x = self.embedding[tokens]
        q, k, v = ((x @ weight.T).unflatten(-1, (-1, D)) for weight in (self.q, self.k, self.v))
        q[:, :, : HEADS // KV_HEADS] += self.bias
        return q, k, v

    def next_tokens(self, out: Tensor) -> Tensor:
        """out [B, T, HEADS, D] -> the most likely token after the last, int64 [B]."""
        return (out[:, -1].flatten(1) @ self.head.T).argmax(-1)


class Engine:
    def __init__(self, model: Model, ratio: int = 4, log: Callable[[str], None] = print) -> None:
        self.model, self.ratio, self.log = model, ratio, log
        self.k_cache, self.v_cache = torch.zeros(2, POOL, SIZE, D, device=DEVICE)
        self.positions = torch.zeros(POOL, SIZE, dtype=torch.int32, device=DEVICE)
        self.scores = torch.zeros(POOL, SIZE, device=DEVICE)
        self.tables = torch.zeros(ROWS, KV_HEADS, MAX_BLOCKS, dtype=torch.int32, device=DEVICE)
        self.lens = torch.zeros(ROWS, KV_HEADS, dtype=torch.int32, device=DEVICE)
        self.next_position = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)
        self.free = list(range(POOL))
        self.running: dict[int, Request] = {}

    def admit(self, request: Request) -> bool:
        """Read a prompt and compress it, if a row is free and the pool has room until every request has ended."""
        rows = [row for row in range(ROWS) if row not in self.running]
        growth = sum(blocks_of(other.max_new_tokens - len(other.tokens)) for other in self.running.values())
        needed = blocks_of(len(request.prompt)) + blocks_of(request.max_new_tokens) + growth
        if not rows or KV_HEADS * needed > len(self.free):
            return False
        row = rows[0]
        before = len(self.free)
        self.running[row] = request
        prompt = torch.tensor([request.prompt], device=DEVICE)
        request.tokens += self.attend(slice(row, row + 1), prompt).tolist()
        read = before - len(self.free)
        self.compress(slice(row, row + 1))
        kept, lengths = before - len(self.free), self.lens[row].tolist()
        self.log(f"row {row}: a prompt took {read} blocks, {kept} are kept; its heads keep {lengths} slots")
        self.leave_if_done(row)
        return True

    def step(self) -> None:
        """One token for every running request. Rows without a request take part with no token."""
        last = [self.running[row].tokens[-1] if row in self.running else 0 for row in range(ROWS)]
        q_lens = torch.tensor([int(row in self.running) for row in range(ROWS)], dtype=torch.int32, device=DEVICE)
        tokens = self.attend(slice(None), torch.tensor(last, device=DEVICE)[:, None], q_lens).tolist()
        for row in list(self.running):
            self.running[row].tokens.append(tokens[row])
            self.leave_if_done(row)

    def attend(self, rows: slice, tokens: Tensor, q_lens: Tensor | None = None) -> Tensor:
        """Append ``tokens`` int64 [B, T], of which ``q_lens`` [B] are real, and return the next token of each row."""
        count = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int32, device=DEVICE)
        count = count if q_lens is None else q_lens
        self.grow(rows, count)
        positions = self.next_position[rows, None] + torch.arange(tokens.shape[1], device=DEVICE, dtype=torch.int32)
        self.next_position[rows] += count
        q, k, v = self.model.project(tokens)
        lists = self.tables[rows], self.lens[rows]
        kvops.paged_append(
            *(k, v, self.k_cache, self.v_cache, *lists),
            q_lens=q_lens,
            positions=self.positions,
            token_positions=positions,
            scores=self.scores,
        )
        # A model of several layers makes the schedule once and passes it to each of them.
        schedule = kvops.paged_schedule(self.lens[rows], SIZE)
        out, _ = kvops.paged_attention(
            *(q, self.k_cache, self.v_cache, *lists), q_lens=q_lens, scores=self.scores, schedule=schedule
        )
        return self.model.next_tokens(out)

    def grow(self, rows: slice, count: Tensor) -> None:
        """Lengthen every list of the rows by ``count`` [B] slots, with blocks from the pool where they are needed."""
        lens = self.lens[rows]
        for b, tokens in enumerate(count.tolist()):
            for head in range(KV_HEADS):
                used = int(lens[b, head])
                for place in range(blocks_of(used), blocks_of(used + tokens)):
                    self.tables[rows][b, head, place] = self.free.pop()
        lens += count[:, None]

    def compress(self, rows: slice) -> None:
        """Keep the slots that received most attention, within a quarter of the blocks."""
        lists = self.tables[rows], self.lens[rows]
        old = self.lens[rows].clone()
        budget = torch.tensor([sum(map(blocks_of, row)) // self.ratio for row in old.tolist()], dtype=torch.int32)
        _, keep = kvops.select_blocks(
            self.scores,
            *lists,
            budget.to(DEVICE),
            positions=self.positions,
            protect_first=4,
            protect_last=16,
            scope="sequence",
        )
        freed = kvops.compact(
            self.k_cache, self.v_cache, *lists, keep, positions=self.positions, scores=self.scores
        )  # moves what is kept and shortens self.lens
        self.give_back(rows, old, freed)

    def give_back(self, rows: slice, lens: Tensor, freed: Tensor) -> None:
        """Return the last ``freed`` [B, KV_HEADS] blocks of lists of ``lens`` slots to the pool."""
        for b, row in enumerate(self.tables[rows].tolist()):
            for head, blocks in enumerate(row):
                end = blocks_of(int(lens[b, head]))
                self.free += blocks[end - int(freed[b, head]) : end]

    def leave_if_done(self, row: int) -> None:
        request = self.running[row]
        if len(request.tokens) == request.max_new_tokens:
            del self.running[row]
            rows = slice(row, row + 1)
            self.give_back(rows, self.lens[rows], (self.lens[rows] + SIZE - 1) // SIZE)
            self.lens[row], self.next_position[row] = 0, 0


def serve(engine: Engine, requests: list[Request]) -> None:
    waiting = deque(requests)
    while waiting or engine.running:
        while waiting and engine.admit(waiting[0]):
            waiting.popleft()
        engine.step()


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(400, 20), (120, 6), (300, 30), (33, 12), (250, 1), (380, 9), (64, 25)]
    return [Request(torch.randint(256, (prompt,), generator=generator).tolist(), new) for prompt, new in sizes]


def main() -> None:
    model, together = Model(), requests()
    engine = Engine(model)
    serve(engine, together)
    print(f"{kvops.backend(DEVICE)}: {sum(len(request.tokens) for request in together)} tokens generated")
    assert sorted(engine.free) == list(range(POOL)), "all blocks are back in the pool"
    for request, alone in zip(together, requests(), strict=True):
        serve(Engine(model, log=lambda line: None), [alone])
        assert alone.tokens == request.tokens, "a request gets the same tokens alone"


if __name__ == "__main__":
    with torch.no_grad():
        main()
