"""The benchmarks measure what they say: cases hold to their oracles, counts to brute force, reports to results."""

import json
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from bench import compare, growth, measure, results, table
from bench.__main__ import main
from bench.case import SCALES, Case, Peer, UnavailableError
from bench.cases import all_cases, select
from bench.lists import BLOCK_SIZE
from bench.timing import Clock, Roofline, quantiles

TINY = all_cases(SCALES["tiny"])
CPU = torch.device("cpu")
ROOFLINE = Roofline(matrix_tflops=0.1, copy_gbps=10.0)

every_case = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def tensors(inputs) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


@every_case
def test_the_operator_and_its_peers_agree_with_the_oracle(case):
    inputs = measure.build(case, CPU, torch.float32)
    before = {name: value.clone() for name, value in tensors(inputs).items()}
    assert measure.complaint(case, inputs, torch.float32) == ""
    ran = 0
    for peer in case.peers:
        try:
            call = peer.prepare(inputs)
        except (UnavailableError, ImportError):
            continue
        assert measure.complaint(case, inputs, torch.float32, call) == "", peer.name
        ran += 1
    assert ran, "no peer of this case runs on a CPU"
    for name, value in tensors(measure.build(case, CPU, torch.float32)).items():
        assert value.equal(before[name]) or value.isnan().any(), f"a run changed what {name} is made from"


def test_every_operator_has_cases_and_peers_at_every_scale():
    names = torch._C._dispatch_get_all_op_names()
    operators = {name.removeprefix("kvops::").partition(".")[0] for name in names if name.startswith("kvops::")}
    for scale in SCALES.values():
        cases = all_cases(scale)
        assert {case.op for case in cases} == operators, scale.name
        assert all(case.peers for case in cases)


def brute_force_pairs(inputs) -> int:
    """(query head, query, key) triples that the masks of a tiny case let through, one by one."""
    window = inputs.get("window", -1)
    if "cu_seqlens_q" in inputs:
        group = inputs["q"].shape[1] // inputs["seq_lens"].shape[1]
        lens = zip(inputs["q_lens"], inputs["seq_lens"].tolist(), strict=True)
        sequences = [(queries, length, group) for queries, row in lens for length in row]
    elif "seq_lens" in inputs:
        queries, group = inputs["q"].shape[1], inputs["q"].shape[2] // inputs["seq_lens"].shape[1]
        sequences = [(queries, length, group) for length in inputs["seq_lens"].flatten().tolist()]
    elif "lengths" in inputs:
        sequences = [(length, length, inputs["q"].shape[1]) for length in inputs["lengths"]]
    else:
        batch, queries, heads = inputs["q"].shape[:3]
        sequences = [(queries, queries, heads)] * batch
    count = 0
    for queries, keys, heads in sequences:
        for query in range(queries):
            if query < (inputs.get("query_start", 0) or 0) % queries:
                continue
            position = query + keys - queries
            for key in range(keys):
                sees = key <= position or not inputs.get("causal", True)
                count += heads * (sees and (window < 0 or key >= position - window))
    return count


# Products of a query and a key, each of a multiplication and an addition for each element of a head.
PRODUCTS = {
    "flash_attention": 2,
    "flash_attention_backward": 5,
    "flash_attention_varlen": 2,
    "flash_attention_varlen_backward": 5,
    "paged_attention": 2,
    "attention_scores": 1,
    "attention_scores_varlen": 1,
}


@pytest.mark.parametrize("case", [case for case in TINY if case.op in PRODUCTS], ids=lambda case: case.name)
def test_operations_are_those_of_the_pairs_that_the_masks_let_through(case):
    inputs = measure.build(case, CPU, torch.float32)
    assert case.flops == 2 * PRODUCTS[case.op] * brute_force_pairs(inputs) * inputs["q"].shape[-1]


def nbytes(*sides) -> int:
    return sum(side.nbytes for side in sides)


@pytest.mark.parametrize("op", ["flash_attention", "flash_attention_varlen", "merge_attention"])
def test_bytes_are_those_of_the_inputs_and_the_outputs(op):
    for case in select(TINY, [op]):
        inputs = measure.build(case, CPU, torch.float32)
        read = [
            inputs[name]
            for name in ("q", "k", "v", "bias", "slopes", "out_a", "lse_a", "out_b", "lse_b")
            if name in inputs
        ]
        assert case.bytes(4) == nbytes(*read, *case.run(inputs))


