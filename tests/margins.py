"""How close each comparison of a run came to its tolerance: printed at its end, and with ``--margins FILE`` written.

``make margins`` runs the comparisons as other CPUs would: with the code that torch, MKL and OpenBLAS have for them, and
with one and two threads. ``python tests/margins.py --only default`` runs a part; the table is made of all parts.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

SHOWN = 10
MOST = 0.5

ROOT = pathlib.Path(__file__).parent.parent
# What a setting changes: the kernels (True), which NumPy and OpenBLAS interpret, eager code (False), which runs on
# torch and MKL, or both.
SETTINGS = {
    "the machine's own": ({}, (False, True)),
    "ATEN_CPU_CAPABILITY=default": ({"ATEN_CPU_CAPABILITY": "default"}, (False,)),
    "ATEN_CPU_CAPABILITY=avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, (False,)),
    "MKL_ENABLE_INSTRUCTIONS=SSE4_2": ({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, (False,)),
    "MKL_ENABLE_INSTRUCTIONS=AVX2": ({"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, (False,)),
    "OPENBLAS_CORETYPE=Haswell": ({"OPENBLAS_CORETYPE": "Haswell"}, (True,)),
}
THREADS = (1, 2)


class Margin(NamedTuple):
    """error / allowed of the closest number of one comparison."""

    margin: float
    test: str
    name: str
    interpreted: bool


recorded: list[Margin] = []


def record(margin: float, name: str) -> None:
    test, _, _ = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")
    recorded.append(Margin(margin, test, name, os.environ.get("TRITON_INTERPRET") == "1"))


def pytest_addoption(parser) -> None:
    parser.addoption("--margins", metavar="FILE", help="write error / allowed of every comparison into FILE (JSON)")


def pytest_sessionfinish(session) -> None:
    """A worker of pytest-xdist hands its margins to the process that prints them."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["margins"] = [list(margin) for margin in recorded]


class FromWorkers:
    """Registered where pytest-xdist is: its hooks are unknown elsewhere."""

    def pytest_testnodedown(self, node, error) -> None:
        recorded.extend(Margin(*margin) for margin in getattr(node, "workeroutput", {}).get("margins", ()))


def pytest_configure(config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(FromWorkers())


def pytest_terminal_summary(terminalreporter, config) -> None:
    recorded.sort(reverse=True)
    if recorded:
        terminalreporter.section(f"the {min(SHOWN, len(recorded))} of {len(recorded)} comparisons closest to failing")
        for margin in recorded[:SHOWN]:
            terminalreporter.write_line(f"{margin.margin:.2f} of what is allowed: {margin.name}, {margin.test}")
    path = config.getoption("--margins")
    if path:
        pathlib.Path(path).write_text(json.dumps([margin._asdict() for margin in recorded], indent=1) + "\n")


def read(path: pathlib.Path) -> list[Margin]:
    return [Margin(**row) for row in json.loads(path.read_text())]


def run(tests: list[str], out: pathlib.Path, environment: dict[str, str], threads: int) -> None:
    """Run the tests and keep their margins, also where some fail: the exit tells."""
    listed = out.with_suffix(".txt")
    listed.write_text("\n".join(tests))
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--margins", str(out), f"@{listed}"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment, **counts})
    if done.returncode:
        raise SystemExit(f"tests failed under {environment or 'the own setting'}, {threads} threads: {out}")


def table(folder: pathlib.Path) -> tuple[str, float]:
    """Markdown of the settings that ran, and the largest of all margins."""
    lines, worst = ["| setting | threads | comparisons | closest | where |", "| --- | --- | --- | --- | --- |"], 0.0
    for place, name in enumerate(SETTINGS):
        for threads in THREADS:
            path = folder / f"{place}-{threads}.json"
            if path.exists():
                margins = read(path)
                top = max(margins)
                worst = max(worst, top.margin)
                where = top.test.removeprefix("tests/").replace("|", "/")
                lines.append(f"| {name} | {threads} | {len(margins)} | {top.margin:.2f} | {top.name}: {where} |")
    return "\n".join(lines), worst


def main() -> None:
    parser = argparse.ArgumentParser(description="The margins of all comparisons under the settings of other CPUs.")
    parser.add_argument("--only", default="", metavar="WORD", help="only settings with this word in their names")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS, metavar="N", help="only with as many")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / ".cache" / "margins", help="for what ran")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write the table into FILE (Markdown)")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)

    every = sorted((ROOT / "tests").glob("test_*.py"))
    files = [str(path.relative_to(ROOT)) for path in every if "import assert_accurate" in path.read_text()]
    own = folder / "0-1.json"
    for place, (name, (environment, kinds)) in enumerate(SETTINGS.items()):
        if arguments.only not in name:
            continue
        for threads in arguments.threads:
            out = folder / f"{place}-{threads}.json"
            if out == own:
                run(files, out, environment, threads)
                continue
            if not own.exists():
                raise SystemExit(f"Run {next(iter(SETTINGS))} first: it tells which tests compare.")
            tests = dict.fromkeys(margin.test for margin in read(own) if margin.interpreted in kinds)
            run(list(tests), out, environment, threads)
    text, worst = table(folder)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    if worst > MOST:
        raise SystemExit(f"A comparison came within {worst:.2f} of its tolerance: expected at most {MOST}.")


if __name__ == "__main__":
    main()
