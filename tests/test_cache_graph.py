"""A whole step of the cache (append, attention with scores, verification, rollback, eviction) is what a CUDA graph can
repeat: it waits for nothing, and what it launches and allocates does not depend on lengths."""

import pytest
import torch
from cache_helpers import HEADS, LAYERS, SIZE, feed, make_cache
from no_sync import no_synchronisation

import kvops

GROUP, DRAFTS, DIM, VOCABULARY, ROWS = 2, 2, 3, 7, 3
BUDGET = 3 * LAYERS * HEADS


class Step:
    """One step of ``cache`` on inputs at fixed addresses, as in a graph; each row has as many drafts as it likes."""

    def __init__(self, cache, *, tree=False):
        device = cache.device
        self.cache, self.tree = cache, tree
        T = DRAFTS + 1
        self.k = torch.empty(LAYERS, ROWS, T, HEADS, DIM, device=device)
        self.v = torch.empty(LAYERS, ROWS, T, HEADS, 2, device=device)
        self.q = torch.empty(LAYERS, ROWS, T, HEADS * GROUP, DIM, device=device)
        self.logits = torch.empty(ROWS, T, VOCABULARY, device=device)
        self.drafts = torch.empty(ROWS, DRAFTS, dtype=torch.int64, device=device)
        self.q_lens = torch.empty(ROWS, dtype=torch.int32, device=device)
        self.keep = torch.empty(ROWS, T, dtype=torch.bool, device=device)
        self.mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()

    def draw(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for side in (self.k, self.v, self.q, self.logits):
            side.copy_(torch.randn(side.shape, generator=generator))
        # Half of the drafts are what the target says.
        best = self.logits[:, :-1].argmax(-1).cpu()
        other = torch.randint(0, VOCABULARY, best.shape, generator=generator)
        self.drafts.copy_(torch.where(torch.rand(best.shape, generator=generator) < 0.5, best, other))
        self.q_lens.copy_(torch.randint(1, DRAFTS + 2, (ROWS,), generator=generator))
        self.q_lens[-1] = 0  # a row that pads the batch
        self.keep.copy_(torch.rand(self.keep.shape, generator=generator) < 0.7)

    def run(self):
        cache, q_lens = self.cache, self.q_lens
        positions = cache.extend(DRAFTS + 1, q_lens=q_lens)
        outs = []
        for layer in range(LAYERS):
            cache.append(layer, self.k[layer], self.v[layer], positions, q_lens=q_lens)
            mask = self.mask if self.tree else None
            outs.append(cache.attend(layer, self.q[layer], q_lens=q_lens, tree_mask=mask, accumulate="sum", decay=0.5))
        if self.tree:
            cache.retain(self.keep, q_lens=q_lens)
        else:
            lens = (q_lens - 1).clamp(min=0)
            _, accepted = kvops.verify_draft(self.logits, self.drafts, draft_lens=lens)
            cache.rollback((q_lens - 1 - accepted).clamp(min=0))
        cache.evict(BUDGET, protect_first=1, protect_last=2)
        return torch.stack(outs)


def prompted(device, lengths=(19, 6, 0)):
    cache = make_cache(device)
    feed(cache, max(lengths), q_lens=lengths)
    return cache


def contents(cache):
    places = [(a, b, c) for a in range(LAYERS) for b in range(ROWS) for c in range(HEADS)]
    return [[side.tolist() for side in cache.gather(*place)] for place in places]


@pytest.mark.parametrize("tree", [False, True])
def test_a_step_neither_waits_nor_depends_on_lengths(device, monkeypatch, tree):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    traces, steps = (
        [],
        [
            (Step(prompted(device, lengths), tree=tree), seed)
            for seed, lengths in enumerate([(19, 6, 0), (1, 25, 0), (4, 4, 4)])
        ],
    )
    for step, seed in steps:
        step.draw(seed)
        pool = step.cache._pool
        pool.exact = False
        # As while a graph is captured: the host's part is done before.
        step.cache.prepare(DRAFTS + 1, evicts=True)
        with monkeypatch.context() as patch, no_synchronisation(run_kernels=False) as trace:
            patch.setattr(pool, "capturing", lambda: True)
            step.run()
        traces.append(trace)
    kernels = {kernel for kernel, *_ in traces[0].launches}
    assert {"paged_append_kernel", "paged_attention_kernel", "paged_schedule_kernel", "move_slots_kernel"} <= kernels
    assert traces[0].launches == traces[1].launches == traces[2].launches
    assert traces[0].allocations == traces[1].allocations == traces[2].allocations


def test_a_captured_step_does_what_a_step_does(device, monkeypatch):
    """The same five steps, once as a graph would take them and once with a host that looks at every number."""
    watched, plain = Step(prompted(device)), Step(prompted(device))
    watched.cache._pool.exact = False
    for seed in range(5):
        outs = []
        for step in (watched, plain):
            step.draw(seed)
            with monkeypatch.context() as patch:
                if step is watched:
                    step.cache.prepare(DRAFTS + 1, evicts=True)
                    patch.setattr(step.cache._pool, "capturing", lambda: True)
                outs.append(step.run())
        assert torch.equal(*outs)
        assert contents(watched.cache) == contents(plain.cache)
    cache = watched.cache
    assert cache.seq_lens[:, 2].count_nonzero() == 0  # the row that pads the batch
    assert ((cache.seq_lens[:, :2] + SIZE - 1) // SIZE).sum((0, 2)).max() <= BUDGET
    assert cache.compressed == [True, True, True]
    cache.free()
    assert cache.stats().blocks_in_use == 0


def test_rows_that_share_are_prepared_for_a_graph_that_evicts(device, monkeypatch):
    cache = prompted(device, (19, 0, 0))
    cache.remember(0, range(19))
    cache.fork(0, [1, 2])
    before = contents(cache)
    cache.prepare(DRAFTS + 1, rows=slice(0, 1), evicts=True)
    assert contents(cache) == before
    monkeypatch.setattr(cache._pool, "capturing", lambda: True)
    cache.evict(BUDGET, rows=slice(0, 1))
    monkeypatch.undo()
    after = contents(cache)
    assert [lists for i, lists in enumerate(after) if i // HEADS % ROWS] == [
        lists for i, lists in enumerate(before) if i // HEADS % ROWS
    ]
    assert cache.compressed == [True, False, False]
    assert cache.recall(0, range(19)) == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tree", [False, True])
def test_a_step_in_one_cuda_graph_is_replayed_with_changing_lengths(tree):
    replayed, plain = (Step(prompted("cuda"), tree=tree) for _ in range(2))
    for step in (replayed, plain):  # compiles what the graph launches
        step.draw(99)
        step.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = replayed.run()
    for seed in range(20):
        for step in (replayed, plain):
            step.draw(seed)
        replayed.cache.prepare(DRAFTS + 1, evicts=True)
        graph.replay()
        assert torch.equal(captured, plain.run())
        assert contents(replayed.cache) == contents(plain.cache)
    replayed.cache.free()
    assert replayed.cache.stats().blocks_in_use == 0
