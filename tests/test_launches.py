"""Checks and preparation are shared by calls alike, and by no others."""

import pytest
import torch

import kvops
from kvops.autotune import override, specs, watch
from kvops.kernels import paged_plan
from kvops.ops import registry

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


def test_the_eager_path_and_the_kernels_remember_for_themselves(monkeypatch, prepared):
    with pytest.MonkeyPatch.context() as eager:
        eager.delenv("TRITON_INTERPRET")
        exact = [kvops.paged_attention(**(given := inputs())) for _ in range(2)][-1]
    assert prepared == []
    torch.testing.assert_close(kvops.paged_attention(**given), exact)
    assert prepared.count("paged_attention") == 1


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
    monkeypatch.setattr(registry, "_MAX_LAUNCHES", 4)
    for tokens in range(1, 11):
        kvops.paged_attention(**inputs(q=torch.randn(2, tokens, 4, 16)))
    assert all(len(launches) <= 4 for x in registry._operators.values() for launches in (x.served, x.interpreted))
    assert prepared.count("paged_attention") == 10