def test_bytes_of_the_backward_count_each_tensor_once():
    for case in select(TINY, ["flash_attention_backward", "flash_attention_varlen_backward"]):
        inputs = measure.build(case, CPU, torch.float32)
        read = [inputs[name] for name in ("q", "k", "v", "out", "lse", "dout")]
        assert case.bytes(4) == nbytes(*read, *case.run(inputs))


def test_bytes_of_decoding_are_those_of_the_slots_in_sight():
    for case in select(TINY, ["paged_attention"]):
        inputs = measure.build(case, CPU, torch.float32)
        window, slots = inputs.get("window", -1), 0
        q_lens = inputs.get("q_lens") or [inputs["q"].shape[1]] * len(inputs["q"])
        for T, row in zip(q_lens, inputs["seq_lens"].tolist(), strict=True):
            for length in row:
                seen = {
                    key
                    for query in range(length - T, length)
                    for key in range(max(0, query + 1))
                    if window < 0 or key >= query - window
                }
                slots += len(seen)
        out, lse = case.run(inputs)[:2]
        cached = slots * 2 * inputs["q"].shape[-1] * inputs["k_cache"].element_size()
        beside = 2 * 4 * slots if inputs.get("reduce") or isinstance(inputs.get("scale"), torch.Tensor) else 0
        masked = 0
        if inputs.get("bias") is not None:
            masked = inputs["bias"][..., : int(inputs["seq_lens"].max())].numel()
        assert case.bytes(4) == cached + beside + masked + nbytes(inputs["q"], out, lse)


def test_bytes_of_compaction_are_those_of_the_slots_that_move():
    for case in select(TINY, ["compact"]):
        inputs = measure.build(case, CPU, torch.float32)
        moved = 0
        for keep, length in zip(inputs["keep"].flatten(0, 1), inputs["seq_lens"].flatten().tolist(), strict=True):
            kept = [slot for slot in range(length) if keep[slot]]
            moved += sum(target != slot for target, slot in enumerate(kept))
        slot = 2 * 4 * inputs["k_cache"].shape[-1] + 4
        lists = inputs["seq_lens"].numel()
        walked = int(inputs["seq_lens"].sum()) + nbytes(inputs["block_tables"]) + 12 * lists
        assert case.bytes(4) == 2 * moved * slot + walked
        assert inputs["k_cache"].shape[1] == BLOCK_SIZE


def doubled(times: float = 1.0, **peers) -> Case:
    """A case of a thousand numbers that are doubled, with peers given as functions."""
    return Case(
        op="double",
        model="none",
        shape={"n": 1000},
        make_inputs=lambda device, dtype, generator: {"x": torch.randn(1000, generator=generator).to(dtype)},
        run=lambda inputs: (inputs["x"] * 2 * times,),
        oracle=lambda inputs, dtype: (inputs["x"].to(dtype) * 2,),
        flops=1000,
        bytes=lambda size: 2000 * size,
        peers=tuple(Peer(name, lambda inputs, call=call: lambda: call(inputs["x"])) for name, call in peers.items()),
    )


def test_a_wrong_peer_gets_a_row_that_says_so_and_no_time():
    def missing(x):
        raise ModuleNotFoundError("No module named 'fast'")

    case = doubled(
        right=lambda x: (x + x,),
        wrong=lambda x: (x * 2.001,),
        nan=lambda x: (x * float("nan"),),
        missing=missing,
    )
    rows = {row.contender: row for row in measure.measure(case, Clock(CPU), torch.float32, ROOFLINE, rounds=3)}
    assert list(rows) == ["kvops", "right", "wrong", "nan", "missing"]
    assert rows["kvops"].ratio == 1
    assert rows["right"].ms is not None
    assert rows["right"].rounds == 3
    for name in ("wrong", "nan"):
        assert rows[name].ms is None
        assert rows[name].note.startswith("wrong: output 0 is")
    assert rows["missing"].note == "not installed"
    text = table.operator_table([row.facts() for row in rows.values()], "pipe", times=False)
    assert "× right" in text
    assert "- missing: not installed" in text
    assert "- wrong: wrong: output 0 is" in text


def test_a_wrong_operator_is_not_timed():
    rows = measure.measure(doubled(1.01, right=lambda x: (x + x,)), Clock(CPU), torch.float32, ROOFLINE, rounds=3)
    assert rows[0].ms is None
    assert rows[0].note.startswith("wrong")
    assert rows[1].ms is not None
    assert rows[1].ratio is None


