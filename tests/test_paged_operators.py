"""The paged operators as operators: appending, contracts, tracing and bad input."""

import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from paged_lists import POISON_BLOCK, QUANTISED, make_lists, quantise

import kvops

NUMBA = True


def empty_lists(lengths, *, block_size=8, head_dim=32, value_dim=24, dtype=torch.float32, device="cpu"):
    """Lists with room, and caches whose every slot is NaN."""
    lists = make_lists(lengths, block_size=block_size, head_dim=head_dim, value_dim=value_dim, device=device)
    k_cache, v_cache = torch.full_like(lists.k_cache, math.nan), torch.full_like(lists.v_cache, math.nan)
    return k_cache.to(dtype), v_cache.to(dtype), lists


def expected_append(cache, values, lists, counts):
    """The cache after each list's last slots took the tokens, one slot at a time."""
    cache = cache.clone()
    for b, count in enumerate(counts):
        for h in range(lists.seq_lens.shape[1]):
            block, offset = lists.slots(b, h)
            for t in range(count):
                slot = len(block) - count + t
                if slot >= 0:
                    cache[block[slot], offset[slot]] = values[b, t, h]
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ragged", [False, True])
def test_append_writes_the_last_slots_and_nothing_else(backend, device, dtype, ragged):
    k_cache, v_cache, lists = empty_lists([[20, 3, 8], [9, 16, 0], [7, 7, 1]], dtype=dtype, device=device)
    k, v = torch.randn(3, 3, 3, 32).to(dtype).to(device), torch.randn(3, 3, 3, 24).to(dtype).to(device)
    counts = [3, 1, 0] if ragged else [3, 3, 3]
    token_positions = torch.randint(0, 1000, (3, 3), dtype=torch.int32, device=device)
    positions, scores = lists.positions.clone(), torch.ones_like(lists.scores)
    wanted = (
        expected_append(k_cache, k, lists, counts),
        expected_append(v_cache, v, lists, counts),
        expected_append(positions, token_positions[:, :, None].expand(3, 3, 3), lists, counts),
        expected_append(scores, torch.zeros(3, 3, 3, device=device), lists, counts),
    )
    kvops.paged_append(
        k, v, k_cache, v_cache, lists.block_tables, lists.seq_lens,
        q_lens=torch.tensor(counts, dtype=torch.int32, device=device) if ragged else None,
        positions=positions, token_positions=token_positions, scores=scores,
    )  # fmt: skip
    for got, want in zip((k_cache, v_cache, positions, scores), wanted, strict=True):
        assert torch.equal(got.double().nan_to_num(-7.0), want.double().nan_to_num(-7.0))


def test_append_one_token(backend, device):
    k_cache, v_cache, lists = empty_lists([[20, 3, 8]], device=device)
    k, v = torch.randn(1, 1, 3, 32, device=device), torch.randn(1, 1, 3, 24, device=device)
    wanted = expected_append(k_cache, k, lists, [1])
    kvops.paged_append(k, v, k_cache, v_cache, lists.block_tables, lists.seq_lens)
    assert torch.equal(k_cache.nan_to_num(-7.0), wanted.nan_to_num(-7.0))


@pytest.mark.parametrize("contiguous", [True, False])
def test_append_to_a_uniform_cache(backend, device, contiguous):
    block_size, Hkv = 4, 3
    shape = (6, block_size, Hkv, 16) if contiguous else (6, Hkv, block_size, 16)
    k_cache, v_cache = torch.zeros(2, *shape, device=device)
    positions = torch.full((6, block_size), -1, dtype=torch.int32, device=device)
    scores = torch.ones(shape[:3], device=device)
    if not contiguous:
        k_cache, v_cache, scores = k_cache.transpose(1, 2), v_cache.transpose(1, 2), scores.transpose(1, 2)
    tables = torch.tensor([[5, 0, POISON_BLOCK], [3, POISON_BLOCK, POISON_BLOCK]], dtype=torch.int32, device=device)
    lens = torch.tensor([6, 2], dtype=torch.int32, device=device)
    k, v = torch.randn(2, 2, 2, Hkv, 16, device=device)
    token_positions = torch.tensor([[10, 11], [20, 21]], dtype=torch.int32, device=device)
    kvops.paged_append(
        k, v, k_cache, v_cache, tables, lens, positions=positions, token_positions=token_positions, scores=scores
    )
    wanted_k, wanted_scores, wanted_positions = torch.zeros_like(k_cache), torch.ones_like(scores), positions.clone()
    for b, t, block, offset in ((0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 3, 0), (1, 1, 3, 1)):
        wanted_k[block, offset], wanted_scores[block, offset] = k[b, t], 0.0
        wanted_positions[block, offset] = token_positions[b, t]
    assert torch.equal(k_cache, wanted_k)
    assert torch.equal(scores, wanted_scores)
    assert (positions >= 0).sum() == 4
    assert torch.equal(positions, wanted_positions)
    assert v_cache[5].abs().sum() == 0
    assert torch.equal(v_cache[3, :2], v[1])


