"""The temporary memory of every operator on a GPU is what docs/gpus.md says, to the byte.

Launches of the interpreter are stubbed: what their launch functions allocate depends on shapes and options alone.
"""

from math import ceil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from bench.growth import peak_bytes
from kvops.autotune import watch
from kvops.ops import registry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the allocations of the CPU")

B, T, HQ, HKV, D, DV = 3, 5, 8, 2, 32, 24
SQ, SK, BLOCKS, SIZE, V = 70, 90, 7, 16, 5000
LISTS, SLOTS = B * HKV, BLOCKS * SIZE
OPERATORS = torch.ops.kvops


@pytest.fixture
def most(monkeypatch):
    """The most bytes that a call holds at a time, without its results."""
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **options: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    registry.forget_launches()

    def most(operator, *args, **options):
        results = operator(*args, **options)
        kept = sum(x.nbytes for x in (results if isinstance(results, (tuple, list)) else [results]) if x is not None)
        call = SimpleNamespace(reset=None, run=lambda inputs: operator(*args, **options))
        with torch.no_grad():
            return peak_bytes(call, {}, torch.device("cpu")) - kept

    yield most
    registry.forget_launches()


def dense():
    q, k, v = torch.zeros(B, SQ, HQ, D), torch.zeros(B, SK, HKV, D), torch.zeros(B, SK, HKV, DV)
    return q, k, v, torch.zeros(B, SQ, HQ, DV), torch.zeros(B, HQ, SQ)


def packed():
    q, k, v, out, lse = dense()
    ends = [torch.tensor([0, size], dtype=torch.int32) for size in (SQ, SK)]
    return (q[0], k[0], v[0]), out[0], lse[0], (*ends, SQ, SK)


def cache(dims=(D, DV)):
    tables = torch.zeros(B, HKV, BLOCKS, dtype=torch.int32)
    return *(torch.zeros(40, SIZE, dim) for dim in dims), tables, torch.zeros(B, HKV, dtype=torch.int32)


def test_what_writes_its_results_at_once_needs_none(most):
    q, k, v, out, lse = dense()
    (q1, k1, v1), _, lse1, ends = packed()
    assert most(OPERATORS.flash_attention, q, k, v) == 0
    assert most(OPERATORS.flash_attention_varlen, q1, k1, v1, *ends) == 0
    assert most(OPERATORS.attention_scores, q, k, lse) == 0
    assert most(OPERATORS.attention_scores_varlen, q1, k1, lse1, *ends) == 0
    assert most(OPERATORS.merge_attention, out, lse, out, lse) == 0
    new = torch.zeros(B, T, HKV, D), torch.zeros(B, T, HKV, DV)
    assert most(OPERATORS.paged_append, *new, *cache()) == 0
    assert most(OPERATORS.paged_schedule, cache()[3], SIZE) == 0
    entries = torch.zeros(4, dtype=torch.int32)
    assert most(OPERATORS.copy_blocks, *cache()[:2], entries, entries) == 0


def test_gradients_keep_two_numbers_for_each_row(most):
    q, k, v, out, lse = dense()
    assert most(OPERATORS.flash_attention_backward, out, q, k, v, out, lse) == 8 * B * HQ * 4 * ceil(SQ / 4)
    tensors, out1, lse1, ends = packed()
    found = most(OPERATORS.flash_attention_varlen_backward, out1, *tensors, out1, lse1, *ends)
    assert found == 8 * HQ * 4 * ceil(SQ / 4)
    bias = torch.zeros(HQ, SQ, SK, dtype=torch.bfloat16)
    found = most(OPERATORS.flash_attention_bias_backward, out, q, k, v, out, lse, bias)
    assert found == 8 * B * HQ * 4 * ceil(SQ / 4) + 4 * bias.numel()


def test_paged_attention_keeps_partial_results(most):
    """With scores too: tests/test_launches.py."""
    schedule = OPERATORS.paged_schedule(cache()[3], SIZE)
    programs, rows = schedule.numel() - 2 - LISTS, T * HQ // HKV
    q = torch.zeros(B, T, HQ, D)
    partial = 4 * (programs + LISTS) * rows * (DV + 2)
    assert most(OPERATORS.paged_attention, q, *cache(), schedule=schedule) == partial
    assert most(OPERATORS.paged_attention, q, *cache()) == partial + schedule.nbytes