def test_the_roofline_of_a_case_is_what_the_device_gives_before_and_after_it(monkeypatch):
    found = iter([Roofline(matrix_tflops=0.1, copy_gbps=10.0), Roofline(matrix_tflops=0.1, copy_gbps=5.0)])
    monkeypatch.setattr(measure, "measure_roofline", lambda *arguments: next(found))
    (row,) = measure.measure(doubled(), Clock(CPU), torch.float32, rounds=3)
    assert row.bytes > 0
    assert row.of_roofline == pytest.approx(row.bytes / 1e6 * (1 / 10 + 1 / 5) / 2 / row.ms)
    assert next(found, None) is None


def test_whole_numbers_and_infinities_must_be_equal():
    case = doubled()
    one, inf = torch.tensor([1]), torch.tensor([1.0, float("inf")])
    assert measure.compare(case, {}, (one,), (one,), (one,))[2] == ""
    assert "differs in 1 of 1" in measure.compare(case, {}, (one + 1,), (one,), (one,))[2]
    assert measure.compare(case, {}, (inf,), (inf.double(),), (inf,))[2] == ""
    assert measure.compare(case, {}, (-inf,), (inf.double(),), (inf,))[2] != ""
    assert "has shape [2]" in measure.compare(case, {}, (inf,), (one,), (one,))[2]


def test_contenders_take_turns_and_resets_are_not_timed():
    order = []
    clock = Clock(CPU)
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = clock.interleaved(calls, 4, reset=lambda name: order.append(f"reset {name}"))
    assert {name: len(found) for name, found in samples.items()} == {"a": 4, "b": 4}
    assert order[::2] == [f"reset {name}" for name in order[1::2]]
    rounds = list(zip(order[1::4], order[3::4], strict=True))
    assert len(rounds) == 6  # two of them to warm up
    assert set(rounds) == {("a", "b"), ("b", "a")}


def test_quantiles_are_those_of_the_samples():
    assert quantiles([float(value) for value in range(11)]) == (2.0, 5.0, 8.0)
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)


def operators_result(ratios: dict[str, float], spread: float = 0.02, **setting) -> dict:
    """A result with one case for each name, and the given ratio to a peer."""
    rows = []
    for name, ratio in ratios.items():
        common = {"case": name, "op": "double", "model": "m", "shape": {"n": 3, "mask": "full"}, "dtype": "float32"}
        common |= {"version": "1", "flops": 10.0, "bytes": 20.0, "rounds": 3, "graph": False, "note": ""}
        common |= {"error": 0.0, "allowed": 1e-6, "tflops": 0.01, "gbps": 3.0, "of_roofline": 0.25}
        for contender, ms, to_kvops in (("kvops", 2.0, 1.0), ("peer", 2.0 * ratio, ratio)):
            times = {"ms": ms, "p20_ms": ms * (1 - spread), "p80_ms": ms * (1 + spread), "ratio": to_kvops}
            rows.append(common | {"contender": contender} | times)
            rows[-1] |= {"p20_ratio": to_kvops * (1 - spread), "p80_ratio": to_kvops * (1 + spread)}
        missing = dict.fromkeys(("ms", "p20_ms", "p80_ms", "ratio", "p20_ratio", "p80_ratio", "of_roofline"))
        rows.append(common | missing | {"contender": "other", "note": "not installed"})
    facts = {"runs": "eager on a test", "device": "test", "date": "2026-01-02T03:04:05", "matrix_tflops": 0.1}
    return {"kind": "operators", "setting": facts | {"copy_gbps": 10.0} | setting, "rows": rows}


def write(path, result) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return str(path)


def test_compare_fails_on_a_ratio_worse_than_the_margin(tmp_path, capsys):
    before = write(tmp_path / "a.json", operators_result({"one": 2.0, "two": 1.0}))
    slower = write(tmp_path / "b.json", operators_result({"one": 1.5, "two": 1.0}))
    assert main(["compare", before, before]) == 0
    assert main(["compare", before, slower, "--margin", "0.1"]) == 1
    out = capsys.readouterr().out
    assert "× peer" in out
    assert "0.75" in out
    assert "1 worse than 10%" in out
    assert main(["compare", before, slower, "--margin", "0.3"]) == 0
    assert main(["compare", slower, before]) == 0, "faster is no failure"


def test_compare_lets_noise_pass_and_notices_what_no_longer_runs(tmp_path):
    before = operators_result({"one": 2.0})
    noisy = operators_result({"one": 1.6}, spread=0.3)
    assert not compare.report(before, noisy, 0.1)[1]
    broken = operators_result({"one": 2.0})
    for row in broken["rows"]:
        row |= {"ms": None, "ratio": None, "note": "wrong: output 0"}
    text, worse = compare.report(before, broken, 0.1)
    assert worse
    assert "no longer runs: one: wrong: output 0" in text


