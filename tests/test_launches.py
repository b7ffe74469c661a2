"""Checks and preparation are shared by calls alike, and by no others."""

import math
import weakref

import pytest
import torch

import kvops
from kvops.autotune import override, specs, watch
from kvops.autotune.config import paged_attention_config
from kvops.kernels import paged_parts, paged_plan
from kvops.kernels.paged import positional
from kvops.kernels.paged_attention_kernel import paged_attention_kernel
from kvops.kernels.paged_latent_attention import LatentKind
from kvops.ops import launches, registry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's launches")


def inputs(**changes):
    found = {
        "q": torch.randn(2, 1, 4, 16),
        "k_cache": torch.randn(6, 4, 16),
        "v_cache": torch.randn(6, 4, 16),
        "block_tables": torch.arange(4, dtype=torch.int32).view(2, 2, 1),
        "seq_lens": torch.tensor([[1, 4], [3, 0]], dtype=torch.int32),
    }
    return found | changes


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """The calls that were prepared, and so checked."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("KVOPS_DEBUG", raising=False)
    monkeypatch.setenv("KVOPS_CPU", "eager")
    found = []
    launch_of = registry._launch

    def counted(function, args, kwargs):
        if not function.__module__.startswith("kvops.eager"):
            found.append(function.__name__)
        return launch_of(function, args, kwargs)

    monkeypatch.setattr(registry, "_launch", counted)
    registry.forget_launches()
    yield found
    registry.forget_launches()


def test_calls_alike_are_checked_once_and_compute_from_their_own_data(prepared):
    schedule = kvops.paged_schedule(inputs()["seq_lens"], 4)
    for _ in range(3):
        given = inputs()
        out, lse = kvops.paged_attention(**given, schedule=schedule)
        with pytest.MonkeyPatch.context() as eager:
            eager.delenv("TRITON_INTERPRET")
            exact = kvops.paged_attention(**given)
        torch.testing.assert_close((out, lse), exact)
    assert prepared == ["paged_schedule", "paged_attention"]


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(2, 1, 2, 16)},  # another shape
        {"q": torch.randn(2, 4, 1, 16).transpose(1, 2)},  # strides
        {"window_left": 1},
        {"causal": False},
        {"softcap": 2.0},
        {"scale": 0.5},
        {"sinks": torch.zeros(4)},
        {"scores": torch.zeros(6, 4)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_differs_but_data_makes_another_kind(change, prepared):
    kvops.paged_attention(**inputs())
    kvops.paged_attention(**inputs(**change))
    assert prepared.count("paged_attention") == 2


@pytest.mark.parametrize("interpreted", ["1", "0"], ids=["kernels", "eager"])
def test_what_was_valid_once_does_not_let_the_invalid_through(interpreted, monkeypatch, prepared):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    kvops.paged_attention(**inputs())
    with pytest.raises(TypeError, match="seq_lens: expected dtype int32"):
        kvops.paged_attention(**inputs(seq_lens=torch.ones(2, 2, dtype=torch.int64)))
    with pytest.raises(RuntimeError, match="has no gradient"):
        kvops.paged_attention(**inputs(q=torch.randn(2, 1, 4, 16, requires_grad=True)))
    with torch.no_grad():
        kvops.paged_attention(**inputs(q=torch.randn(2, 1, 4, 16, requires_grad=True)))
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    with pytest.raises(ValueError, match="seq_lens: expected lengths up to"):
        kvops.paged_attention(**inputs(seq_lens=torch.full((2, 2), 99, dtype=torch.int32)))


@pytest.mark.parametrize("interpreted", ["1", "0"], ids=["kernels", "eager"])
def test_where_packed_sequences_begin_is_checked_in_every_call(interpreted, monkeypatch, prepared):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    packed = {"q": torch.randn(3, 4, 16), "cu_seqlens_q": torch.tensor([0, 1, 3], dtype=torch.int32)}
    for _ in range(2):
        kvops.paged_attention(**inputs(**packed), max_seqlen_q=2)
        with pytest.raises(ValueError, match=r"max_seqlen_q|cu_seqlens_q"):
            kvops.paged_attention(
                **inputs(**packed | {"cu_seqlens_q": torch.tensor([0, 0, 3], dtype=torch.int32)}), max_seqlen_q=2
            )


def test_the_eager_path_and_the_kernels_remember_for_themselves(monkeypatch, prepared):
    with pytest.MonkeyPatch.context() as eager:
        eager.delenv("TRITON_INTERPRET")
        exact = [kvops.paged_attention(**(given := inputs())) for _ in range(2)][-1]
    assert prepared == []
    torch.testing.assert_close(kvops.paged_attention(**given), exact)
    assert prepared.count("paged_attention") == 1


def test_kinds_of_calls_that_take_turns_are_prepared_once_each(prepared):
    for _ in range(2):
        for change in ({}, {"window_left": 1}, {"window_left": 2}, {"sinks": torch.zeros(4)}, {"k_cache": cache()}):
            given = inputs(**change)
            found = kvops.paged_attention(**given)
            with pytest.MonkeyPatch.context() as eager:
                eager.delenv("TRITON_INTERPRET")
                torch.testing.assert_close(found, kvops.paged_attention(**given))
    assert prepared.count("paged_attention") == 5


def cache():
    """With space between the blocks."""
    return torch.randn(6, 8, 16)[:, :4]


def test_a_tensor_may_stand_in_two_places(prepared):
    for _ in range(2):
        given = inputs()
        kvops.paged_attention(**given | {"v_cache": given["k_cache"]})
    assert prepared.count("paged_attention") == 1


def test_the_tensors_of_a_call_are_not_kept():
    given = inputs()
    kvops.paged_attention(**given)
    left = [weakref.ref(value) for value in given.values()]
    del given
    assert [reference() for reference in left] == [None] * 5


def test_the_configuration_is_chosen_at_every_launch():
    config = specs()["paged_attention"].config(16, 16, 4, 1)
    given = inputs()
    expected = kvops.paged_attention(**given)
    with watch() as choices, override("paged_attention", config):
        found = kvops.paged_attention(**given)
        kvops.paged_attention(**given)
    assert [choice.config for choice in choices if choice.spec.name == "paged_attention"] == [config, config]
    torch.testing.assert_close(found, expected)


def test_grids_follow_the_configuration_and_the_shares():
    given = inputs()
    kind = paged_plan.PagedKind(*given.values())
    config = specs()["paged_attention"].config
    plan = kind.plan(first := config(16, 16, 4, 1), 8)
    assert kind.plan(first, 8) is plan
    assert kind.plan(first, 9).grid != plan.grid
    assert kind.plan(config(32, 16, 4, 1), 8) is not plan


def test_what_is_remembered_is_bounded(monkeypatch, prepared):
    monkeypatch.setattr(launches, "_MAX_LAUNCHES", 4)
    for tokens in range(1, 11):
        kvops.paged_attention(**inputs(q=torch.randn(2, tokens, 4, 16)))
    assert all(len(found) <= 4 for x in registry._operators.values() for found in (x.served, x.interpreted))
    assert prepared.count("paged_attention") == 10


def test_no_grid_is_larger_than_a_gpu_takes():
    """Row tiles were the second axis, which ends at 65,535: a prompt of a million tokens has more of them."""
    q = torch.empty(1, 1 << 20, 32, 64, dtype=torch.bfloat16, device="meta")
    cache = torch.empty(1 << 16, 16, 64, dtype=torch.bfloat16, device="meta")
    tables = torch.empty(1, 1, 1 << 16, dtype=torch.int32, device="meta")
    kind = paged_plan.PagedKind(q, cache, cache, tables, torch.empty(1, 1, dtype=torch.int32, device="meta"))
    config = paged_attention_config(64, 2, kind.rows, "sm_90")
    for shares in (264, 1 << 22):  # row tiles alone fill the GPU, and do not
        plan = kind.plan(config, shares)
        assert plan.grid[0] >= kind.rows // 64 > 65_535
        for grid in (plan.grid, plan.merge_grid, plan.scores_grid):
            assert grid is None or (grid[0] < 2**31 and max(grid[1:], default=1) <= 65_535)


def test_arguments_that_follow_the_tensors_stand_under_their_own_names():
    """One swapped stride would be silent: each number is looked up by the name of its parameter."""
    given = inputs()
    kind = paged_plan.PagedKind(*given.values(), scores=torch.zeros(6, 4), window_left=3, softcap=2.0, score_decay=0.5)
    plan = kind.plan(paged_attention_config(16, 4, kind.rows, "sm_90"), 8)
    names = paged_attention_kernel.arg_names[-len(plan.numbers) :]
    values = dict(zip(names, plan.numbers, strict=True))
    assert names[0] == "stride_qb"
    assert (values["stride_kb"], values["stride_ks"], values["stride_tb"]) == (64, 16, 2)
    assert (values["window_left"], values["softcap"], values["HAS_WINDOW"], values["CAUSAL"]) == (3, 2.0, True, True)
    with pytest.raises(KeyError, match="stride_th"):
        positional(paged_attention_kernel, "stride_qb", {k: v for k, v in kind.numbers.items() if k != "stride_th"})


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_scores_beyond_the_largest_buffer_are_computed_again(num_tokens, biased, monkeypatch, prepared):
    options = {"bias": torch.rand(2, 4, num_tokens, 4) < 0.5} if biased else {}
    given = inputs(q=torch.randn(2, num_tokens, 4, 16))
    results = []
    for limit in (paged_plan.MAX_STASH, 0):
        monkeypatch.setattr(paged_plan, "MAX_STASH", limit)
        registry.forget_launches()
        scores = torch.zeros(6, 4)
        out, lse = kvops.paged_attention(**given, scores=scores, **options)
        results.append((out, lse, scores))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert results[0][2].any()


@pytest.mark.parametrize("packed", [False, True])
def test_batch_invariant_calls_with_large_temporaries_run_in_parts_with_the_same_bits(packed, monkeypatch, prepared):
    tables = torch.arange(6, dtype=torch.int32).view(3, 2, 1)
    lens = torch.tensor([[2, 4], [3, 2], [4, 2]], dtype=torch.int32)
    given = inputs(q=torch.randn(3, 2, 4, 16), block_tables=tables, seq_lens=lens)
    options = {
        "batch_invariant": True,
        "tree_mask": torch.tensor([[True, False], [False, True]]).expand(3, 2, 2),
        "score_decays": torch.tensor([1.0, 0.5, 0.25]),
        "sinks": torch.randn(4),
        "bias": torch.randn(3, 4, 2, 4),
    }
    if packed:
        given["q"] = given["q"].flatten(0, 1)
        options |= {"cu_seqlens_q": torch.tensor([0, 2, 3, 5], dtype=torch.int32), "max_seqlen_q": 2, "tree_mask": None}
        options["bias"] = torch.randn(4, 6, 4)
    else:
        options["q_lens"] = torch.tensor([2, 1, 2], dtype=torch.int32)
    kind_of = paged_parts.parted(paged_plan.PagedKind)
    whole = kind_of(*given.values(), **options)
    results = []
    for limit in (paged_parts.MAX_PARTIAL, 0, 4 * whole.partial_size(whole.units) - 1):
        monkeypatch.setattr(paged_parts, "MAX_PARTIAL", limit)
        registry.forget_launches()
        scores = torch.ones_like(given["k_cache"][..., 0])
        results.append((*kvops.paged_attention(**given, **options, scores=scores), scores))
    tall = {**given, "q": torch.empty(*given["q"].shape[:-2], 4 * 64, 16)}
    tall_options = {**options, "sinks": None, "bias": None}
    assert isinstance(kind_of(*tall.values(), **tall_options), paged_plan.PagedKind)  # nothing to merge
    parts = kind_of(*given.values(), **options).parts
    assert [(rows.start, rows.stop) for rows, _ in parts] == [(0, 2), (2, 3)]
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize("packed", [False, True])
def test_batch_invariant_latents_run_in_parts_with_the_same_bits(packed, monkeypatch, prepared):
    """Two row tiles of 64 are cut too: all heads of MLA read one list."""
    cache, tables = torch.randn(9, 16, 24), torch.randperm(9).int().view(3, 1, 3)
    given = torch.randn(3, 1, 128, 24), cache, tables, torch.tensor([[40], [0], [33]], dtype=torch.int32)
    options = {"value_dim": 16, "scale": 0.2, "batch_invariant": True}
    if packed:
        given = given[0].flatten(0, 1), *given[1:]
        options |= {"cu_seqlens_q": torch.tensor([0, 1, 1, 2], dtype=torch.int32), "max_seqlen_q": 1}
    kind_of = paged_parts.parted(LatentKind)
    whole = kind_of(*given, **options)
    results = []
    for limit in (paged_parts.MAX_PARTIAL, 0, 4 * whole.partial_size(whole.units) - 1):
        monkeypatch.setattr(paged_parts, "MAX_PARTIAL", limit)
        registry.forget_launches()
        results.append(kvops.paged_latent_attention(*given, **options))
    assert [(rows.start, rows.stop) for rows, _ in kind_of(*given, **options).parts] == [(0, 2), (2, 3)]
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize("invariant", [False, True])
def test_temporaries_are_as_large_as_documented(invariant):
    """kvops.paged_attention has the formula."""
    q, cache = torch.empty(3, 2, 8, 16, device="meta"), torch.empty(1000, 16, 24, device="meta")
    tables = torch.empty(3, 2, 300, dtype=torch.int32, device="meta")
    lens, scores = torch.empty(3, 2, dtype=torch.int32, device="meta"), torch.empty(1000, 16, device="meta")
    kind = paged_plan.PagedKind(q, cache, cache, tables, lens, scores=scores, batch_invariant=invariant)
    plan = kind.plan(paged_attention_config(32, 4, kind.rows, "sm_90"), 40)
    lists, rows, sums = 6, 2 * 4, 24 + 2
    places = lists * math.ceil(300 * 16 / 256) if invariant else 40 + lists
    assert plan.partial == places * rows * sums
    unit = 256 if invariant else 16
    assert plan.stash == rows * unit * (math.ceil(1000 * 16 / unit) + lists)  # the pool has fewer slots than the tables
