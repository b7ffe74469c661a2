"""What a launch gets: the order of look-up, its limits, and its reasons."""

import itertools
import math
import os
import random
from dataclasses import replace

import pytest
import torch
from autotune_fakes import H100, H200, record, triton_version
from machine_suite import MACHINE

import kvops
from kvops.autotune import choose, explain, feasibility, invariant, lookup, override, register, specs, watch
from kvops.autotune.architectures import family, has_tma
from kvops.autotune.config import PagedAppendConfig
from kvops.autotune.devices import KNOWN_DEVICES, DeviceFacts, by_name, distance, facts_of
from kvops.autotune.feasibility import Group, Proof, Table, current_source, dump_table, judge, parse_table
from kvops.autotune.inspect import TARGETS
from kvops.autotune.store import Layer, Store, default_layers, user_folder
from kvops.kernels.device import Device

SPEC = specs()["paged_append"]
PROBLEM = SPEC.problems[0]
DEVICE = Device(H100.name, "cuda", "sm_90", 32, H100.num_sms, H100.shared_memory)
FIRST, SECOND, THIRD = (PagedAppendConfig(block_t, 4) for block_t in (4, 16, 32))


@pytest.fixture
def store(tmp_path):
    """An empty store of layers ``site`` and ``user``; look-ups answer from it alone."""
    layers = [Layer(name, tmp_path / name, writable=True) for name in ("site", "user")]
    with lookup.using(Store(layers)):
        yield layers


def answer(**changes):
    lookup.forget_records()
    return lookup.resolve(SPEC, {**PROBLEM, **changes}, H100)


def proved(monkeypatch, device, configs, proof):
    table = Table()
    table.put(device.arch, SPEC.proof_of(PROBLEM), Group(current_source(SPEC), "3.7.1", dict.fromkeys(configs, proof)))
    monkeypatch.setattr(feasibility, "load_table", lambda spec: table)


def test_nearer_records_win_one_after_the_other(store, monkeypatch):
    assert answer(tokens=512).origin == "heuristic"
    proved(monkeypatch, H100, [THIRD], Proof(registers=50))
    store[1].insert(record(tokens=512, device=H200, config=THIRD))
    assert (answer(tokens=512).origin, answer(tokens=512).config) == ("other-device", THIRD)
    store[1].insert(record(tokens=512, triton="3.5.0", config=SECOND))
    assert (answer(tokens=512).origin, answer(tokens=512).config) == ("other-version", SECOND)
    store[1].insert(record(tokens=1024, config=FIRST))
    assert (answer(tokens=512).origin, answer(tokens=512).distance) == ("nearest", 1.0)
    store[1].insert(record(tokens=400, config=SECOND))
    assert answer(tokens=512).origin == "bucket"
    store[0].insert(record(tokens=512, config=THIRD))
    assert (answer(tokens=512).origin, answer(tokens=512).config) == ("exact", THIRD)
    store[1].insert(record(tokens=512, config=FIRST))
    assert answer(tokens=512).config == FIRST  # the user's layer over the site's
    with override("paged_append", SECOND):
        assert (answer(tokens=512).origin, answer(tokens=512).config) == ("override", SECOND)
    assert answer(tokens=512).config == FIRST


def test_the_override_folder_beats_a_nearer_record_of_the_user(tmp_path):
    user, named = Layer("user", tmp_path / "user", writable=True), Layer("override", tmp_path / "named", writable=True)
    user.insert(record(tokens=512, config=FIRST))
    named.insert(record(tokens=1024, config=SECOND))
    with lookup.using(Store([user, named])):
        assert (answer(tokens=512).origin, answer(tokens=512).config) == ("override", SECOND)


def test_nothing_is_borrowed_from_too_far(store):
    store[1].insert(record(tokens=1, config=THIRD))
    assert answer(tokens=16).origin == "nearest"
    assert answer(tokens=17).origin == "heuristic"  # 4.1 doublings
    assert answer(tokens=1, width=64).origin == "heuristic"  # another key
    store[1].insert(record(tokens=4096, device=by_name("NVIDIA A100-SXM4-80GB"), config=THIRD))
    assert answer(tokens=4096).origin == "heuristic"


