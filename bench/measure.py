"""Measures one case: every contender is compared with float64 first, and only correct ones are timed, side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from bench.case import Case, Inputs, Outputs, Peer, UnavailableError
from bench.timing import Clock, Roofline, captured, measure_roofline, quantiles, tflops

KVOPS = "kvops"
# Below this many milliseconds a GPU's host and launches weigh in: such calls are timed as replays of a graph.
_GRAPH_BELOW_MS = 0.2
_ROOFLINE_ROUNDS = 5  # before a case, and after it


@dataclass
class Row:
    """One contender in one case; ``note`` says why there are no times."""

    case: str
    op: str
    model: str
    shape: dict[str, int | str]
    dtype: str
    contender: str
    version: str | None
    flops: float
    bytes: float
    error: float | None = None
    """The output nearest to its limit: the largest absolute difference from float64."""
    allowed: float | None = None
    ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    graph: bool = False
    """Timed as the replay of a CUDA graph."""
    tflops: float | None = None
    gbps: float | None = None
    of_roofline: float | None = None
    """The least time that this device's measured peaks allow, over the time."""
    ratio: float | None = None
    """How many times as fast kvops is: the median over the rounds of this contender's time over kvops' time."""
    p20_ratio: float | None = None
    p80_ratio: float | None = None
    note: str = ""

    def facts(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Contender:
    row: Row
    prepare: Callable[[Inputs], Callable[[], Outputs]]
    call: Callable[[], Outputs] | None = field(default=None)


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measure(
    case: Case,
    clock: Clock,
    dtype: torch.dtype,
    roofline: Roofline | None = None,
    *,
    peers: Sequence[str] | None = None,
    rounds: int = 20,
    seconds: float = 2.0,
    seed: int = 0,
) -> list[Row]:
    """kvops and the peers (None: all) whose name contains one of ``peers``, in rounds within ``seconds``.

    Without a ``roofline`` the device's own is measured just before the rounds and after them: what a host that others
    share gives changes from minute to minute.
    """
    inputs = build(case, clock.device, dtype, seed)
    chosen = [peer for peer in case.peers if peers is None or any(word.lower() in peer.name.lower() for word in peers)]
    contenders = [_contender(case, dtype, None), *(_contender(case, dtype, peer) for peer in chosen)]
    _check_all(case, inputs, dtype, contenders)
    if clock.gpu:
        torch.cuda.empty_cache()
        for contender in contenders:
            _capture(case, inputs, contender, clock)
    _time(case, inputs, clock, dtype, contenders, roofline, rounds, seconds)
    return [contender.row for contender in contenders]


def build(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    return case.make_inputs(device, dtype, torch.Generator(device).manual_seed(seed))


def complaint(case: Case, inputs: Inputs, dtype: torch.dtype, call: Callable[[], Outputs] | None = None) -> str:
    """What is wrong with the outputs of ``call`` (None: of the operator), empty where nothing is."""
    reset(case, inputs)
    with torch.no_grad():
        exact, similar = case.oracle(inputs, torch.float64), case.oracle(inputs, dtype)
    reset(case, inputs)
    return compare(case, inputs, case.run(inputs) if call is None else call(), exact, similar)[2]


def compare(case: Case, inputs: Inputs, outputs: Outputs, exact: Outputs, similar: Outputs) -> tuple[float, float, str]:
    """(error, allowed, complaint) of the output that is nearest to its limit.

    Whole numbers and truth values must be equal. Others may be off by twice the error of the same arithmetic in plain
    torch plus one rounding of the largest value; infinities stand in the same places, and a NaN is infinitely wrong.
    """
    worst, limit = 0.0, 0.0
    for place, (actual, truth, same) in enumerate(zip(case.sample(inputs, outputs), exact, similar, strict=False)):
        if actual is None or truth is None or same is None:
            continue
        if actual.shape != truth.shape:
            return math.inf, 0.0, f"output {place} has shape {list(actual.shape)}, expected {list(truth.shape)}"
        if not actual.is_floating_point():
            different = int((actual != truth).sum())
            if different:
                return math.inf, 0.0, f"output {place} differs in {different} of {actual.numel()} places"
            continue
        error = _distance(actual, truth)
        largest = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0
        allowed = 2 * _distance(same, truth) + torch.finfo(actual.dtype).eps * largest
        if not error <= allowed:
            return error, allowed, f"output {place} is {error:.1e} off, allowed {allowed:.1e}"
        if error * limit >= worst * allowed:
            worst, limit = error, allowed
    return worst, limit, ""


def _distance(actual: Tensor, truth: Tensor) -> float:
    """The greatest absolute difference; infinite where a NaN stands or infinities differ."""
    if not actual.numel():
        return 0.0
    actual, truth = actual.double(), truth.double()
    difference = torch.where(actual == truth, 0.0, (actual - truth).abs())
    return difference.nan_to_num(nan=math.inf).max().item()


def _contender(case: Case, dtype: torch.dtype, peer: Peer | None) -> _Contender:
    row = Row(
        case=case.name,
        op=case.op,
        model=case.model,
        shape=dict(case.shape),
        dtype=str(dtype).removeprefix("torch."),
        contender=KVOPS if peer is None else peer.name,
        version=version_of(KVOPS if peer is None else peer.package),
        flops=case.flops,
        bytes=case.bytes(dtype.itemsize),
    )
    if peer is None:
        return _Contender(row, lambda inputs: lambda: case.run(inputs))
    return _Contender(row, peer.prepare)


def _check_all(case: Case, inputs: Inputs, dtype: torch.dtype, contenders: Sequence[_Contender]) -> None:
    """Prepares and checks every contender; who fails keeps no call, and a note that says why."""
    reset(case, inputs)
    with torch.no_grad():
        exact, similar = case.oracle(inputs, torch.float64), case.oracle(inputs, dtype)
    for contender in contenders:
        try:
            call = contender.prepare(inputs)
            reset(case, inputs)
            outputs = call()
            error, allowed, complaint = compare(case, inputs, outputs, exact, similar)
        except Exception as failure:  # whatever keeps a contender from running becomes its row
            contender.row.note = reason(failure)
            continue
        contender.row.error, contender.row.allowed = error, allowed
        if all(output is None for output in outputs):
            contender.row.error = contender.row.allowed = None
            contender.row.note = "not checked: its result is another by design"
        if complaint:
            contender.row.note = f"wrong: {complaint}"
        else:
            contender.call = call


def _capture(case: Case, inputs: Inputs, contender: _Contender, clock: Clock) -> None:
    """A short call becomes the replay of its graph, if its replay gives what the call gave."""
    call = contender.call
    if call is None:
        return
    probes = []
    for _ in range(3):
        reset(case, inputs)
        probes.append(clock.once(call))
    if min(probes) > _GRAPH_BELOW_MS:
        return
    try:
        reset(case, inputs)
        expected = [None if x is None else x.detach().clone() for x in call()]
        replay = captured(call, clock.device)
        reset(case, inputs)
        same = all(a is None or b is None or torch.equal(a, b) for a, b in zip(replay(), expected, strict=True))
    except Exception as failure:  # a peer that synchronises cannot be captured; it is timed as it is
        contender.row.note = f"no graph: {reason(failure)}"
        torch.cuda.synchronize(clock.device)
        return
    if same:
        contender.call, contender.row.graph = replay, True
    else:
        contender.row.note = "no graph: its replay gives another result"


def _time(
    case: Case,
    inputs: Inputs,
    clock: Clock,
    dtype: torch.dtype,
    contenders: Sequence[_Contender],
    roofline: Roofline | None,
    rounds: int,
    seconds: float,
) -> None:
    ready = {contender.row.contender: contender for contender in contenders if contender.call is not None}
    calls = {name: contender.call for name, contender in ready.items() if contender.call is not None}

    def around() -> Roofline:
        return roofline or measure_roofline(clock, dtype, _ROOFLINE_ROUNDS, statistics.median)

    before = around()
    samples = clock.interleaved(calls, rounds, seconds=seconds, reset=lambda name: reset(case, inputs))
    after = around()
    for name, times in samples.items():
        row = ready[name].row
        row.rounds = len(times)
        row.p20_ms, row.ms, row.p80_ms = quantiles(times)
        row.tflops = tflops(row.flops, row.ms) if row.flops else None
        row.gbps = row.bytes / row.ms / 1e6
        row.of_roofline = statistics.mean(peaks.bound_ms(row.flops, row.bytes) for peaks in (before, after)) / row.ms
        if KVOPS in samples:
            ratios = [theirs / ours for theirs, ours in zip(times, samples[KVOPS], strict=True)]
            row.p20_ratio, row.ratio, row.p80_ratio = quantiles(ratios)


def reset(case: Case, inputs: Inputs) -> None:
    if case.reset is not None:
        case.reset(inputs)


def reason(error: Exception) -> str:
    """One line."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, UnavailableError):
        return text
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    return f"{type(error).__name__}: {text}"[:120]