def test_latents_keep_partial_results_like_paged_attention(most):
    lens, tables = torch.zeros(B, dtype=torch.int32), torch.zeros(B, BLOCKS, dtype=torch.int32)
    latents, schedule = torch.zeros(40, SIZE, 1, 48), OPERATORS.paged_schedule(lens, SIZE)
    programs = schedule.numel() - 2 - B
    q = torch.zeros(B, 1, HQ, 48)
    options = {"value_dim": 32, "scale": 1.0, "schedule": schedule}
    assert most(OPERATORS.paged_latent_attention, q, latents, tables, lens, **options) == 4 * (programs + B) * HQ * 34


@pytest.mark.parametrize("scope", ["head", "sequence"])
def test_select_blocks_keeps_a_key_for_each_slot(most, scope):
    scores, (tables, lens) = torch.zeros(40, SIZE), cache()[2:]
    budget = torch.ones(B, dtype=torch.int32)
    found = most(OPERATORS.select_blocks, scores, tables, lens, budget, scope=scope)
    assert found == (4 * LISTS * (SLOTS + 3) if scope == "head" else 4 * LISTS * (3 * SLOTS + 3 + BLOCKS) + 8 * B)


def test_compact_keeps_places_for_each_slot(most):
    keep = torch.ones(B, HKV, SLOTS, dtype=torch.bool)
    found = most(OPERATORS.compact, *cache(), keep)
    assert found <= 13 * LISTS * SLOTS + 1024  # and numbers for each list


def splits(config, size=V):
    return ceil(size / config.block), ceil(size / config.race_block)


@pytest.mark.parametrize("method", ["token", "block"])
@pytest.mark.parametrize("sampled", [False, True])
def test_verify_draft_keeps_statistics_of_parts_of_the_vocabulary(most, sampled, method):
    logits, drafts = torch.zeros(B, T + 1, V), torch.zeros(B, T, dtype=torch.int64)
    options = {"method": method}
    if sampled:
        options |= {"temperature": torch.ones(B), "seed": torch.zeros(B, dtype=torch.int64)}
        options |= {"draft_probs": torch.zeros(B, T, V)}
    with watch() as choices:
        found = most(OPERATORS.verify_draft, logits, drafts, **options)
    parts, races = splits(choices[-1].config)
    race, block = 8 * B * races, B * (T + 1) * (12 + 4 * parts) + 8 * B
    expected = 12 * B * (T + 1) * parts + 8 * B
    if sampled:
        expected += max(race + 4 * B, block) if method == "block" else race
    assert found == expected


@pytest.mark.parametrize("sampled", [False, True])
def test_verify_tree_keeps_statistics_and_a_few_numbers_for_each_node(most, sampled):
    logits, drafts = torch.zeros(B, T, V), torch.zeros(B, T, dtype=torch.int64)
    parents = torch.zeros(B, T, dtype=torch.int32)
    sampling = {"temperature": torch.ones(B), "seed": torch.zeros(B, dtype=torch.int64)} if sampled else {}
    with watch() as choices:
        found = most(OPERATORS.verify_tree, logits, drafts, parents, **sampling)
    parts, races = splits(choices[-1].config)
    assert found == 12 * B * T * parts + 8 * B * T + 12 * B + (8 * B * races if sampled else 0)


def test_prompt_lookup_keeps_the_best_place_of_each_part_of_a_text(most):
    tokens, lens = torch.zeros(B, V, dtype=torch.int64), torch.full((B,), V, dtype=torch.int32)
    with watch() as choices:
        found = most(OPERATORS.prompt_lookup, tokens, lens, num_draft=4)
    assert found == 8 * B * ceil((V - 1) / choices[-1].config.block)


def test_the_manual_names_every_operator():
    text = Path(__file__).parent.parent.joinpath("docs", "gpus.md").read_text()
    section = text.split("## Temporary memory")[1]
    assert not [name for name in registry._operators if f"`{name}`" not in section]