def test_what_another_gpu_measured_runs_only_if_proved_for_this_one(store, monkeypatch):
    store[1].insert(record(device=H200, config=THIRD))
    for proof, reason in (
        (None, "never compiled"),
        (Proof(spills=2), "spill"),
        (Proof(shared_memory=H100.shared_memory + 1), "shared memory"),
        (Proof(problem="does not compile"), "does not compile"),
    ):
        proved(monkeypatch, H100, [THIRD] if proof else [], proof)
        choice = answer()
        assert choice.origin == "heuristic"
        assert reason in choice.refused[0]
    proved(monkeypatch, H100, [THIRD], Proof())
    assert answer().origin == "other-device"
    stale = Table()
    stale.put("sm_90", SPEC.proof_of(PROBLEM), Group("older", "3.7.1", {THIRD: Proof()}))
    monkeypatch.setattr(feasibility, "load_table", lambda spec: stale)
    assert "other sources" in answer().refused[0]


def test_a_record_that_cannot_run_is_refused_with_its_reason(store):
    store[1].insert(record(config=PagedAppendConfig(3, 4)))
    choice = answer()
    assert choice.origin == "heuristic"
    assert "power of two" in choice.refused[0]


def with_shared_memory(size):
    return DeviceFacts("tiny", "sm_120", 8, size)


def test_a_heuristic_that_does_not_fit_gives_way_to_a_candidate_that_does():
    spec = specs()["flash_forward"]
    choice = lookup.resolve(spec, spec.problems[0], with_shared_memory(60_000))
    assert choice.origin == "safe"
    assert "shared memory" in choice.reason
    assert choice.verdict.status == "proven"


def test_what_a_table_says_does_not_fit_is_not_launched():
    """Predicates count less than a kernel takes: 24,576 bytes here, where it takes 36,864."""
    spec = specs()["flash_forward"]
    problem = {**spec.problems[0], "itemsize": 4}
    choice = lookup.resolve(spec, problem, with_shared_memory(30_000))
    assert spec.refuse(spec.heuristic(problem, choice.device), problem, choice.device) is None
    assert (choice.origin, choice.verdict.status) == ("safe", "proven")
    assert "takes 36864 bytes of shared memory, tiny has 30000" in choice.reason


def test_without_a_configuration_that_fits_a_launch_says_so(store):
    values = specs()["flash_forward"].problems[0]
    message = (
        "flash_forward: no configuration can run width=128 .* on tiny: no candidate fits, and the heuristic's choice"
    )
    with pytest.raises(RuntimeError, match=message):
        choose("flash_forward", Device("tiny", "cuda", "sm_120", 32, 8, 50_000), *values.values())


def test_a_heuristic_that_was_never_compiled_for_a_gpu_gives_way_to_a_candidate_that_was(store, monkeypatch):
    default, first, second = SPEC.candidates(PROBLEM, H100)[:3]
    proved(monkeypatch, H100, [second], Proof(40))
    choice = answer()
    assert (choice.config, choice.origin) == (second, "safe")
    assert choice.reason.endswith("is unproven: never compiled for sm_90")
    proved(monkeypatch, H100, [default, second], Proof(40))
    assert (answer().config, answer().origin) == (default, "heuristic")
    proved(monkeypatch, H100, [first], Proof(255, spills=2))  # spills are no better than nothing known
    assert answer().config == default


def test_a_proof_for_wider_heads_holds_for_narrower_ones_on_the_same_gpu(store, monkeypatch):
    narrow = {**PROBLEM, "width": 16}
    proved(monkeypatch, H100, [FIRST], Proof(40, shared_memory=100))
    verdict = judge(SPEC, FIRST, narrow, H100)
    assert (verdict.status, verdict.proof) == ("proven", Proof(40, shared_memory=100))
    assert f"for heads of {PROBLEM['width']}, which take more" in verdict.reason
    assert judge(SPEC, FIRST, {**PROBLEM, "width": 512}, H100).status == "unproven"
    assert judge(SPEC, FIRST, {**narrow, "itemsize": 4}, H100).status == "unproven"
    for proof in (Proof(spills=1), Proof(problem="does not compile"), Proof(shared_memory=H100.shared_memory + 1)):
        proved(monkeypatch, H100, [FIRST], proof)
        assert judge(SPEC, FIRST, narrow, H100).status == "unproven"


