"""A driver that refuses a configuration: the launch takes the next one, remembers it, and says so."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from autotune_fakes import H100
from triton.runtime.errors import OutOfResources

import kvops
from kvops.autotune import explain, lookup, override, relaunch, specs
from kvops.autotune.store import Layer, Store
from kvops.kernels import compact, device, flash_backward_launch, flash_forward, paged_attention
from kvops.ops import registry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for the driver of the interpreter")

DEVICE = device.Device(H100.name, "cuda", "sm_90", 32, H100.num_sms, H100.shared_memory)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Launches choose for an H100 from an empty store, and run in the interpreter."""
    for module in (compact, flash_backward_launch, flash_forward, paged_attention):
        monkeypatch.setattr(module, "current_device", lambda: DEVICE)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("kvops.autotune.store._told", set())
    with lookup.using(Store([Layer("user", tmp_path, writable=True)])):
        yield tmp_path
    registry.forget_launches()


@pytest.fixture
def driver(monkeypatch):
    """``refuses(kernel, **options)`` says which launches the driver refuses; ``launches`` names those that came."""
    from triton.runtime.interpreter import InterpretedFunction

    state = SimpleNamespace(refuses=lambda kernel, **options: False, launches=[])
    run = InterpretedFunction.run

    def launch(self, *args, grid, warmup, **kwargs):
        options = {"BLOCK_N": None, **kwargs}
        state.launches.append((self.fn.__name__, options.get("num_warps")))
        if state.refuses(self.fn.__name__, **options):
            raise OutOfResources(250_000, H100.shared_memory, "shared memory")
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    # The door of CUDA tensors, for tensors without a device index.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    return state


def on_gpu(name, *args, **kwargs):
    with torch.no_grad():
        return registry._operators[name].on_gpu(*args, **kwargs)


def attention_inputs():
    return tuple(torch.randn(3, 1, 70, 2, 16))


def test_a_refused_launch_runs_with_the_next_configuration_and_says_so_once(store, driver, caplog):
    q, k, v = attention_inputs()
    expected, _ = kvops.flash_attention(q, k, v, causal=True)
    driver.launches.clear()
    default = specs()["flash_forward"].heuristic(problem_of(q), H100)
    driver.refuses = lambda kernel, **options: options["BLOCK_M"] == default.block_m
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out, _ = on_gpu("flash_attention", q, k, v, causal=True)
            torch.testing.assert_close(out, expected)
    # Refused, refused once more to find out what was, and from then on never asked again.
    assert [kernel for kernel, _ in driver.launches] == ["flash_forward_kernel"] * 5
    (message,) = [record.message for record in caplog.records]
    assert "flash_forward width=16 itemsize=4 mask=1 on NVIDIA H100 80GB HBM3: the driver refused block_m=" in message
    assert "Required: 250000" in message
    assert "python -m kvops.autotune explain flash_forward" in message


def problem_of(q):
    fields = specs()["flash_forward"].fields
    return dict(zip(fields, (q.shape[3], 4, 1, q.shape[2], q.shape[1], q.shape[1]), strict=True))


def test_explain_shows_what_was_refused_in_the_next_process_too(store, driver):
    q, k, v = attention_inputs()
    default = specs()["flash_forward"].heuristic(problem_of(q), H100)
    driver.refuses = lambda kernel, **options: options["BLOCK_M"] == default.block_m
    on_gpu("flash_attention", q, k, v, causal=True)
    value = json.loads((store / "refusals.jsonl").read_text())
    assert (value["op"], value["device"], value["config"]) == ("flash_forward", H100.name, vars(default))
    with lookup.using(Store([Layer("user", store, writable=True)])):  # reads the file again
        (choice,) = explain("flash_forward", problem_of(q), H100)
    assert choice.config != default
    assert choice.origin == "safe"
    assert "refused by the driver (out of resource: shared memory" in choice.reason
    assert any("refused by the driver" in refusal for refusal in choice.refused)
    driver.launches.clear()
    with lookup.using(Store([Layer("user", store, writable=True)])):
        on_gpu("flash_attention", q, k, v, causal=True)
    assert len(driver.launches) == 1
    # Refusals of other sources or of another GPU do not count.
    for name, other in (("source", "older"), ("triton", "0.0"), ("device", "another")):
        (store / "refusals.jsonl").write_text(json.dumps(value | {name: other}) + "\nno JSON\n")
        with lookup.using(Store([Layer("user", store, writable=True)])):
            assert explain("flash_forward", problem_of(q), H100)[0].config == default