@pytest.mark.parametrize("dtype", QUANTISED)
def test_append_rounds_to_nearest_even(backend, device, dtype):
    """Every number of the cache's dtype, every midpoint between two of them, their neighbours, what lies beyond the
    largest, and NaN."""
    numbers = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    middles = (numbers[1:] + numbers[:-1]) / 2
    largest = numbers[-1]
    values = torch.cat([numbers, middles, largest + torch.tensor([0.4, 0.5, 1.0]), torch.tensor([6e4, 1e6, math.inf])])
    values = torch.cat([values, torch.nextafter(middles, middles + 1), torch.nextafter(middles, middles - 1)])
    values = torch.cat([values, torch.tensor([2e-4, 1e-6, 1e-40]), -values, torch.tensor([math.nan])])
    values = torch.cat([values, torch.zeros(-len(values) % 16)]).view(-1, 16).to(device)  # [T, 16]
    T = len(values)
    cache = torch.zeros(-(-T // 8), 8, 16, device=device).to(dtype)
    v_cache = cache.clone()
    tables = torch.arange(cache.shape[0], dtype=torch.int32, device=device)[None, None]
    lens = torch.tensor([[T]], dtype=torch.int32, device=device)
    new = values[None, :, None]
    kvops.paged_append(new, 2 * new, cache, v_cache, tables, lens, v_scale=2.0)
    wanted = quantise(values.cpu(), dtype)
    for got in (cache, v_cache):
        assert torch.equal(got.flatten(0, 1)[:T].cpu().view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("k_dtype", "v_dtype"), list(product((*QUANTISED, None), repeat=2)))
def test_append_stores_each_side_in_its_own_dtype(backend, device, k_dtype, v_dtype):
    """Each with its own scale; None: the dtype of the new tokens."""
    lists = make_lists([[20, 3, 8], [9, 16, 5]], block_size=8, head_dim=32, value_dim=24, device=device)
    k = 8 * torch.randn(2, 2, 3, 32, device=device)
    v = 8 * torch.randn(2, 2, 3, 24, device=device)
    sides, scales = [], {}
    for name, cache, dtype, by_head in (
        ("k_scale", lists.k_cache, k_dtype, torch.tensor([0.25, 0.5, 2.0], device=device)),
        ("v_scale", lists.v_cache, v_dtype, torch.tensor([1.0, 4.0, 0.125], device=device)),
    ):
        sides.append(torch.zeros(cache.shape, device=device).to(dtype or torch.float32))
        if dtype is not None:
            scales[name] = by_head
    kvops.paged_append(k, v, *sides, lists.block_tables, lists.seq_lens, **scales)
    for side, new, scale in zip(sides, (k, v), ("k_scale", "v_scale"), strict=True):
        wanted = torch.zeros(side.shape).to(side.dtype).float()
        for b, h in product(range(2), range(3)):
            block, offset = (x[-2:] for x in lists.slots(b, h))
            divided = new[b, :, h] / (scales[scale][h] if scale in scales else 1.0)
            wanted[block, offset] = quantise(divided.cpu(), side.dtype).float()
        assert torch.equal(side.cpu().float(), wanted)


def test_what_was_appended_is_attended_to(backend, device):
    """Prefill in chunks and decode one by one: the same keys, in the same order, as dense attention."""
    B, Hkv, T = 2, 2, 13
    k, v = torch.randn(2, B, T, Hkv, 32, device=device)
    q = torch.randn(B, T, 4, 32, device=device)
    k_cache, v_cache = torch.full((2, 20, 4, 32), math.nan, device=device)
    tables = torch.randperm(20, device=device)[: B * Hkv * 4].view(B, Hkv, 4).int()
    rows, done = [], 0
    for count in (6, 1, 1, 5):
        step = slice(done, done + count)
        done += count
        lens = torch.full((B, Hkv), done, dtype=torch.int32, device=device)
        kvops.paged_append(k[:, step], v[:, step], k_cache, v_cache, tables, lens)
        rows.append(kvops.paged_attention(q[:, step], k_cache, v_cache, tables, lens)[0])
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(torch.cat(rows, 1), dense.transpose(1, 2))


def attention_inputs(device="cpu", **changes):
    lists = make_lists([[20, 3, 8], [9, 16, 0]], block_size=8, head_dim=32, value_dim=24, device=device)
    inputs = {
        "q": torch.randn(2, 2, 6, 32, device=device),
        "k_cache": lists.k_cache,
        "v_cache": lists.v_cache,
        "block_tables": lists.block_tables,
        "seq_lens": lists.seq_lens,
    }
    return {**inputs, **changes}


def append_inputs(device="cpu", **changes):
    inputs = attention_inputs(device)
    del inputs["q"]
    new = torch.randn(2, 2, 3, 32, device=device)
    return {"k": new, "v": new[..., :24].contiguous(), **inputs, **changes}


def test_opcheck(backend, device):
    lists = make_lists([[20, 3, 8], [9, 16, 0]], block_size=8, head_dim=32, device=device)
    # opcheck compares whole caches, in which a NaN would equal nothing.
    clean = {"k_cache": lists.k_cache.nan_to_num(0.0), "v_cache": lists.v_cache.nan_to_num(0.0)}
    # Two lists that write to one block would race.
    block_tables = lists.block_tables.where(lists.block_tables != POISON_BLOCK, 0)
    tables = {"block_tables": block_tables, "seq_lens": lists.seq_lens}
    q = torch.randn(2, 2, 6, 32, device=device)
    places = torch.arange(4, dtype=torch.int32, device=device).view(2, 2)
    tests = ("test_schema", "test_faketensor")
    if backend == "eager" or device.type == "cuda":  # tracing is the same for both, and the interpreter is slow
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.kvops.paged_schedule.default, (lists.seq_lens, 8), test_utils=tests)
    torch.library.opcheck(
        torch.ops.kvops.paged_attention.default,
        (q, *clean.values(), *tables.values()),
        {"scores": lists.scores.nan_to_num(0.0), "q_lens": torch.tensor([2, 1], dtype=torch.int32, device=device)},
        test_utils=tests,
    )
    new = torch.randn(2, 2, 3, 32, device=device)
    torch.library.opcheck(
        torch.ops.kvops.paged_append.default,
        (new, new, *clean.values(), *tables.values()),
        {"positions": lists.positions, "token_positions": places, "scores": lists.scores.nan_to_num(0.0)},
        test_utils=tests,
    )


@pytest.mark.parametrize("sides", [(torch.int8, torch.float32), (torch.float32, torch.int8)])
def test_opcheck_of_sides_in_different_dtypes(backend, device, sides):
    lists = make_lists([[20, 3, 8], [9, 16, 4]], block_size=8, head_dim=32, device=device)
    caches = [torch.randint(-9, 9, lists.k_cache.shape, device=device).to(dtype) for dtype in sides]
    tables = lists.block_tables.where(lists.block_tables != POISON_BLOCK, 0), lists.seq_lens
    scales = {name: torch.rand(3, device=device) for name, side in zip("kv", sides, strict=True) if side == torch.int8}
    scales = {f"{name}_scale": scale for name, scale in scales.items()}
    q, new = torch.randn(2, 2, 6, 32, device=device), torch.randn(2, 2, 3, 32, device=device)
    tests = ("test_schema", "test_faketensor")
    for op, args in (
        (torch.ops.kvops.paged_attention.default, (q, *caches, *tables)),
        (torch.ops.kvops.paged_append.default, (new, new, *caches, *tables)),
    ):
        torch.library.opcheck(op, args, scales, test_utils=tests)


def test_autocast_computes_in_the_dtype_of_a_side_that_is_not_quantised(device):
    lists = make_lists([[20, 3]], block_size=8, head_dim=32, device=device)
    of_bytes = lists.k_cache.nan_to_num(0.0).to(torch.int8)
    q = torch.randn(1, 2, 4, 32, device=device).half()
    for sides, dtype in (
        ((of_bytes, lists.v_cache), torch.float32),
        ((lists.k_cache, of_bytes), torch.float32),
        ((of_bytes, of_bytes), torch.bfloat16),
    ):
        with torch.autocast(device.type, torch.bfloat16):
            kvops.paged_append(q[:, :, :2], q[:, :, 2:], *sides, lists.block_tables, lists.seq_lens)
            out, _ = kvops.paged_attention(q, *sides, lists.block_tables, lists.seq_lens)
        assert out.dtype == dtype


def test_a_decode_step_compiles_without_a_graph_break(backend, device):
    def step(q, k, v, k_cache, v_cache, tables, lens, scores):
        kvops.paged_append(k, v, k_cache, v_cache, tables, lens, scores=scores)
        schedule = kvops.paged_schedule(lens, 8)
        return kvops.paged_attention(q, k_cache, v_cache, tables, lens, scores=scores, schedule=schedule)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([[20, 3]], [[9, 16], [4, 5]]):
        lists = make_lists(lengths, block_size=8, head_dim=32, device=device)
        B = len(lengths)
        q, k, v = (torch.randn(B, 1, heads, 32, device=device) for heads in (4, 2, 2))
        caches = [lists.k_cache, lists.v_cache, lists.block_tables, lists.seq_lens, lists.scores]
        copies = [tensor.clone() for tensor in caches]
        wanted, got = step(q, k, v, *caches), compiled(q, k, v, *copies)
        for a, b in zip((*wanted, *caches), (*got, *copies), strict=True):
            assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


ATTENTION_ERRORS = [
    ({"q": torch.randn(2, 6, 32)}, ValueError, r"q: expected 4 dimensions \[batch, tokens, query_heads, head_dim\]"),
    (
        {"q": torch.randn(2, 2, 6, 32).double()},
        TypeError,
        "q: expected dtype float16 or bfloat16 or float32, got float64",
    ),
    ({"q": torch.randn(2, 2, 6, 64)[..., ::2]}, ValueError, "q: expected the last dimension contiguous"),
    ({"q": torch.randn(2, 2, 7, 32)}, ValueError, "q: expected a number of query heads divisible by the 3 heads"),
    ({"q": torch.randn(2, 2, 6, 33)}, ValueError, r"k_cache: expected shape .* = \[any, any, 33\]"),
    ({"q": torch.randn(3, 2, 6, 32)}, ValueError, r"block_tables: expected shape .* = \[3, any, any\]"),
    (
        {"q": torch.randn(2, 2, 6, 32).half()},
        TypeError,
        "q: expected the dtype of k_cache, float32, got float16",
    ),
    ({"v_cache": torch.randn(5, 8, 24)}, ValueError, "v_cache: expected shape"),
    ({"v_cache": torch.randn(12, 8, 0)}, ValueError, r"v_cache.shape\[-1\] \(head_dim\): expected at least 1, got 0"),
    (
        {"q": torch.randn(2, 2, 6, 0), "k_cache": torch.randn(12, 8, 0)},
        ValueError,
        r"k_cache.shape\[-1\] \(head_dim\): expected at least 1, got 0",
    ),
    ({"q": None}, TypeError, "q: expected a torch.Tensor, got NoneType"),
    ({"q": None, "k_scale": 0.5}, TypeError, "q: expected a torch.Tensor, got NoneType"),
    ({"v_cache": torch.randn(12, 8, 24).half()}, TypeError, "v_cache: expected the dtype of k_cache"),
    ({"block_tables": torch.zeros(2, 3, 4).long()}, TypeError, "block_tables: expected dtype int32, got int64"),
    ({"block_tables": int32([0], [0])}, ValueError, "block_tables: expected shape"),
    ({"seq_lens": int32(1, 2)}, ValueError, r"seq_lens: expected shape \[batch, heads\] = \[2, 3\], got \[2\]"),
    ({"seq_lens": torch.zeros(2, 3).long()}, TypeError, "seq_lens: expected dtype int32"),
    ({"q_lens": int32(1)}, ValueError, r"q_lens: expected shape \[batch\] = \[2\]"),
    ({"q_lens": torch.ones(2).long()}, TypeError, "q_lens: expected dtype int32"),
    ({"window_left": -2}, ValueError, "window_left: expected at least -1, got -2"),
    ({"softcap": -1.0}, ValueError, "softcap: expected at least 0"),
    ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ({"softcap": float("inf")}, ValueError, "softcap: expected a finite number, got inf"),
    ({"k_scale": "one"}, TypeError, "k_scale: expected a float or a float32 tensor, got str"),
    ({"query_positions": torch.zeros(2, 2).int()}, ValueError, "positions: expected along with query_positions"),
    ({"positions": torch.zeros(12, 8).int()}, ValueError, "query_positions: expected along with positions"),
    ({"sinks": torch.zeros(3)}, ValueError, r"sinks: expected shape \[query_heads\] = \[6\]"),
    ({"sinks": torch.zeros(6).int()}, TypeError, "sinks: expected dtype"),
    ({"tree_mask": torch.ones(2, 2)}, TypeError, "tree_mask: expected dtype bool"),
    ({"tree_mask": torch.ones(3, 3).bool()}, ValueError, r"tree_mask: expected shape \[tokens, tokens\] = \[2, 2\]"),
    ({"tree_mask": torch.ones(3, 2, 2).bool()}, ValueError, "tree_mask: expected shape"),
    ({"v_cache": torch.ones(12, 8, 24).to(torch.int16)}, TypeError, "v_cache: expected dtype .* or int8, got int16"),
    (
        {"k_cache": torch.ones(12, 8, 32).to(torch.int8), "v_cache": torch.randn(12, 8, 24).half()},
        TypeError,
        "q: expected the dtype of v_cache, float16, got float32",
    ),
    (
        {"v_cache": torch.ones(12, 8, 24).to(torch.int8), "k_scale": 0.5},
        ValueError,
        "k_scale: expected only with a float8 or int8 k_cache, got torch.float32",
    ),
    ({"k_scale": 0.5}, ValueError, "k_scale: expected only with a float8 or int8 k_cache, got torch.float32"),
    ({"scores": torch.zeros(12, 7)}, ValueError, r"scores: expected shape \[num_blocks, block_size\]"),
    ({"scores": torch.zeros(12, 8).half()}, TypeError, "scores: expected dtype float32"),
    ({"score_reduce": "mean"}, ValueError, "score_reduce: expected one of 'sum', 'sumsq', 'max', got 'mean'"),
    ({"score_decay": -0.5}, ValueError, "score_decay: expected at least 0"),
    ({"score_decay": float("inf")}, ValueError, "score_decay: expected a finite number, got inf"),
    ({"schedule": int32(1, 2, 3)}, ValueError, "schedule.*: expected at least 9, got 3"),
    ({"schedule": torch.zeros(20).long()}, TypeError, "schedule: expected dtype int32"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ATTENTION_ERRORS)
def test_bad_input_of_attention_is_named(changes, kind, message):
    with pytest.raises(kind, match=message):
        kvops.paged_attention(**attention_inputs(**changes))


APPEND_ERRORS = [
    ({"k": torch.randn(2, 3, 32)}, ValueError, r"k: expected 4 dimensions"),
    (
        {"k": torch.randn(2, 2, 3, 0), "k_cache": torch.randn(12, 8, 0)},
        ValueError,
        r"k_cache.shape\[-1\] \(head_dim\): expected at least 1, got 0",
    ),
    ({"k": torch.randn(2, 2, 4, 32)}, ValueError, "k: expected the 3 heads of the cache, got 4"),
    ({"k": torch.randn(2, 2, 3, 32).half()}, TypeError, "k: expected the dtype of k_cache, float32, got float16"),
    ({"v": torch.randn(2, 2, 3, 32)}, ValueError, r"v: expected shape .* = \[2, 2, 3, 24\]"),
    ({"v": torch.randn(2, 2, 3, 24).half()}, TypeError, "v: expected the dtype of k"),
    ({"q_lens": torch.ones(2).long()}, TypeError, "q_lens: expected dtype int32"),
    ({"positions": torch.zeros(12, 8).int()}, ValueError, "token_positions: expected along with positions"),
    ({"token_positions": torch.zeros(2, 2).int()}, ValueError, "positions: expected along with token_positions"),
    ({"scores": torch.zeros(3, 8)}, ValueError, "scores: expected shape"),
    ({"v_scale": torch.ones(3)}, ValueError, "v_scale: expected only with a float8 or int8 v_cache"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), APPEND_ERRORS)
def test_bad_input_of_append_is_named(changes, kind, message):
    with pytest.raises(kind, match=message):
        kvops.paged_append(**append_inputs(**changes))


def test_bad_input_of_schedule_is_named():
    for lens, block_size, kind, message in (
        (torch.zeros(2, 2, 2, 2).int(), 8, ValueError, "seq_lens: expected shape"),
        (torch.zeros(2).long(), 8, TypeError, "seq_lens: expected dtype int32"),
        (torch.zeros(2).int(), 0, ValueError, "block_size"),
        (None, 8, TypeError, "seq_lens: expected a torch.Tensor, got NoneType"),
    ):
        with pytest.raises(kind, match=message):
            kvops.paged_schedule(lens, block_size)
    with pytest.raises(ValueError, match="num_programs"):
        kvops.paged_schedule(torch.zeros(2).int(), 8, num_programs=-1)


def test_a_wrong_scale_of_a_float8_cache_is_named():
    inputs = attention_inputs()
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"k_scale: expected shape \[heads\] = \[3\]"):
        kvops.paged_attention(**inputs, k_scale=torch.ones(2))
    with pytest.raises(TypeError, match="v_scale: expected dtype float32"):
        kvops.paged_attention(**inputs, v_scale=torch.ones(3).half())
    for number in (float("inf"), float("nan"), 0.0, 0):
        with pytest.raises(ValueError, match=r"k_scale: expected a (finite number|number other than 0)"):
            kvops.paged_attention(**inputs, k_scale=number)


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="paged_attention has no gradient"):
        kvops.paged_attention(**attention_inputs(q=torch.randn(2, 2, 6, 32, requires_grad=True)))


