"""The command line: explaining without a GPU, and a store's way from one machine to another."""

import json

import pytest
import torch
from autotune_fakes import H100, record

from kvops.autotune import lookup, specs
from kvops.autotune.__main__ import main
from kvops.autotune.devices import KNOWN_DEVICES, by_name, matching
from kvops.autotune.store import JOURNAL, QUARANTINE, Layer


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Exit code and output of a command; the user's store is an empty folder."""
    monkeypatch.setenv("KVOPS_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("KVOPS_SITE_DIR", "KVOPS_AUTOTUNE_OVERRIDE"):
        monkeypatch.delenv(name, raising=False)
    lookup.forget()

    def called(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    yield called
    lookup.forget()


@pytest.fixture
def user(tmp_path):
    return Layer("user", tmp_path / "cache" / "autotune", writable=True)


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "sm_80", "sm_89", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_every_operator_is_explained_by_name_of_device_with_its_reason(run, device):
    code, text = run("explain", "--device", device)
    assert code == 0
    lines = text.splitlines()
    for spec in specs().values():
        for problem in spec.problems:
            if spec.twin and not spec.candidates(problem, by_name(device)):
                assert f"\n{spec.name}: " in text
                continue
            title = f"{spec.name} {' '.join(f'{k}={v}' for k, v in problem.items())} on "
            place = next(number for number, line in enumerate(lines) if line.startswith(title))
            config, reason, proof = lines[place + 1 : place + 4]
            assert "num_warps=" in config or spec.twin
            assert reason.startswith("  heuristic: ")
            assert "bound by" in reason
            assert proof.split(":")[0].strip() in ("proven", "unproven", "spills")


def test_one_problem_of_an_operator_is_explained(run):
    problem = "width=128,itemsize=2,mask=1,heads=32,seqlen_q=1,seqlen_k=100000"
    code, text = run("explain", "flash_forward", "--device", "NVIDIA L4", "--problem", problem)
    assert (code, text.count("flash_forward width=128")) == (0, 1)
    for bad, message in (
        (["explain", "no_kernel", "--device", "sm_90"], "op: expected one of flash_forward"),
        (["explain", "compact", "--device", "Voodoo 2"], "device: expected the name of a GPU, such as H100"),
        (["explain", "compcat", "--device", "H200"], "got 'compcat'; did you mean compact?"),
        (["show", "--ops", "paged_apend"], "got paged_apend; did you mean paged_append"),
        (["explain", "compact", "--device", "sm_90", "--problem", "width"], "--problem: expected NAME=INTEGER"),
        (["explain", "compact", "--device", "sm_90", "--problem", "width=1"], "problem: expected the fields itemsize"),
        (["show", "--ops", "no_kernel"], "--ops: expected names among flash_forward"),
    ):
        code, text = run(*bad)
        assert code == 2
        assert message in text


@pytest.mark.parametrize(
    ("name", "expected", "others"),
    [
        ("H100", "NVIDIA H100 80GB HBM3", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL"]),
        ("h100 pcie", "NVIDIA H100 PCIe", []),
        ("H20", "NVIDIA H20", []),
        ("nvidia a10", "NVIDIA A10", []),
        ("A100-SXM4", "NVIDIA A100-SXM4-80GB", ["NVIDIA A100-SXM4-40GB"]),
        ("4090", "NVIDIA GeForce RTX 4090", []),
        ("MI300X", "AMD Instinct MI300X", []),
        ("gfx942", "AMD Instinct MI300X", ["AMD Instinct MI325X"]),
    ],
)
def test_part_of_a_gpu_s_name_is_enough(run, name, expected, others):
    """``--device H100`` was refused with a list of 23 names."""
    assert [device.name for device in matching(name)] == [expected, *others]
    code, text = run("explain", "compact", "--device", name)
    assert code == 0
    assert f" on {expected}\n" in text
    assert (f"{name}: using {expected}; also matches {', '.join(others)}" in text) == bool(others and name != "gfx942")


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("H101", "NVIDIA H100 80GB HBM3"),
        ("A1000", "NVIDIA A100"),
        ("MI30X", "AMD Instinct MI300X"),
        ("H2", "NVIDIA H20"),
        ("Voodoo 2", None),
    ],
)
def test_a_gpu_that_is_not_known_is_answered_with_those_that_resemble_it(name, close):
    with pytest.raises(ValueError, match=f"^device: expected the name of a GPU, .* got '{name}'") as raised:
        matching(name)
    message = str(raised.value)
    assert message.count("NVIDIA") <= 4
    assert ("did you mean" in message) == (close is not None)
    assert (close or "") in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
def test_without_a_gpu_tuning_says_so(run):
    for command in (["tune"], ["explain"]):
        code, text = run(*command)
        assert code == 2
        assert "no GPU" in text


def test_records_go_from_one_store_to_another(run, user, tmp_path):
    user.insert(record(tokens=3, us=10.0))
    user.insert(record(tokens=4, us=10.0))
    code, text = run("show", "--json", tmp_path / "records.json")
    assert code == 0
    assert "2 records" in text
    assert {entry["gain"] for entry in json.loads((tmp_path / "records.json").read_text())} == {2.0}
    assert "0 records" in run("show", "--device", "MI300X")[1]

    exported, fleet = tmp_path / "exported", tmp_path / "fleet"
    assert "2 records in 1 files" in run("export", "--output", exported)[1]
    assert [path.name for path in exported.iterdir()] == ["paged_append.nvidia-h100-80gb-hbm3.json"]
    assert run("diff", exported, user.folder) == (0, "0 differences\n")
    Layer("", fleet, writable=True).insert(record(tokens=4, us=5.0, date="2026-02-02"))
    Layer("", fleet, writable=True).insert(record(tokens=5))
    assert run("merge", fleet)[1] == "1 added, 1 replaced, 0 kept, 0 failed\n"
    assert run("merge", fleet)[1] == "0 added, 0 replaced, 2 kept, 0 failed\n"
    spec = specs()["paged_append"]
    assert {entry.shape["tokens"]: entry.time.p50 for entry in user.read(spec)} == {3: 10.0, 4: 5.0, 5: 10.0}
    Layer("", fleet, writable=True).insert(record(tokens=4, config=spec.config(32, 8), date="2026-03-03"))
    code, text = run("diff", user.folder, fleet)
    assert code == 1
    assert "only first" in text
    assert "config" in text
    assert run("diff", tmp_path / "nowhere", fleet)[0] == 2
    lookup.forget()
    problem = ",".join(f"{name}={value}" for name, value in {**spec.problems[0], "tokens": 4}.items())
    text = run("explain", "paged_append", "--device", H100.name, "--problem", problem)[1]
    assert "exact: 5.0 µs for lists=64 tokens=4" in text


def test_the_store_is_looked_over_and_cleaned(run, user):
    code, text = run("doctor")
    assert code == 0
    assert f"built-in devices: {len(KNOWN_DEVICES)}" in text
    user.insert(record(source="older"))
    user.insert(record())
    (user.folder / "paged_append.damaged.json").write_text("{")
    code, text = run("doctor")
    assert code == 1
    assert "gc removes them" in text
    assert (user.folder / QUARANTINE / "paged_append.damaged.json").exists()
    (user.folder / JOURNAL).write_text(json.dumps({"op": "paged_append", "problem": record().problem}) + "\n")
    assert "misses: 1 problems" in run("doctor")[1]
    assert "refusals" not in run("doctor")[1]
    (user.folder / "refusals.jsonl").touch()
    assert "refusals: " in run("doctor")[1]
    assert "2 files would be removed" in run("gc", "--dry-run")[1]
    assert "2 files were removed" in run("gc")[1]
    assert len(user.read(specs()["paged_append"])) == 1


def test_verify_finds_records_that_are_stale_or_cannot_run(run, user):
    spec = specs()["paged_append"]
    user.insert(record(tokens=3, source="older"))
    user.insert(record(tokens=4, config=spec.config(3, 4)))
    code, text = run("verify", "--ops", "paged_append", "--store", user.folder)
    assert code == 1
    assert "measured with older sources (older); tune it again" in text
    assert "power of two" in text
