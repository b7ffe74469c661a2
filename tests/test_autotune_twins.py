"""Two kernels for the same results: the one for Hopper runs where a record of the very GPU proves it, and says so."""

from dataclasses import replace

import pytest
import torch
from autotune_fakes import H100, H200, record
from gluon_model import Multiprocessor
from oracle import assert_accurate, attention, attention_mask
from rounding import rounded

import kvops
from kvops.autotune import commands, invariant, lookup, override, prune, specs, tuner, watch
from kvops.autotune.__main__ import main
from kvops.autotune.config import AttentionConfig, GluonFlashForwardConfig
from kvops.autotune.devices import by_name
from kvops.autotune.inspect import TARGETS
from kvops.autotune.store import JOURNAL, Layer, Store
from kvops.autotune.timing import relative_error
from kvops.kernels import flash_forward as launcher
from kvops.kernels import gluon_flash_forward as hopper
from kvops.kernels.device import Device

GLUON, PACKED, TRITON = "gluon_flash_forward", "gluon_flash_forward_varlen", "flash_forward"
SPEC = specs()[GLUON]
DEVICE = Device(H100.name, "cuda", "sm_90", 32, H100.num_sms, H100.shared_memory)
PROBLEM = {"width": 64, "itemsize": 2, "mask": 1, "heads": 4, "seqlen_q": 128, "seqlen_k": 256}
CONFIG, OTHER = GluonFlashForwardConfig(64, 64, 4, 216, 72), GluonFlashForwardConfig(64, 128, 2, 216, 72)
TILE = AttentionConfig(64, 64, 4, 2)


def measured(op, us, *, borrowed=False, **changes):
    config = changes.pop("config", TILE if op == TRITON else CONFIG)
    found = record(op, us=us, config=config, **{**PROBLEM, **changes})
    return replace(found, origin="borrowed") if borrowed else found


def inputs(dtype=torch.bfloat16):
    q = torch.randn(1, 128, 4, 64).to(dtype)
    k, v = torch.randn(2, 1, 256, 2, 64).to(dtype)
    return q, k, v


@pytest.fixture
def layers(tmp_path):
    """An empty store of a user and of what overrides it; look-ups answer from it alone."""
    found = {name: Layer(name, tmp_path / name, writable=True) for name in ("override", "user")}
    with lookup.using(Store([found["user"], found["override"]])):
        yield found


@pytest.fixture
def keep(layers):
    """Put records into a layer of the store."""

    def insert(*records, layer="user"):
        for each in records:
            assert layers[layer].insert(each)
        lookup.forget_records()

    return insert


@pytest.fixture
def launched(layers, monkeypatch):
    """Names and configurations of what launches of the dense forward ran on a pretended H100."""
    runs = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            names = ("STAGES",) if self.name == GLUON else ("BLOCK_M", "BLOCK_N")
            return lambda *arguments, **constants: runs.append((self.name, *(constants[name] for name in names)))

    for module in (launcher, hopper):
        monkeypatch.setattr(module, "current_device", lambda: DEVICE)
    monkeypatch.setattr(launcher, "flash_forward_kernel", Kernel(TRITON))
    monkeypatch.setattr(hopper, "gluon_flash_forward_kernel", Kernel(GLUON))

    def launch(*tensors, **options):
        runs.clear()
        launcher.flash_forward(*(tensors or inputs()), **{"causal": True, **options})
        (run,) = runs
        return run

    return launch


