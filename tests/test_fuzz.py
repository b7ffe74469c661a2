"""The fuzzers themselves, with a fixed seed: they run, they can fail, and what they print repeats the failure.

``make fuzz`` takes another seed every time; see :mod:`fuzz.core`.
"""

import contextlib
import importlib
from random import Random
from types import SimpleNamespace

import pytest
import torch
from fuzz import compiling, core, inputs

import kvops
from kvops.autotune import inspect

# Areas and how many of their cases take about a second.
SMOKE = {
    **{"dense": 12, "packed": 8, "merge": 20, "sdpa": 25, "paged": 8, "eviction": 10, "cache": 15, "verification": 12},
    **{"latents": 10, "sampling": 60, "lookup": 60, "flash_attn": 15, "families": 10},
}


@pytest.mark.parametrize("area", SMOKE)
def test_a_short_sweep_finds_nothing(area):
    result = core.sweep(importlib.import_module(f"fuzz.{area}"), seed=1, cases=SMOKE[area])
    assert result.cases == SMOKE[area]
    assert [failure.error for failure in result.failures] == []


@pytest.mark.parametrize("area", [*core.AREAS, "compiling"])
def test_a_case_survives_the_way_through_the_command_line(area):
    module = importlib.import_module(f"fuzz.{area}")
    for seed in range(20):
        case = module.draw(Random(seed))
        assert core.from_json(module.Case, core.to_json(case)) == case


def no_window(real):
    return lambda *args, **kwargs: real(*args, **{**kwargs, "window_left": -1})


def without(option):
    return lambda real: lambda *args, **kwargs: real(*args, **{**kwargs, option: None})


def no_dropout(real):
    return lambda *args, **kwargs: real(*args, **{**kwargs, "dropout_p": 0.0})


def a_draft_too_short(real):
    def faulty(*args, **kwargs):
        tokens, lens = real(*args, **kwargs)
        long = lens == 5
        if long.any():
            tokens[long, 4] = -1
        return tokens, lens - long.int()

    return faulty


def a_slot_lost(real):
    def faulty(k_cache, v_cache, block_tables, seq_lens, keep, **kwargs):
        keep = keep.clone()
        keep[-1, -1, :1] = False
        return real(k_cache, v_cache, block_tables, seq_lens, keep, **kwargs)

    return faulty


def a_token_more_likely(real):
    def faulty(target_logits, *args, **kwargs):
        target_logits = target_logits.clone()
        target_logits[..., 0] += 0.2
        return real(target_logits, *args, **kwargs)

    return faulty


def nothing_refused(real):
    def faulty(*args, **kwargs):
        try:
            return real(*args, **kwargs)
        except (ValueError, TypeError):
            return None

    return faulty


@pytest.mark.parametrize(
    ("area", "function", "fault", "shows", "cases"),
    [
        ("dense", "flash_attention", no_window, lambda case: case.window_left >= 0, 60),
        ("dense", "flash_attention", no_dropout, lambda case: case.dropout, 30),
        ("packed", "flash_attention_varlen", without("bias"), lambda case: case.bias, 30),
        ("latents", "paged_latent_attention", without("cache_scale"), lambda case: case.stored, 15),
        ("lookup", "prompt_lookup", a_draft_too_short, lambda case: case.num_draft >= 5, 100),
        ("eviction", "compact", a_slot_lost, lambda case: case.blocks, 20),
        ("eviction", "copy_blocks", without("v_slot_scale"), lambda case: case.slot_scales, 5),
        ("verification", "verify_draft", a_token_more_likely, lambda case: case.vocab > 1, 30),
        ("verification", "verify_draft_varlen", without("step"), lambda case: case.packed, 5),
        ("sampling", "process_logits", nothing_refused, lambda case: case.bad, 60),
    ],
)
def test_a_planted_fault_is_found_and_shrunk(monkeypatch, area, function, fault, shows, cases):
    module = importlib.import_module(f"fuzz.{area}")
    monkeypatch.setattr(kvops, function, fault(getattr(kvops, function)))
    result = core.sweep(module, seed=1, cases=cases, shrink_seconds=1)
    found = [failure.case for failure in result.failures if shows(failure.case)]
    assert found
    case = core.from_json(module.Case, core.to_json(found[0]))
    assert core.failure_of(module.check, case) is not None
    monkeypatch.undo()
    assert core.failure_of(module.check, case) is None


def test_shrinking_drops_what_does_not_matter():
    module = importlib.import_module("fuzz.lookup")

    def check(case):
        assert case.num_draft < 3 or len(case.lengths) < 2

    failure = core.failure_of(check, module.Case(seed=9, lengths=(30, 2, 7), num_draft=70, more=4, layout="padded"))
    smallest = core.shrink(check, failure, seconds=10).case
    assert smallest == module.Case(lengths=(0, 0), num_draft=3)


def test_what_lies_around_a_view_is_not_a_number():
    x = torch.randn(2, 3, 4, 1)
    for layout in inputs.LAYOUTS:
        view = inputs.laid_out(x, layout)
        assert view.shape == x.shape
        assert not view.isnan().any()
        if layout and not layout.startswith("expanded"):
            assert torch.equal(view, x)
            assert torch.empty(0).set_(view.untyped_storage()).isnan().any()
    assert inputs.laid_out(x, "last first").stride(-1) > 1


@pytest.mark.parametrize(
    ("excess", "message"),
    [
        ({}, ""),
        ({"shared_memory": 101_377}, "101377 bytes of shared memory of 101376"),
        ({"spills": 81}, "81 spill instructions, at most 80 are accepted"),
    ],
)
def test_what_compiles_beyond_a_limit_is_found(excess, message, monkeypatch):
    facts = {"kernel": "k", "num_warps": 4, "num_stages": 1, "constants": {}, "shared_memory": 101_376, "spills": 0}
    launch = SimpleNamespace(**(facts | excess))
    monkeypatch.setattr(inspect, "compile_only", lambda target: contextlib.nullcontext([launch]))
    monkeypatch.setitem(compiling.CALLS, "paged_append", lambda case: None)
    failure = core.failure_of(compiling.check, compiling.Case(target="sm_89"))
    assert message in failure.error if message else failure is None
