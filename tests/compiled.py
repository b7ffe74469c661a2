"""What compiling tests/compile_cases.py shows, for GPUs that are not here: only what is not recorded is compiled.

tests/compiled.json has the facts of every launch by its identity: the sources, specialisation, options, target and
Triton that made the binary. A launch with a recorded identity is that very binary, so its facts are read; whatever
changed has another identity and is compiled. To hold the record to the truth, the smallest binary of each kernel
for each architecture is compiled, too (``sample``). ``make prune`` calls this file as a script: it records what is new.

A report is kept below .cache/compiled under the hash of everything that it depends on.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path

from kvops.autotune.environments import environment
from kvops.autotune.inspect import FACTS, TARGETS

ROOT = Path(__file__).parent.parent
CASES_FILE = ROOT / "tests/compile_cases.py"
RECORD = ROOT / "tests/compiled.json"
TESTED = ("sm_90", "sm_80", "sm_100", "sm_120", "gfx942", "gfx950")
# With other versions of Triton than the installed one: a tile of dense attention depends on the head size and the
# target alone, and a window takes the most registers. The other masks are only compiled where the gates are strictest.
OF_OTHER_VERSIONS = (("flash-bf16-d", "sm_90"), ("-window", ",".join(TESTED[1:])))
OTHER_VERSIONS = tuple(
    line.removeprefix("triton==")
    for line in (ROOT / "tests/triton_versions.txt").read_text().split()
    if line.startswith("triton==")
)
# GPUs that multiply matrices by the same instructions: Triton compiles for them alike.
ALIKE = {"sm_120": "sm_80", "gfx950": "gfx942"}


@cache
def record() -> dict[str, dict[str, tuple[str, str, dict]]]:
    """By version of Triton and identity: the kernel, the target and the facts."""
    found: dict[str, dict[str, tuple[str, str, dict]]] = {}
    for version, kernel, target, identity, *facts in json.loads(RECORD.read_text()) if RECORD.exists() else ():
        found.setdefault(version, {})[identity] = kernel, target, dict(zip(FACTS, facts, strict=True))
    return found


def sample(version: str, targets: str) -> dict[tuple[str, str], str]:
    """The recorded launch with the smallest binary, of each kernel for each architecture; where a kernel multiplies no
    matrices, architectures differ little: one of each maker."""
    smallest: dict[tuple[str, str], str] = {}
    launches = record().get(version, {})
    products = {kernel for kernel, _, facts in launches.values() if facts["matrix_instructions"]}
    for identity, (kernel, target, facts) in launches.items():
        place = kernel, ALIKE.get(target, target) if kernel in products else TARGETS[target].backend
        if target in targets.split(",") and (
            place not in smallest or facts["instructions"] < launches[smallest[place]][2]["instructions"]
        ):
            smallest[place] = identity
    return smallest


def _sources() -> str:
    files = sorted(path for folder in ("kernels", "autotune") for path in (ROOT / folder).rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in (*files, *sorted(CASES_FILE.parent.glob("*compile_cases.py")), *filter(Path.exists, [RECORD])):
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def report(targets: str, only: str = "", triton: str | None = None) -> list[dict]:
    """The rows of the cases whose names contain ``only``, with the installed Triton or the version ``triton``."""
    version = triton or installed_version("triton")
    kind = f"{version}-py{platform.python_version()}-{only or 'all'}-{targets}"
    folder = ROOT / ".cache/compiled"
    kept = folder / f"{kind}-{_sources()}.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        again = sample(version, targets).values()
        known = {
            identity: facts for identity, (*_, facts) in record().get(version, {}).items() if identity not in again
        }
        made = _inspect(targets, only, triton, known)
        for old in folder.glob(f"{kind}-*.json"):
            old.unlink(missing_ok=True)
        temporary = folder / f"{os.getpid()}.tmp"
        temporary.write_text(json.dumps(made))
        temporary.rename(kept)
    return json.loads(kept.read_text())


def _inspect(targets: str, only: str, triton: str | None, known: dict[str, dict]) -> list[dict]:
    variables = dict(os.environ) if triton is None else environment(triton, ROOT / ".cache/triton")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made.json")
        Path(folder, "known.json").write_text(json.dumps(known))
        command = [sys.executable, "-m", "kvops.autotune", "inspect", f"--only={only}", "--targets", targets]
        command += ["--cases", str(CASES_FILE), "--json", str(made), "--known", str(Path(folder, "known.json"))]
        command += ["--jobs", str(max(1, (os.cpu_count() or 1) // workers))]
        done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
        assert made.exists(), done.stderr
        rows = json.loads(made.read_text())
        assert done.returncode == any(row["problems"] for row in rows), done.stderr
    return rows


# Not these: LLVM gives AMD's GPUs an instruction more or less from run to run (3.9.0: 1549, 1550). No limit is on them.
HELD = [name for name in FACTS if name not in ("instructions", "registers")]


def unrecorded(rows: list[dict]) -> list[str]:
    """Launches that the record lacks, or has other facts of."""
    wrong = []
    for row in rows:
        for launch in row["launches"]:
            where = f"{row['target']} {row['case']} {launch['kernel']}"
            kernel, target, facts = record().get(row["triton"], {}).get(launch["identity"], ("", "", {}))
            differ = [name for name in HELD if facts.get(name) != launch[name]]
            if (kernel, target) != (launch["kernel"], row["target"]):
                wrong.append(f"{where}: not recorded")
            elif differ:
                wrong.append(f"{where}: " + ", ".join(f"{n} {facts[n]}, compiled {launch[n]}" for n in differ))
    return wrong


def main() -> None:
    """Compile what is not recorded and record it; what no case launches any more goes."""
    lines = set()
    for triton in (None, *OTHER_VERSIONS):
        version = triton or installed_version("triton")
        known = {identity: facts for identity, (*_, facts) in record().get(version, {}).items()}
        for only, targets in OF_OTHER_VERSIONS if triton else (("", ",".join(TESTED)),):
            for row in _inspect(targets, only, triton, known):
                for launch in row["launches"]:
                    if not launch["identity"]:
                        raise RuntimeError(f"{launch['kernel']}: its source cannot be read")
                    facts = [launch[name] for name in FACTS]
                    lines.add(json.dumps([version, launch["kernel"], row["target"], launch["identity"], *facts]))
    RECORD.write_text("[\n" + ",\n".join(sorted(lines)) + "\n]\n")
    print(f"{len(lines)} launches in {RECORD.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