def test_compare_of_the_same_gpu_looks_at_the_times_too():
    before, after = (operators_result({"one": 1.0}, cuda="13.0") for _ in range(2))
    for row in after["rows"]:
        if row["ms"]:
            row |= {name: 2 * row[name] for name in ("ms", "p20_ms", "p80_ms")}
    assert compare.report(before, after, 0.1)[1]
    after["setting"]["device"] = "another"
    assert not compare.report(before, after, 0.1)[1]


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    one = write(tmp_path / "a.json", operators_result({"one": 2.0}))
    two = write(tmp_path / "b.json", operators_result({"two": 2.0}))
    (tmp_path / "c.json").write_text("not json")
    assert main(["compare", one, two]) == 2
    assert main(["compare", one, str(tmp_path / "c.json")]) == 2
    assert main(["compare", one, str(tmp_path / "none.json")]) == 2
    assert main(["run", "--ops", "flash_atention"]) == 2
    assert "--ops: expected some of" in capsys.readouterr().err
    assert main(["run", "--scale", "tiny", "--shapes", "GPT-9"]) == 2
    assert main(["growth", "--sweeps", "sideways"]) == 2
    assert main(["report", "--results", str(tmp_path / "empty"), "--page", str(tmp_path / "B.md")]) == 2


def growth_rows(power: float) -> list[dict]:
    rows = []
    for value in (64, 128, 256, 512, 1024, 2048):
        ms = 5.0 + 1e-4 * value**power if value < 300 else 1e-4 * value**power
        times = {"ms": ms, "p20_ms": ms, "p80_ms": ms, "memory_bytes": 1000 + 64 * value}
        theory = {"time_theory": 2, "memory_theory": 1}
        rows.append(
            {"sweep": "prompt", "op": "double", "model": "m", "axis": "tokens", "value": value} | times | theory
        )
    return rows


def test_the_slope_is_that_of_the_upper_half():
    (fit,) = growth.fits(growth_rows(2))
    assert fit.time == pytest.approx(2)
    assert 0.9 < fit.memory < 1
    assert fit.as_theory
    (steep,) = growth.fits(growth_rows(2.3))
    assert not steep.as_theory
    assert growth.slope([1, 2, 4], [0, 0, 0]) == 0


def test_memory_of_a_call_is_its_most_at_a_time():
    def run(inputs):
        first = inputs["x"] * 2
        second = first + 1
        del first
        return (second * 3,)

    case = doubled()
    object.__setattr__(case, "run", run)
    inputs = measure.build(case, CPU, torch.float32)
    scalars = growth.peak_bytes(case, inputs, CPU) - 2 * inputs["x"].nbytes
    assert 0 <= scalars < 100


@pytest.mark.parametrize("gpu", [False, True])
def test_every_sweep_grows_one_quantity_of_a_case(gpu):
    for sweep in growth.sweeps(gpu):
        names = {sweep.case(value).name for value in sweep.values[:2]}
        assert len(names) == 2
        assert len(sweep.values) >= 3


def test_growth_is_measured_at_every_size():
    first = growth.sweeps(False)[0]
    small = growth.Sweep(first.name, first.axis, (16, 32, 64), first.case, 2, 1)
    rows = growth.run(small, Clock(CPU), torch.float32, rounds=2, seconds=1.0)
    assert [row["value"] for row in rows] == [16, 32, 64]
    assert all(row["ms"] > 0 and row["memory_bytes"] > 0 for row in rows)


