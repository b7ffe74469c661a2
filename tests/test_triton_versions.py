"""The default tiles of flash attention compile within every target's limits with the oldest and the newest Triton.

Each version is installed once, below .cache/triton, and used with the torch of this environment; what is compiled stays
in Triton's own cache, which tells versions apart.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_cases import unexpected_problems

from kvops.autotune.environments import UnreachableIndexError, environment, newest_triton

ROOT = Path(__file__).parent.parent
OLDEST = "3.6.0"
# A tile depends on the head size and the target alone, and a window takes the most registers: the other masks are only
# compiled where the gates are strictest.
COMPILED = (("flash-bf16-d", "sm_90"), ("-window", "sm_80,sm_100,sm_120,gfx942,gfx950"))

pytestmark = [pytest.mark.triton_versions, pytest.mark.compile]


@pytest.mark.parametrize("version", [OLDEST, "newest"])
def test_default_flash_tiles_keep_the_limits_with(version, tmp_path):
    try:
        version = newest_triton() if version == "newest" else version
        variables = environment(version, ROOT / ".cache/triton")
    except UnreachableIndexError as error:
        pytest.skip(str(error))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    rows = []
    for only, targets in COMPILED:
        report = tmp_path / f"{targets}.json"
        command = [sys.executable, "-m", "kvops.autotune", "inspect", f"--only={only}", "--targets", targets]
        command += ["--cases", str(ROOT / "tests/compile_cases.py"), "--json", str(report)]
        command += ["--jobs", str(max(1, (os.cpu_count() or 1) // workers))]
        done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
        assert report.exists(), done.stderr
        rows += json.loads(report.read_text())
    assert {row["triton"] for row in rows} == {version}
    for head_dim in (64, 128, 256):
        for target in ",".join(targets for _, targets in COMPILED).split(","):
            assert {
                launch["kernel"]
                for row in rows
                for launch in row["launches"]
                if row["target"] == target and row["case"] == f"flash-bf16-d{head_dim}-window"
            } >= {"flash_forward_kernel", "flash_backward_keys_kernel", "flash_backward_queries_kernel"}
    problems = unexpected_problems(rows)
    assert not problems, f"Triton {version}\n" + "\n".join(problems)


def test_a_version_that_the_index_does_not_have_is_refused(tmp_path):
    try:
        with pytest.raises(ValueError, match=r"triton==0\.0\.1"):
            environment("0.0.1", tmp_path)
    except UnreachableIndexError as error:
        pytest.skip(str(error))
    assert not list(tmp_path.iterdir())


def test_an_index_out_of_reach_is_told_from_a_version_that_does_not_exist(tmp_path, monkeypatch):
    for name in ("https_proxy", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(UnreachableIndexError, match="cannot be reached"):
        newest_triton()