def test_a_heuristic_that_spills_gives_way_to_the_first_candidate_that_does_not(store, monkeypatch):
    default, first, second = SPEC.candidates(PROBLEM, H100)[:3]
    clean, spilled = Proof(40), Proof(255, spills=4)
    table = Table()
    rows = {default: spilled, first: spilled, second: clean}
    table.put("sm_90", SPEC.proof_of(PROBLEM), Group(current_source(SPEC), "3.7.1", rows))
    monkeypatch.setattr(feasibility, "load_table", lambda spec: table)
    assert (answer().config, answer().origin) == (second, "heuristic")
    assert answer().reason.endswith(" spills")
    rows[second] = spilled
    assert answer().config == default
    assert "spills" not in answer().reason
    rows[default], rows[second] = clean, clean
    assert answer().config == default


def test_a_heuristic_that_spills_does_not_leave_its_numerics_class_where_bits_may_not_change(store, monkeypatch):
    spec = specs()["flash_forward"]
    problem = spec.problems[0]
    default, *others = spec.candidates(problem, H100)
    assert spec.numerics(others[0]) != spec.numerics(default)
    table, rows = Table(), {default: Proof(255, spills=4)} | dict.fromkeys(others, Proof(40))
    table.put("sm_90", spec.proof_of(problem), Group(current_source(spec), "3.7.1", rows))
    monkeypatch.setattr(feasibility, "load_table", lambda spec: table)
    assert lookup.resolve(spec, problem, H100).config == others[0]
    with invariant():
        assert spec.numerics(lookup.resolve(spec, problem, H100).config) == spec.numerics(default)


def test_a_choice_is_made_once_and_remembered(store, monkeypatch):
    values = tuple(PROBLEM.values())
    first = choose("paged_append", DEVICE, *values)
    monkeypatch.setattr(lookup, "resolve", None)
    assert choose("paged_append", DEVICE, *values) is first
    lookup.forget()


def test_a_miss_reaches_the_journal_and_a_hit_does_not(store):
    store[1].insert(record(config=FIRST))
    values = {**PROBLEM, "tokens": 4096}
    choose("paged_append", DEVICE, *PROBLEM.values())
    choose("paged_append", DEVICE, *values.values())
    lookup._open_journal().flush()
    assert (store[1].folder / "misses.jsonl").read_text().count("\n") == 1


def test_a_choice_prints_in_a_few_lines(store):
    text = repr(explain("paged_append", None, "NVIDIA H100 80GB HBM3")[0])
    assert text.startswith("Choice(paged_append(")
    assert " on NVIDIA H100 80GB HBM3: " in text
    assert len(text) < 400


def test_an_unknown_operator_or_device_is_named():
    with pytest.raises(KeyError):
        choose("no_such_kernel", DEVICE, 1)
    with pytest.raises(ValueError, match=r"op: expected one of flash_forward.* got 'no_such"):
        explain("no_such_kernel", None, "sm_90")
    with pytest.raises(ValueError, match=r"device: expected the name of a GPU"):
        explain("compact", None, "GeForce 256")
    with pytest.raises(ValueError, match=r"problem: expected the fields width"):
        explain("paged_append", {"width": 128}, "sm_90")
    with pytest.raises(TypeError, match="config: expected PagedAppendConfig"), override("paged_append", object()):
        pass
    with pytest.raises(ValueError, match="name: expected a name other than those of kvops"):
        register(SPEC)