ELSEWHERE = {"seqlen_q": 256}  # a doubling away
DECIDED = {
    "no record": ([], TRITON, "no record"),
    "faster": ([(GLUON, 90.0, {}), (TRITON, 100.0, {})], GLUON, "takes 90.0 µs"),
    "slower": ([(GLUON, 110.0, {}), (TRITON, 100.0, {})], TRITON, "takes 110.0 µs"),
    "as fast": ([(GLUON, 100.0, {}), (TRITON, 100.0, {})], TRITON, "flash_forward 100.0"),
    "alone": ([(GLUON, 90.0, {})], GLUON, "flash_forward has no record of that"),
    "nearest, faster there": ([(GLUON, 90.0, ELSEWHERE), (TRITON, 100.0, ELSEWHERE)], GLUON, "seqlen_q=256"),
    "nearest, slower there": (
        [(GLUON, 90.0, ELSEWHERE), (TRITON, 80.0, ELSEWHERE), (TRITON, 1000.0, {})],
        TRITON,
        "flash_forward 80.0",
    ),
    "the twin faster elsewhere": ([(GLUON, 90.0, {}), (TRITON, 80.0, ELSEWHERE)], GLUON, "no record of that"),
    "another device": ([(GLUON, 90.0, {"device": H200})], TRITON, "has not been measured"),
    "another device beside this": ([(GLUON, 110.0, {}), (TRITON, 100.0, {"device": H200})], GLUON, "no record of that"),
    "older sources": ([(GLUON, 90.0, {"source": "older"})], TRITON, "other-version"),
    "another Triton": ([(GLUON, 90.0, {"triton": "3.5.0"})], TRITON, "other-version"),
    "not measured": ([(GLUON, 90.0, {"borrowed": True})], TRITON, "has not been measured"),
    "an older record of the twin": ([(GLUON, 90.0, {}), (TRITON, 80.0, {"source": "older"})], TRITON, "80.0"),
    "another mask": ([(GLUON, 90.0, {"mask": 0})], TRITON, "no record"),
}


@pytest.mark.parametrize("name", DECIDED)
def test_the_hopper_kernel_runs_where_a_measurement_of_this_very_gpu_has_it_faster(name, keep, launched):
    records, winner, why = DECIDED[name]
    keep(*(measured(op, us, **changes) for op, us, changes in records))
    assert launched()[0] == winner
    for op in (GLUON, TRITON):
        (choice,) = lookup.explain(op, PROBLEM, H100)
        assert choice.runs.startswith(f"{winner}: ")
        assert why in choice.runs


def test_it_runs_with_the_configuration_of_its_record(keep, launched):
    keep(measured(GLUON, 90.0), measured(TRITON, 100.0))
    assert launched() == (GLUON, CONFIG.stages)
    keep(measured(GLUON, 90.0, config=OTHER))
    assert launched() == (GLUON, OTHER.stages)
    keep(measured(TRITON, 80.0))
    assert launched() == (TRITON, TILE.block_m, TILE.block_n)


def refused(monkeypatch):
    q, k, v = inputs()
    yield "float32", (q.float(), k.float(), v.float()), {}, None
    yield "ALiBi", (q, k, v), {"alibi_slopes": torch.zeros(4)}, "has no ALiBi"
    yield "bias", (q, k, v), {"bias": torch.ones(1).bool()}, "has no bias"
    yield "dropout", (q, k, v), {"dropout_p": 0.1, "dropout_seed": torch.zeros(1).long()}, "has no dropout"
    yield "scale", (q, k, v), {"scale": -1.0}, "positive scale"
    wide = torch.zeros(1, 256, 2, 68, dtype=torch.bfloat16)
    yield "strides", (q, wide[..., :64], v), {}, "k aligned"


@pytest.mark.parametrize("place", range(6))
def test_arguments_that_it_cannot_take_run_the_twin_and_a_watcher_sees_why(place, keep, launched, monkeypatch):
    keep(measured(GLUON, 90.0), measured(TRITON, 100.0))
    _, tensors, options, reason = list(refused(monkeypatch))[place]
    for _ in range(2):  # cold and warm
        assert launched(*tensors, **options)[0] == TRITON
    with watch() as choices:
        launched(*tensors, **options)
    assert [choice.spec.name for choice in choices] == ([TRITON] if reason is None else [GLUON, TRITON])
    if reason is not None:
        assert choices[0].origin == "refused"
        assert reason in choices[0].reason
    assert launched()[0] == GLUON  # what was refused once is not refused for ever


