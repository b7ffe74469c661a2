"""The tolerance of every comparison: as wide as rounding, on every machine the same, and no wider."""

import json
from types import SimpleNamespace

import margins
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_accurate, attention, attention_mask
from rounding import rounded


@pytest.mark.parametrize("terms", [1, 30, 3000])
@pytest.mark.parametrize("sign", ["of both signs", "positive"])
def test_a_sum_is_off_by_what_its_order_makes_of_it(terms, sign):
    """In float32, one term after the other, over many orders: the spread is that of correct roundings times two."""
    x = torch.randn(terms) if sign == "of both signs" else torch.rand(terms) + 0.5
    exact = x.double().sum()
    orders = torch.stack([x[torch.randperm(terms)] for _ in range(200)])
    found = torch.zeros(200)
    for term in range(terms):
        found = found + orders[:, term]
    happened = (found.double() - exact).square().mean().sqrt()
    samples = rounded(torch.float32, torch.Tensor.sum, x)
    predicted = (samples - exact).square().mean().sqrt()
    if terms == 1:
        assert happened == 0
        return
    assert 0.7 < predicted / happened < 6


def test_samples_are_the_same_every_time_and_leave_the_generator_alone():
    x = torch.randn(3, 50)
    state = torch.get_rng_state()
    one, two = (rounded(torch.float32, torch.softmax, x, -1) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 40])
def test_the_arithmetic_itself_is_within_half_of_the_tolerance(dtype, size):
    """Torch in the dtype under test, of one number or of many."""
    q, k, v = (torch.randn(1, tokens, 2, 16).to(dtype) for tokens in (size, 70, 70))
    found = F.scaled_dot_product_attention(*(x.transpose(1, 2).float() for x in (q, k, v))).transpose(1, 2).to(dtype)
    exact, same = attention(q, k, v)[0], rounded(dtype, attention, q, k, v)[0]
    assert_accurate(found, exact, same)
    assert margins.recorded[-1].margin < 0.5


def test_samples_are_kept_for_the_same_arguments_of_a_function_that_reads_nothing_else():
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    mask = attention_mask(40, 40, causal=True)
    kept = rounded(torch.float32, scaled, q, k, v, mask=mask)
    assert rounded(torch.float32, scaled, q.clone(), k, v, mask=mask) is kept
    others = [
        rounded(torch.float16, scaled, q, k, v, mask=mask),
        rounded(torch.float32, one_key_less, q, k, v, mask=mask),
        rounded(torch.float32, scaled, q, k, v, mask=~mask),
        rounded(torch.float32, scaled, q, k, 2 * v, mask=mask),
    ]
    assert not any(torch.equal(other, kept) for other in others)
    for factor in (1, 2):
        twice = rounded(torch.float32, lambda x, factor=factor: factor * x, q)
        assert torch.allclose(twice, factor * q.double(), atol=1e-4)
    assert not torch.equal(*(rounded(torch.float32, lambda x: factor * x, q) for factor in (1, 2)))  # noqa: B023


def scaled(q, k, v, mask):
    return attention(q, k, v, mask=mask, scale=0.25 * (1 + 3e-6))[0]


def one_key_less(q, k, v, mask):
    mask = mask.clone()
    mask[:, 37] = False
    return attention(q, k, v, mask=mask)[0]


def coarse_probabilities(q, k, v, mask):
    _, _, p = attention(q, k, v, mask=mask)
    return torch.einsum("bhqk,bkhd->bqhd", p.half().double(), v.double())


@pytest.mark.parametrize("fault", [scaled, one_key_less, coarse_probabilities])
def test_small_faults_are_no_rounding(fault):
    q, k, v = (torch.randn(1, tokens, 2, 16) for tokens in (40, 70, 70))
    mask = attention_mask(40, 70, causal=True)
    exact, same = attention(q, k, v, mask=mask)[0], rounded(torch.float32, attention, q, k, v, mask=mask)[0]
    assert_accurate(exact.float(), exact, same)
    with pytest.raises(AssertionError, match="output: error"):
        assert_accurate(fault(q, k, v, mask).float(), exact, same)


def test_what_is_no_number_or_infinite_elsewhere_is_refused():
    exact = torch.tensor([1.0, float("-inf")]).double()
    assert_accurate(exact.float(), exact, exact)
    with pytest.raises(AssertionError, match="1 NaN"):
        assert_accurate(torch.tensor([1.0, float("nan")]), exact, exact)
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_accurate(torch.tensor([1.0, float("inf")]), exact, exact)


def test_workers_hand_their_margins_to_the_process_that_prints_them(monkeypatch):
    monkeypatch.setattr(margins, "recorded", [])
    margins.record(0.3, "out")
    worker = SimpleNamespace(config=SimpleNamespace(workeroutput={}))
    margins.pytest_sessionfinish(worker)
    (sent,) = json.loads(json.dumps(worker.config.workeroutput["margins"]))  # what execnet can carry
    margins.recorded.clear()
    margins.FromWorkers().pytest_testnodedown(SimpleNamespace(workeroutput={"margins": [sent]}), None)
    margins.FromWorkers().pytest_testnodedown(SimpleNamespace(), "crashed")
    ((margin, test, name, interpreted),) = margins.recorded
    assert (margin, name, interpreted) == (0.3, "out", False)
    assert test.endswith("test_workers_hand_their_margins_to_the_process_that_prints_them")


def test_the_table_of_settings_names_the_closest_of_each(tmp_path):
    found = [
        margins.Margin(0.2, "tests/test_a.py::b", "out", True),
        margins.Margin(0.6, "tests/test_a.py::c", "lse", True),
    ]
    for name, part in (("0-1", found[:1]), ("5-2", found)):
        (tmp_path / f"{name}.json").write_text(json.dumps([margin._asdict() for margin in part]))
    text, worst = margins.table(tmp_path)
    assert worst == 0.6
    assert text.splitlines()[2:] == [
        "| the machine's own | 1 | 1 | 0.20 | out: test_a.py::b |",
        "| OPENBLAS_CORETYPE=Haswell | 2 | 2 | 0.60 | lse: test_a.py::c |",
    ]