def test_run_writes_a_result_that_the_report_renders(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results" / "here" / "operators.json"
    words = ["run", "--scale", "tiny", "--ops", "merge_attention", "--peers", "torch", "--rounds", "2"]
    assert main([*words, "--json", str(path)]) == 0
    assert "× plain torch" in capsys.readouterr().out
    assert {row["contender"] for row in results.load(path)["rows"]} == {"kvops", "plain torch"}
    write(tmp_path / "results" / "there" / "operators.json", operators_result({"one": 2.0, "two": 0.5}))
    growing = {"kind": "growth", "rows": growth_rows(2), "runs": "x", "date": "2026-01-02"}
    write(tmp_path / "results" / "there" / "growth.json", growing)
    others = {"machine": "m", "rows": [{"a": 1, "b": 2.5, "same": "s"}, {"a": 2, "b": None, "same": "s"}]}
    write(tmp_path / "results" / "there" / "other.json", others)
    phase = [
        {"unit": "tests-0", "status": "timed out", "seconds": 480.0, "passed": 7, "failed": 1, "skipped": 2},
        {"unit": "tests-0", "name": "kernel x", "outcome": "failed", "note": "off by 0.5"},
    ]
    results.save(tmp_path / "results" / "there" / "check.json", "gpu-check", {"device": "d"}, phase)
    served = {"compression": 8, "drafts": False, "largest_batch": True, "batch": 4, "bytes": 1 << 30}
    served |= {"tokens_in": 6000, "tokens_out": 500, "tokens_per_second": 70.0, "decode_tokens_per_second": 90.0}
    served |= {"prefill_seconds": 0.1, "step_seconds": 0.01, "num_draft": 0, "accept": None}
    base = served | {"compression": 1, "tokens_per_second": 20.0}
    results.save(tmp_path / "results" / "there" / "throughput.json", "throughput", {"device": "d"}, [base, served])
    page = tmp_path / "BENCHMARKS.md"
    assert main(["report", "--results", str(tmp_path / "results"), "--page", str(page)]) == 0
    text = page.read_text()
    for part in ("## here", "## there", "#### double", "2.00 ± 0.04", "0.50 ± 0.01", "other: not installed", "25%"):
        assert part in text
    assert "| prompt | double     | tokens 64 to 2048 |" in text
    assert "as theory" in text
    assert "same: s" in text
    assert "### GPU run: check" in text
    assert "- kernel x: off by 0.5" in text
    assert [cell.strip() for cell in text.split("8x")[1].splitlines()[0].split("|")][-3:] == ["3.50", "3.44", ""]
    pictures = sorted(found.name for found in (tmp_path / "results" / "there").glob("*.png"))
    assert pictures == ["growth.png", "operators-roofline.png", "operators-speed.png"]
    assert all(f"results/there/{name}" in text for name in pictures)


def test_the_suite_for_pytest_benchmark_has_every_case_and_contender():
    from bench import test_operators

    contenders = defaultdict(set)
    for case, peer in test_operators.CONTENDERS:
        contenders[case.name].add(peer and peer.name)
    cases = all_cases(SCALES["cpu" if not torch.cuda.is_available() else "full"])
    assert set(contenders) == {case.name for case in cases}
    assert all(None in found and len(found) > 1 for found in contenders.values())


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_decoding_as_counted_moves_little_more_than_its_cache_with_fewer_instructions_than_the_peer(target):
    """``python -m bench counted`` makes the committed table again; see docs/machine.md."""
    path = results.RESULTS / "machine" / f"counted-{target}.json"
    rows = [
        row for row in results.load(path)["rows"] if "lengths=equal" in row["case"] or "heavy-tailed" in row["case"]
    ]
    own = {row["case"]: row for row in rows if row["contender"] == measure.KVOPS}
    peer = {row["case"]: row for row in rows if row["contender"] != measure.KVOPS}
    assert len(own) == 4
    assert len(peer) == 2
    for name, row in own.items():
        assert row["moved_bytes"] <= (1.10 if "scores" in name else 1.05) * row["needed_bytes"]
        attending = [
            ways for place, ways in row["loop_conflicts"].items() if place.startswith("paged_attention_kernel:")
        ]
        assert max(attending, default=1) <= 2
    for name, row in peer.items():
        assert own[name]["instructions"] < row["instructions"]


def test_the_manual_has_the_counted_goals_as_they_were_counted():
    by_goal = [[], [], [], []]
    for target in ("sm_80", "sm_90"):
        rows = results.load(results.RESULTS / "machine" / f"counted-{target}.json")["rows"]
        rows = [row for row in rows if "lengths=equal" in row["case"] or "heavy-tailed" in row["case"]]
        own = {row["case"]: row for row in rows if row["contender"] == measure.KVOPS}
        moved = {name: f"{row['moved_bytes'] / row['needed_bytes']:.2f}" for name, row in own.items()}
        by_goal[0].append(next(ratio for name, ratio in moved.items() if name.endswith("equal")))
        by_goal[1].append(next(ratio for name, ratio in moved.items() if name.endswith("heavy-tailed")))
        by_goal[2].append(", ".join(ratio for name, ratio in moved.items() if "scores" in name))
        peers = [row for row in rows if row["contender"] != measure.KVOPS]
        fewer = [own[row["case"]]["instructions"] / row["instructions"] for row in peers]
        by_goal[3].append(", ".join(f"{ratio:.0%}" for ratio in fewer))
    page = (results.RESULTS.parents[1] / "docs/machine.md").read_text()
    for counted in by_goal:
        assert f"| {counted[0]} | {counted[1]} |\n" in page, counted