def test_a_watcher_sees_what_runs_and_nothing_else(keep, launched):
    for records, name, origin in (
        ([], TRITON, "heuristic"),
        ([measured(GLUON, 90.0)], GLUON, "exact"),
        ([measured(TRITON, 80.0)], TRITON, "exact"),
    ):
        keep(*records)
        with watch() as choices:
            assert launched()[0] == name
        assert [(choice.spec.name, choice.origin) for choice in choices] == [(name, origin)]


def test_it_is_decided_once_and_its_arguments_are_looked_at_each_time(keep, launched, monkeypatch):
    keep(measured(GLUON, 90.0))
    assert launched()[0] == GLUON
    launched(alibi_slopes=torch.zeros(4))  # makes the twin's choice, too
    monkeypatch.setattr(lookup, "resolve", None)
    monkeypatch.setattr(lookup, "contest", None)
    assert launched()[0] == GLUON
    assert launched(alibi_slopes=torch.zeros(4))[0] == TRITON


def test_overrides_hold_for_whichever_they_name_and_the_last_entered_wins(keep, launched):
    keep(measured(GLUON, 90.0))
    with override(TRITON, TILE):
        assert launched() == (TRITON, 64, 64)
        with override(GLUON, OTHER):
            assert launched() == (GLUON, OTHER.stages)
            with override(TRITON, AttentionConfig(128, 32, 4, 2)):
                assert launched() == (TRITON, 128, 32)
            assert launched() == (GLUON, OTHER.stages)
            assert launched(alibi_slopes=torch.zeros(4)) == (TRITON, 64, 64)
        assert launched() == (TRITON, 64, 64)
    assert launched() == (GLUON, CONFIG.stages)
    keep(measured(TRITON, 80.0))
    with override(GLUON, OTHER):
        assert launched() == (GLUON, OTHER.stages)
    assert launched()[0] == TRITON


def test_the_override_folder_beats_a_faster_record_of_the_twin(keep, launched):
    keep(measured(TRITON, 10.0))
    keep(measured(GLUON, 90.0, source="older"), layer="override")
    assert launched()[0] == GLUON
    keep(measured(TRITON, 80.0), layer="override")  # both named there: the faster
    assert launched()[0] == TRITON


def test_the_override_folder_can_name_the_twin(keep, launched):
    keep(measured(GLUON, 10.0))
    keep(measured(TRITON, 90.0), layer="override")
    assert launched()[0] == TRITON


def test_batch_invariance_keeps_to_one_kernel(keep, launched, monkeypatch):
    keep(measured(GLUON, 90.0))
    with invariant():
        assert launched()[0] == TRITON
        assert lookup.explain(GLUON, PROBLEM, H100)[0].runs.startswith("flash_forward: batch-invariant")
    assert launched()[0] == GLUON
    monkeypatch.setenv("KVOPS_BATCH_INVARIANT", "1")
    lookup.forget_records()
    assert launched()[0] == TRITON


def test_a_gpu_that_stands_for_its_architecture_has_measured_nothing(keep, launched, monkeypatch):
    """Compiling without a GPU goes the way of a launch on an H100: it must not hang on anybody's records."""
    keep(measured(GLUON, 90.0))
    for module in (launcher, hopper):
        monkeypatch.setattr(module, "current_device", lambda: DEVICE._replace(name="sm_90"))
    assert launched()[0] == TRITON