def test_debug_finds_what_only_the_data_tells(monkeypatch):
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    inputs = attention_inputs()
    kvops.paged_attention(**inputs)  # entries past the lengths are nobody's business
    kvops.paged_append(**append_inputs())
    capacity = inputs["block_tables"].shape[2] * 8
    for name, change, message in (
        ("block_tables", lambda t: t[0, 0].__setitem__(1, 10_000), "block_tables: expected blocks from 0 to"),
        ("block_tables", lambda t: t[1, 0].__setitem__(0, -1), "block_tables: expected blocks from 0 to"),
        ("seq_lens", lambda t: t[0].__setitem__(1, -3), "seq_lens: expected lengths of at least 0"),
        ("seq_lens", lambda t: t[0].__setitem__(1, capacity + 1), "seq_lens: expected lengths up to the"),
    ):
        for function, make in ((kvops.paged_attention, attention_inputs), (kvops.paged_append, append_inputs)):
            broken = make()
            change(broken[name])
            with pytest.raises(ValueError, match=message):
                function(**broken)
    with pytest.raises(ValueError, match="q_lens: expected lengths from 0 to the 2 tokens of q"):
        kvops.paged_attention(**inputs, q_lens=int32(1, 3))
    places = torch.zeros(inputs["k_cache"].shape[:2], dtype=torch.int32)
    for lowest, error in ((5 - 2**31, None), (4 - 2**31, ValueError)):
        options = {"window_left": 5, "positions": places, "query_positions": int32([0, 1], [2, lowest])}
        with pytest.raises(ValueError, match="query_positions: expected positions") if error else nullcontext():
            kvops.paged_attention(**inputs, **options)
    plan = kvops.paged_schedule(inputs["seq_lens"], 8)
    kvops.paged_attention(**inputs, schedule=plan)
    for options, stale in (({"batch_invariant": True}, plan), ({}, kvops.paged_schedule(inputs["seq_lens"] + 99, 8))):
        with pytest.raises(ValueError, match="schedule: expected that of paged_schedule with these lengths"):
            kvops.paged_attention(**inputs, **options, schedule=stale)