def test_where_nothing_fits_the_error_says_what_was_tried(store, driver):
    q, k, v = attention_inputs()
    driver.refuses = lambda kernel, **options: True
    with pytest.raises(
        RuntimeError, match=r"flash_forward: no configuration can run width=16 .* on NVIDIA H100"
    ) as error:
        on_gpu("flash_attention", q, k, v)
    spec = specs()["flash_forward"]
    assert str(error.value).count("refused by the driver") > len(spec.candidates({**problem_of(q), "mask": 0}, H100))


def test_a_forced_configuration_and_other_errors_are_raised_as_they_are(store, driver):
    q, k, v = attention_inputs()
    driver.refuses = lambda kernel, **options: True
    with override("flash_forward", specs()["flash_forward"].config(16, 16, 4, 1)), pytest.raises(OutOfResources):
        on_gpu("flash_attention", q, k, v)
    assert len(driver.launches) == 1
    assert not (store / "refusals.jsonl").exists()

    def broken(kernel, **options):
        raise ZeroDivisionError("something else")

    driver.refuses = broken
    with pytest.raises(ZeroDivisionError, match="something else"):
        on_gpu("flash_attention", q, k, v)
    assert len(driver.launches) == 2


def test_the_kernel_that_was_refused_is_the_one_that_changes(store, driver):
    """The backward pass launches two families; the second is refused."""
    q, k, v = attention_inputs()
    out, lse = kvops.flash_attention(q, k, v)
    gradients = on_gpu("flash_attention_backward", out, q, k, v, out, lse)
    (default,) = {warps for kernel, warps in driver.launches if kernel == "flash_backward_queries_kernel"}
    driver.refuses = lambda kernel, **options: (
        kernel == "flash_backward_queries_kernel" and options["num_warps"] == default
    )
    again = on_gpu("flash_attention_backward", out, q, k, v, out, lse)
    for ours, theirs in zip(again[:3], gradients, strict=False):
        torch.testing.assert_close(ours, theirs)
    lines = [json.loads(line)["op"] for line in (store / "refusals.jsonl").read_text().splitlines()]
    assert set(lines) == {"flash_backward_queries"}


def test_scores_are_added_once_though_their_launch_was_refused(store, driver):
    """The scores are the third launch of three; the first two are repeated, which changes nothing."""
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(6, 4, 16)
    tables = torch.arange(4, dtype=torch.int32).view(2, 2, 1)
    lens = torch.tensor([[1, 4], [3, 0]], dtype=torch.int32)
    expected, scores = torch.zeros(6, 4), torch.zeros(6, 4)
    kvops.paged_attention(q, cache, cache, tables, lens, scores=expected)
    seen = []

    def refuses(kernel, **options):
        if kernel == "paged_scores_kernel":
            seen.append(options["num_stages"])
        return kernel == "paged_scores_kernel" and options["num_stages"] == seen[0]

    driver.refuses = refuses
    on_gpu("paged_attention", q, cache, cache, tables, lens, scores=scores)
    assert len(set(seen)) == 2
    torch.testing.assert_close(scores, expected)


def test_slots_are_moved_once_though_the_launch_for_another_array_was_refused(store, driver):
    """compact works in place, array by array: the keys had moved when the values were refused."""
    k, v = torch.randn(2, 6, 4, 16).unbind()
    tables = torch.tensor([[[2, 0], [5, 1]]], dtype=torch.int32)
    lens, keep = torch.tensor([[8, 5]], dtype=torch.int32), torch.rand(1, 2, 8) > 0.4
    expected = [x.clone() for x in (k, v, lens)]
    kvops.compact(*expected[:2], tables, expected[2], keep)
    driver.launches.clear()
    driver.refuses = lambda kernel, **options: len(driver.launches) in (2, 3)
    on_gpu("compact", k, v, tables, lens, keep)
    assert len(driver.launches) == 4
    for ours, theirs in zip((k, v, lens), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_call_that_runs_is_neither_repeated_nor_watched(store, driver, monkeypatch):
    monkeypatch.setattr(relaunch, "relaunched", None)
    monkeypatch.setattr(lookup, "watch", None)
    on_gpu("flash_attention", *attention_inputs())
    assert len(driver.launches) == 1