def test_a_problem_without_a_measurement_is_journaled_for_both_where_both_can_run(layers, keep, launched, monkeypatch):
    def misses():
        lookup._open_journal().flush()
        path = layers["override"].folder / JOURNAL
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        lookup.forget_records()
        lookup._journal = None
        return sorted(line.split('"op": "')[1].split('"')[0] for line in lines)

    launched()
    assert misses() == [TRITON, GLUON]
    launched(alibi_slopes=torch.zeros(4))
    launched(*inputs(torch.float32))
    assert misses() == [TRITON, TRITON]
    with override(TRITON, TILE):  # as the tuner does
        launched()
    assert misses() == []
    keep(measured(GLUON, 90.0))
    launched()
    assert misses() == []
    for module in (launcher, hopper):
        monkeypatch.setattr(module, "current_device", lambda: DEVICE._replace(name="NVIDIA L4", arch="sm_89"))
    launched()
    assert misses() == [TRITON]


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the model of a multiprocessor")
def test_what_is_chosen_computes_attention(keep, monkeypatch):
    """The whole way, from the operator to the kernel's own source on a model of the hardware."""
    q, k, v = inputs()
    keep(measured(GLUON, 90.0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (launcher, hopper):
        monkeypatch.setattr(module, "current_device", lambda: DEVICE._replace(num_sms=3))
    model = Multiprocessor(hopper.gluon_flash_forward_kernel, 1)
    monkeypatch.setattr(hopper, "gluon_flash_forward_kernel", model)
    out, lse = kvops.flash_attention(q, k, v, causal=True)
    assert model.loaded
    mask = attention_mask(128, 256, causal=True)
    exact_out, exact_lse, _ = attention(q, k, v, mask=mask)
    same_out, same_lse, _ = rounded(q.dtype, attention, q, k, v, mask=mask)
    assert_accurate(out, exact_out, same_out, "out")
    assert_accurate(lse, exact_lse, same_lse, "lse")


def packed(tensors):
    """The same problem as two sequences of 128 queries and 256 keys, of half as many heads."""
    ends = [torch.tensor([0, 100, length], dtype=torch.int32) for length in (128, 256)]
    return *(tensor[0, :, : tensor.shape[2] // 2] for tensor in tensors), *ends, 128, 256


def test_packed_sequences_are_decided_by_records_of_their_own(keep, launched, monkeypatch):
    def launched_packed(**options):
        with watch() as choices:
            launcher.flash_forward_varlen(*packed(inputs()), **{"causal": True, **options})
        return [(choice.spec.name, choice.origin) for choice in choices]

    keep(measured(GLUON, 90.0))
    assert launched_packed() == [(TRITON, "heuristic")]
    keep(measured(PACKED, 80.0, config=OTHER), measured(GLUON, 110.0), measured(TRITON, 100.0))
    assert launched_packed() == [(PACKED, "exact")]
    assert launched()[0] == TRITON
    assert launched_packed(alibi_slopes=torch.zeros(2)) == [(PACKED, "refused"), (TRITON, "exact")]
    keep(measured(TRITON, 70.0))
    assert launched_packed() == [(TRITON, "exact")]
    with override(PACKED, OTHER):
        assert launched_packed() == [(PACKED, "override")]
        assert launched()[0] == TRITON


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the model of a multiprocessor")
def test_what_is_chosen_for_packed_sequences_computes_attention(keep, monkeypatch):
    given = packed(inputs())
    expected = kvops.flash_attention_varlen(*given, causal=True)
    keep(measured(PACKED, 90.0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (launcher, hopper):
        monkeypatch.setattr(module, "current_device", lambda: DEVICE._replace(num_sms=3))
    model = Multiprocessor(hopper.gluon_flash_forward_kernel, 1)
    monkeypatch.setattr(hopper, "gluon_flash_forward_kernel", model)
    found = kvops.flash_attention_varlen(*given, causal=True)
    assert model.loaded
    assert relative_error(found, expected) < torch.finfo(torch.bfloat16).eps


# What is tuned, compiled and explained


@pytest.mark.parametrize("op", sorted(spec.name for spec in specs().values() if spec.twin))
def test_only_hopper_has_candidates_and_not_too_many(op):
    spec = specs()[op]
    for target in TARGETS:
        for problem in spec.problems:
            found = spec.candidates(problem, by_name(target))
            assert bool(found) == (target == "sm_90")
            assert len(found) <= 16
            assert not spec.candidates({**problem, "itemsize": 4}, by_name(target))
            assert not spec.candidates({**problem, "width": 512}, by_name(target))
    assert {task.target for task in prune.tasks([spec], prune.TARGET_ORDER)} == {"sm_90"}
    assert specs()[spec.twin].fields == spec.fields
    assert set(spec.operators) <= set(specs()[spec.twin].operators)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (replace(CONFIG, block_rows=32), "block_rows"),
        (replace(CONFIG, block_n=96), "block_n"),
        (replace(CONFIG, consumer_registers=240), "2 x 240 + 72"),
        (replace(CONFIG, producer_registers=20), "multiples of 8"),
        (replace(CONFIG, stages=14), "shared memory"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(config, reason):
    assert reason in SPEC.refuse(config, PROBLEM, H100)
    assert SPEC.refuse(CONFIG, PROBLEM, H100) is None


@pytest.mark.parametrize("op", [GLUON, "flash_attention"])
def test_the_command_line_says_which_runs_and_why(op, layers, capsys):
    problem = ",".join(f"{name}={value}" for name, value in PROBLEM.items())

    def explained(device=H100.name):
        words = ["explain", op, "--device", device, "--problem", problem, "--store", str(layers["user"].folder)]
        assert main(words) == 0
        return capsys.readouterr().out

    assert "  runs flash_forward: gluon_flash_forward has not been measured on NVIDIA H100" in explained()
    layers["user"].insert(measured(GLUON, 90.0))
    layers["user"].insert(measured(TRITON, 100.0))
    text = explained()
    assert text.count("  runs gluon_flash_forward: gluon_flash_forward takes 90.0 µs") == (1 if op == GLUON else 2)
    assert "flash_forward 100.0" in text
    text = explained("sm_80")
    assert "runs" not in text
    assert ("cannot run this kernel" in text) == (op == GLUON)


def test_tuning_finds_its_records_and_launches_follow_them(layers, monkeypatch, capsys, launched):
    """The command, with times that are made up: on a GPU without candidates there is nothing to do."""

    class Bench:
        def __init__(self, worker, spec, problem, limit):
            self.name = spec.name

        def check(self, config):
            return {"error": 0.0, "limit": 1e-3}

        def measure(self, configs, rounds):
            times = [90.0 if self.name == TRITON else 80.0 if config.stages == 4 else 85.0 for config in configs]
            return [[time] * rounds for time in times]

    shapes = layers["user"].folder / "shapes.jsonl"
    shapes.parent.mkdir(parents=True)
    shapes.write_text("".join(f'{{"op": "{op}", "problem": {PROBLEM}}}\n'.replace("'", '"') for op in (GLUON, TRITON)))
    words = ["tune", "--shapes", str(shapes), "--store", str(layers["user"].folder)]
    monkeypatch.setattr(tuner, "WorkerBench", Bench)
    monkeypatch.setattr(commands, "this_gpu", lambda: by_name("sm_80"))
    assert main(words) == 0
    assert "1 problems to tune on NVIDIA A100" in capsys.readouterr().out
    monkeypatch.setattr(commands, "this_gpu", lambda: H100)
    assert main(words) == 0
    assert "2 problems to tune on NVIDIA H100" in capsys.readouterr().out
    lookup.forget_records()
    assert launched() == (GLUON, 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the model of a multiprocessor")
@pytest.mark.parametrize(("op", "mask"), [(GLUON, 0), (GLUON, 2), (PACKED, 1)])
def test_what_the_tuner_runs_is_the_kernel_held_to_its_reference(op, mask, layers, monkeypatch):
    monkeypatch.setattr(hopper, "current_device", lambda: DEVICE._replace(num_sms=3))
    model = Multiprocessor(hopper.gluon_flash_forward_kernel, 1)
    monkeypatch.setattr(hopper, "gluon_flash_forward_kernel", model)
    problem = {**PROBLEM, "mask": mask, "seqlen_q": 100, "heads": 2}
    workload = prune.build_workload(specs()[op], problem, "cpu", True)
    with override(op, CONFIG):
        outputs = workload.run()
    assert relative_error(outputs, workload.exact()) < torch.finfo(torch.bfloat16).eps