@pytest.mark.skipif(bool(MACHINE), reason="compiled kernels on the machine for PTX look for configurations")
def test_the_interpreter_and_the_eager_path_never_touch_the_disk(monkeypatch, backend):
    def refuse(*arguments):
        raise AssertionError("a file was looked for")

    lookup.forget()
    monkeypatch.setattr(lookup, "_open_store", refuse)
    monkeypatch.setattr(lookup, "_open_journal", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    kvops.flash_attention(*torch.randn(3, 1, 16, 2, 16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's choices")
def test_an_override_reaches_the_kernel_and_watch_sees_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, v = torch.randn(3, 1, 40, 2, 16)
    config = specs()["flash_forward"].config(16, 16, 4, 1)
    expected, _ = kvops.flash_attention(q, k, v, causal=True)
    with watch() as choices, override("flash_forward", config):
        out, _ = kvops.flash_attention(q, k, v, causal=True)
    (choice,) = choices
    assert (choice.config, choice.origin) == (config, "override")
    assert dict(choice.problem) == {"width": 16, "itemsize": 4, "mask": 1, "heads": 2, "seqlen_q": 40, "seqlen_k": 40}
    torch.testing.assert_close(out, expected)


def test_batch_invariant_choices_are_of_one_class(store):
    spec = specs()["flash_forward"]
    problem = {**spec.problems[0], "seqlen_q": 1024, "seqlen_k": 1024}
    sizes = [{**problem, "seqlen_q": length} for length in (1, 17, 100, 1024, 9000)]
    default = spec.heuristic(spec.problems[0], H100)
    config = spec.config(default.block_m, default.block_n, default.num_warps, default.num_stages + 1)
    other = spec.config(64, 64, 4, 2)
    store[1].insert(record("flash_forward", config=other, **problem))
    assert len({spec.numerics(lookup.resolve(spec, each, H100).config) for each in sizes}) > 1
    with invariant():
        assert {lookup.resolve(spec, each, H100).config for each in sizes} == {default}
        # Another number of stages gives the same bits and may be borrowed.
        store[1].insert(record("flash_forward", config=config, **problem))
        lookup.forget_records()
        chosen = {lookup.resolve(spec, each, H100).config for each in sizes}
        assert chosen == {default, config}
        assert len({spec.numerics(each) for each in chosen}) == 1


def test_layers_come_from_the_environment(monkeypatch, tmp_path):
    for name in ("KVOPS_CACHE_DIR", "KVOPS_SITE_DIR", "KVOPS_AUTOTUNE_OVERRIDE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_folder() == tmp_path / ".cache" / "kvops" / "autotune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_folder() == tmp_path / "xdg" / "kvops" / "autotune"
    monkeypatch.setenv("KVOPS_SITE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("KVOPS_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("KVOPS_AUTOTUNE_OVERRIDE", str(tmp_path / "named"))
    assert [layer.name for layer in default_layers()] == ["shipped", "site", "user", "override"]
    monkeypatch.delenv("KVOPS_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home at all
    assert [layer.name for layer in default_layers()] == ["shipped", "site", "override"]


def test_near_gpus_are_near_and_others_infinitely_far():
    a100, h20, b200 = by_name("sm_80"), by_name("NVIDIA H20"), by_name("sm_100")
    assert distance(H100, H100) == 0
    assert distance(H100, H200) == pytest.approx(0.519, abs=0.01)  # bandwidth 3350 to 4800
    assert distance(H100, H200) < distance(H100, h20) < 1.5
    assert distance(H100, a100) == distance(H100, b200) == float("inf")
    assert distance(by_name("NVIDIA A10"), a100) > 1.5
    unknown = Device("NVIDIA H900", "cuda", "sm_90", 32, 132, 232_448)
    assert facts_of(unknown).bandwidth == 0
    assert facts_of(DEVICE) == H100
    assert {device.arch for device in KNOWN_DEVICES.values()} == set(TARGETS)


def test_no_default_of_paged_attention_asks_for_more_shared_memory_than_a_gpu_has():
    """Heads wider than 128 with drafts asked for 102,656 to 133,248 bytes on GPUs that have 101,376."""
    spec = specs()["paged_attention"]
    for device in KNOWN_DEVICES.values():
        for width, rows, dtypes in itertools.product(
            (16, 64, 128, 256, 512), (1, 16, 17, 64, 256), ((2, 2), (2, 1), (4, 4))
        ):
            problem = dict(zip(spec.fields, (width, *dtypes, 16, rows, 64, 8192), strict=True))
            assert spec.refuse(spec.heuristic(problem, device), problem, device) is None


@pytest.mark.parametrize(("arch", "other"), [("sm_103", "sm_100"), ("sm_121", "sm_120"), ("gfx940", "gfx942")])
def test_an_architecture_starts_from_what_is_known_of_its_family(arch, other, store, monkeypatch):
    """It was taken for unknown: no descriptors, nothing proven, nothing borrowed."""
    assert (family(arch), has_tma(arch)) == (other, has_tma(other))
    known = by_name(other)
    ours = replace(known, name="new", arch=arch)
    for spec in specs().values():
        for problem in spec.problems:
            assert spec.heuristic(problem, ours) == spec.heuristic(problem, known)
    assert distance(ours, known) < math.inf
    proved(monkeypatch, known, [FIRST], Proof(registers=50))
    verdict = judge(SPEC, FIRST, PROBLEM, ours)
    assert verdict.status == "proven"
    assert f"for {other}, whose family has {arch}" in verdict.reason


@pytest.mark.parametrize("arch", ["sm_75", "sm_86", "sm_130", "gfx90a", "gfx1100", "interpreter"])
def test_other_architectures_are_their_own_family(arch):
    assert family(arch) == arch
    assert not has_tma(arch)


OPERATORS = sorted({operator for spec in specs().values() for operator in spec.operators})


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_explained_for_every_known_gpu_without_one(operator):
    assert hasattr(torch.ops.kvops, operator)
    for name, device in KNOWN_DEVICES.items():
        for choice in explain(operator, None, name):
            assert choice.device == device
            assert choice.verdict.status == "proven" or (choice.spec.twin and choice.verdict.status == "spills"), choice
            assert "\n" not in choice.reason
            assert len(choice.reason) > 20
            assert choice.spec.config_from_json(vars(choice.config)) == choice.config


# What the keys and sizes of a family may be, far beyond what is realistic.
KEYS = {
    "width": [16, 32, 64, 128, 256, 512],
    "itemsize": [2, 4],
    "cache_itemsize": [1, 2, 4],
    "mask": [0, 1, 2],
    "block_size": [1, 16, 64, 256],
}


@pytest.mark.parametrize("name", sorted(spec for spec in specs() if specs()[spec].workload))
def test_no_problem_ends_without_a_configuration_that_can_run(name):
    spec, rng = specs()[name], random.Random(name)
    for _ in range(150):
        problem = {field: rng.choice(KEYS.get(field, [rng.choice([0, 1, 2 ** rng.randrange(20),
                   rng.randrange(200_000)])])) for field in spec.fields}  # fmt: skip
        if name == "compact":
            problem["itemsize"] = rng.choice([1, 2, 4, 8])
        if "cache_itemsize" in problem and problem["cache_itemsize"] > 1:
            problem["cache_itemsize"] = problem["itemsize"]
        for target in TARGETS:
            device = by_name(target)
            if spec.twin and not spec.candidates(problem, device):
                continue  # its twin runs: see test_autotune_twins.py
            choice = lookup.resolve(spec, problem, device)
            if choice.origin == "none":  # the one kind of problem that does not fit every GPU
                assert "backward" in name
                assert (problem["width"], problem["itemsize"]) == (512, 4)
                assert "needs 131072 bytes of shared memory or more" in choice.reason
                continue
            assert choice.origin in ("heuristic", "safe")
            verdict = judge(spec, choice.config, problem, device)
            assert verdict.status != "impossible", (problem, target, choice.config, verdict)


def test_a_table_survives_the_way_to_disk_and_back_and_a_damaged_one_proves_nothing(tmp_path):
    table = Table()
    table.put("sm_90", SPEC.proof_of(PROBLEM), Group("abc", triton_version(), {FIRST: Proof(40, 0, 128, 0, "")}))
    text = dump_table(SPEC, table)
    assert parse_table(text, SPEC) == table
    for damaged in (text[:80], "[]", text.replace("block_t", "block_x"), text.replace('"groups"', '"rows"')):
        (tmp_path / "paged_append.json").write_text(damaged)
        feasibility.load_table.cache_clear()
        assert feasibility.load_table(SPEC, tmp_path) == Table()
    feasibility.load_table.cache_clear()
