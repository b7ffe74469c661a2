"""CPU kernels on several threads: the results are those of one, from any Python thread and after a fork."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from paged_lists import make_lists

import kvops

pytest.importorskip("numba")

from kvops.kernels.cpu import threads
from kvops.ops.registry import forget_launches


def call(lists, q):
    scores = lists.scores.clone()
    return (*kvops.paged_attention(q, *lists.arguments, scores=scores), scores)


@pytest.fixture
def problem():
    """Lists long enough for several threads."""
    lists = make_lists([[700, 33, 1500], [0, 900, 17]], block_size=16, head_dim=64)
    return lists, torch.randn(2, 2, 9, 64)


def assert_same_bits(results, others):
    for result, other in zip(results, others, strict=True):
        assert torch.equal(result.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))


def test_any_number_of_threads_gives_the_same_bits(problem, two_threads):
    expected = call(*problem)
    for count in (1, 3, 5):
        torch.set_num_threads(count)
        assert_same_bits(call(*problem), expected)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, 64), (torch.float32, 51), (torch.bfloat16, 129), (torch.float8_e4m3fn, 201)],
)
def test_a_cache_too_large_for_the_processors_gives_the_bits_of_its_sequences_alone(dtype, head_dim):
    """Its rows are touched before they are read."""
    lists = make_lists([[4001, 3003], [2999, 1517]], block_size=16, head_dim=head_dim, dtype=dtype)
    q = torch.randn(2, 1, 4, head_dim, dtype=torch.bfloat16 if dtype.itemsize < 4 else dtype)
    k_cache, v_cache, tables, lens = lists.arguments
    assert lens.sum() * 2 * head_dim * dtype.itemsize > 4 << 20
    together = kvops.paged_attention(q, *lists.arguments)
    alone = [kvops.paged_attention(q[b : b + 1], k_cache, v_cache, tables[b : b + 1], lens[b : b + 1]) for b in (0, 1)]
    assert_same_bits(together, [torch.cat(results) for results in zip(*alone, strict=True)])


def appended():
    lists = make_lists([[700, 33, 1500], [600, 900, 617]], block_size=16, head_dim=64)
    k, v = torch.randn(2, 2, 600, 3, 64)
    positions = torch.randint(9999, (2, 600), dtype=torch.int32)
    kvops.paged_append(
        k, v, *lists.arguments, positions=lists.positions, token_positions=positions, scores=lists.scores
    )
    return lists.k_cache, lists.v_cache, lists.positions, lists.scores


def evicted(scope="head"):
    lists = make_lists([[700, 33, 1500], [600, 900, 617]], block_size=16, head_dim=64)
    lens, tables = lists.seq_lens, lists.block_tables
    budget = torch.tensor([60, 41], dtype=torch.int32)
    new_lens, keep = kvops.select_blocks(lists.scores, tables, lens, budget, protect_last=9, scope=scope)
    freed = kvops.compact(*lists.arguments, keep, positions=lists.positions, scores=lists.scores)
    return new_lens, keep, freed, lens, lists.k_cache, lists.v_cache, lists.positions, lists.scores


def competed():
    return evicted("sequence")


def copied():
    k_cache, v_cache = torch.randn(2, 300, 16, 64)
    blocks = torch.randperm(300).int()
    kvops.copy_blocks(k_cache, v_cache, blocks[:150], blocks[150:])
    return k_cache, v_cache


def verified():
    logits, temperature = torch.randn(5, 4, 20_000) * 3, torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0])
    drafts, seed = logits[:, :3].argmax(-1), torch.arange(5)
    parents = torch.tensor([-1, 0, 0, 1], dtype=torch.int32).expand(5, 4)
    nodes = torch.cat((drafts[:, :1], drafts), 1)
    return (
        *kvops.verify_draft(logits, drafts, temperature=temperature, seed=seed),
        *kvops.verify_tree(logits, nodes, parents, temperature=temperature, seed=seed),
    )


def looked_up():
    return kvops.prompt_lookup(torch.randint(40, (9, 4000)), torch.arange(9) * 490, num_draft=6)


def scored():
    q, k = torch.randn(1, 150, 4, 32), torch.randn(1, 300, 2, 32)
    return (kvops.attention_scores(q, k, torch.rand(1, 4, 150) + 3, causal=True),)


def merged():
    out_a, out_b = torch.randn(2, 1, 300, 9, 64)
    return kvops.merge_attention(out_a, torch.randn(1, 9, 300), out_b, torch.randn(1, 9, 300))


@pytest.mark.parametrize("results", [appended, evicted, competed, copied, verified, looked_up, scored, merged])
def test_the_shares_of_several_threads_make_the_whole(results, two_threads, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    def run(threads, cpu):
        torch.set_num_threads(threads)
        monkeypatch.setenv("KVOPS_CPU", cpu)
        torch.manual_seed(0)
        return results()

    expected = run(1, "")
    for result, eager in zip(expected, run(1, "eager"), strict=True):
        torch.testing.assert_close(result, eager, rtol=1e-4, atol=1e-5, equal_nan=True)
    for count in (2, 5):
        assert_same_bits(run(count, ""), expected)


def test_threads_follow_torch(two_threads):
    assert threads.num_threads() == 2
    torch.set_num_threads(1)
    assert threads.num_threads() == 1


def test_a_kernel_that_fails_is_an_error(monkeypatch, problem):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("kvops.kernels.cpu.arguments.compiled", lambda *_: lambda *_: False)
    forget_launches()
    with pytest.raises(MemoryError, match="memory"):
        call(*problem)
    forget_launches()


def test_python_threads_may_call_at_once(problem, two_threads):
    expected, results = call(*problem), {}
    workers = [threading.Thread(target=lambda i=i: results.update({i: call(*problem)})) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for result in results.values():
        assert_same_bits(result, expected)


def test_a_forked_child_works_alone(problem, two_threads):
    """OpenMP's threads do not survive a fork; a region that waited for them would never end."""
    expected = call(*problem)
    child = os.fork()
    if child == 0:
        same = threads.num_threads() == 1 and torch.equal(call(*problem)[1], expected[1])
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_are_those_of_torchs_own_library(two_threads):
    for count in (2, 5):
        torch.set_num_threads(count)
        assert threads._LIBRARY.omp_get_max_threads() == count


_NO_LIBRARY = """
import ctypes, os
import numba, torch, kvops

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "GOMP_parallel":
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library
del os.register_at_fork  # as on Windows
from kvops.kernels.cpu import threads
assert not threads.has_pool() and threads.num_threads() == 1
assert kvops.backend("cpu") == "numba"
lens = torch.tensor([[700], [33]], dtype=torch.int32)
tables = torch.arange(88, dtype=torch.int32).view(2, 1, 44)
arguments = torch.randn(2, 1, 1, 64), *torch.randn(2, 88, 16, 64), tables, lens
compiled = kvops.paged_attention(*arguments)
os.environ["KVOPS_CPU"] = "eager"
torch.testing.assert_close(compiled, kvops.paged_attention(*arguments))
"""


def test_one_thread_does_all_where_torchs_library_is_not_found():
    environment = os.environ | {"TRITON_INTERPRET": "0", "KVOPS_CPU": ""}
    subprocess.run([sys.executable, "-c", _NO_LIBRARY], check=True, env=environment)
