"""The distribution that users install: one top-level name, everything inside, at peace with its neighbours on PyPI."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

REPOSITORY = Path(__file__).parent.parent
LINKS = {"src/kvops": "../kvops", "kvops/kernels": "../kernels", "kvops/autotune": "../autotune"}
MADE_HERE = (
    "__pycache__",
    ".*_cache",
    ".git",
    ".venv",
    ".cache",
    ".hypothesis",
    ".benchmarks",
    "build",
    "dist",
    "*.egg-info",
)


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


def sources() -> set[str]:
    """Every file that users must get, as the wheel names it: ``kvops/kernels/...`` is reached through the link."""
    files = [
        path.relative_to(REPOSITORY).as_posix()
        for top in ("kvops", "kvops/kernels", "kvops/autotune")  # rglob does not follow links before Python 3.13
        for path in (REPOSITORY / top).rglob("*")
        if path.suffix in {".py", ".json"} or path.name == "py.typed"
    ]
    return set(files)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree, links as links: building in place would leave build folders that later builds pick up."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    return Path(shutil.copytree(REPOSITORY, copy, symlinks=True, ignore=shutil.ignore_patterns(*MADE_HERE)))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(source), cwd=folder)
    (path,) = folder.glob("kvops-*.whl")
    return path


@pytest.fixture(scope="module")
def distribution(source, tmp_path_factory) -> Path:
    """The folder with the sdist and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("distribution")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source), cwd=folder)
    return folder


def fresh_environment(folder: Path) -> Path:
    """The Python of a fresh environment that sees the packages of this one (torch, which is large) behind its own.

    A line of a .pth file adds them. Such a line does not run the .pth files of the folder it adds, so that the editable
    installation of this repository stays out.
    """
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    python = folder / "bin" / "python"
    site_packages = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    (site_packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip_install(python: Path, *arguments: str) -> list[str]:
    pip = (sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check", "install")
    return [*pip, "--no-deps", *arguments]


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel, and Hugging Face's ``kernels`` where the index is in reach."""
    folder = tmp_path_factory.mktemp("environment")
    python = fresh_environment(folder)
    run(*pip_install(python, "--no-index", str(wheel)), cwd=folder)
    constraints = str(REPOSITORY / "constraints.txt")
    command = pip_install(python, "--retries", "1", "--only-binary", ":all:", "-c", constraints, "kernels")
    installed = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder)
    (folder / "pip-output.txt").write_text(installed.stdout + installed.stderr)
    return python


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory) -> Path:
    """The Python of an environment with an editable installation of the copied tree."""
    folder = tmp_path_factory.mktemp("editable")
    python = fresh_environment(folder)
    run(*pip_install(python, "--no-index", "--no-build-isolation", "-e", str(source)), cwd=folder)
    return python


@pytest.fixture(scope="module")
def unpacked(distribution, tmp_path_factory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    (sdist,) = distribution.glob("kvops-*.tar.gz")
    run("tar", "xzf", str(sdist), cwd=folder)
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture
def python(environment, tmp_path, monkeypatch):
    """Run a line of Python in the fresh environment, from an empty folder."""
    for name in ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)

    def evaluate(code: str) -> str:
        return run(str(environment), "-c", code, cwd=tmp_path)

    return evaluate


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def check_contents(wheel: Path) -> None:
    names = members(wheel)
    tops = {name.split("/")[0] for name in names}
    (metadata,) = tops - {"kvops"}
    assert metadata.startswith("kvops-")
    assert metadata.endswith(".dist-info")
    assert sources() <= names
    assert {"kvops/kernels/primitives.py", "kvops/autotune/inspect.py", "kvops/py.typed"} <= names
    assert f"{metadata}/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name or "test" in name.split("/")]
    # No __init__.py among the kernels: the folder in the repository must never shadow Hugging Face's package.
    assert "kvops/kernels/__init__.py" not in names


def test_the_repository_links_its_folders_into_the_package():
    for path, target in LINKS.items():
        assert (REPOSITORY / path).is_symlink()
        assert os.readlink(REPOSITORY / path) == target


def test_the_wheel_owns_one_name_and_holds_every_module(wheel):
    check_contents(wheel)


def test_a_wheel_built_from_the_sdist_is_the_same(wheel, distribution):
    (sdist,) = distribution.glob("kvops-*.tar.gz")
    (from_sdist,) = distribution.glob("kvops-*.whl")
    check_contents(from_sdist)
    assert members(from_sdist) == members(wheel)
    with tarfile.open(sdist) as archive:
        links = {m.name.partition("/")[2]: m.linkname for m in archive.getmembers() if m.issym() or m.islnk()}
    assert links == LINKS  # each file once


def test_the_tests_of_the_sdist_run(source, unpacked):
    """It is the repository: nothing that is tracked is missing, all tests are found, and some of them are run."""

    def files(folder: Path) -> set[str]:
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return {
            name for name in names if ".egg-info/" not in name and not name.startswith(("bench/results/", "build/"))
        }

    kept_out = {name for name in files(source) if name.startswith(".")} - {".ci/run", ".gitignore"}
    assert files(source) - kept_out <= files(unpacked)
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert "error" not in run(*command, "--collect-only", cwd=unpacked).lower().splitlines()[-1]
    some = ("tests/test_merge.py", "tests/test_imports.py::test_every_module_is_used")
    assert " passed" in run(*command, *some, "-k", "not triton", cwd=unpacked).splitlines()[-1]


def test_the_metadata_names_the_pythons_and_on_request_the_address_of_the_project(wheel, source, tmp_path, monkeypatch):
    def metadata(wheel: Path) -> str:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
            return archive.read(name).decode()

    text = metadata(wheel)
    for minor in range(10, 14):
        assert f"Classifier: Programming Language :: Python :: 3.{minor}\n" in text
    assert "Project-URL" not in text
    monkeypatch.setenv("KVOPS_PROJECT_URL", "https://example.org/kvops/")
    command = ("-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(source))
    run(sys.executable, *command, cwd=tmp_path)
    text = metadata(*tmp_path.glob("*.whl"))
    assert "Project-URL: Source, https://example.org/kvops\n" in text
    targets = [target for _, target in re.findall(r"(\[[^\]]*\]\()([^)#][^)]*)", text)]
    assert targets
    assert not [target for target in targets if not target.startswith("http")]
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert pictures
    assert all(picture.startswith("https://example.org/kvops/raw/") for picture in pictures)


@pytest.mark.parametrize("folder", ["kvops", "kernels", "autotune"])
def test_an_editable_installation_is_not_hidden_by_a_folder_of_its_name(
    editable, source, folder, tmp_path, monkeypatch
):
    """As in the parent of a clone. An import hook, setuptools' other way, is asked after the current directory."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / folder).mkdir()
    code = "import kvops, kvops.autotune, kvops.kernels; print(kvops.__file__, kvops.flash_attention.__name__)"
    assert run(str(editable), "-c", code, cwd=tmp_path) == f"{source}/src/kvops/__init__.py flash_attention"


def test_an_editable_installation_brings_in_no_other_folder_of_the_repository(editable, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = "import importlib.util as u; print([n for n in ('autotune', 'bench', 'tests', 'src') if u.find_spec(n)])"
    assert run(str(editable), "-c", code, cwd=tmp_path) == "[]"


RIGHT = """
import torch

import kvops
from kvops.models import load
from kvops.policies import Compression, SnapKV


def use(q: torch.Tensor) -> torch.Tensor:
    out, lse = kvops.flash_attention(q, q, q, causal=True)
    cache = kvops.PagedKVCache(num_layers=1, num_kv_heads=2, head_dim=16, num_blocks=8, max_batch=1, max_tokens=64)
    cache.append(0, q, q, cache.extend(4))
    used: int = cache.stats().blocks_in_use
    compression: kvops.policies.Compression = Compression(ratio=4, policy=SnapKV())
    layers: int = load("model.gguf").config.num_layers
    print(used, compression, layers, kvops.models.Tokenizer, kvops.tables.__name__, kvops.autotune.current_device())
    return out + lse.sum()
"""
WRONG = """
import torch

import kvops
from kvops.models import load


def misuse(q: torch.Tensor) -> None:
    kvops.flash_attention(q, q, q, casual=True)
    kvops.flash_atention(q, q, q)
    kvops.policies.Compresion()
    layers: str = load("model.gguf").config.num_layers
    print(layers)
"""


@pytest.mark.parametrize("installation", ["environment", "editable"])
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_see_the_types_of_an_installed_package(installation, checker, request, tmp_path, monkeypatch):
    """A user's program with four mistakes, each in a line of its own, and one without: all are found and no other."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    python = request.getfixturevalue(installation)
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    if checker == "mypy":
        pytest.importorskip("mypy")
        # What mypy knows of torch takes a minute to find out; it is kept from run to run.
        cache = ("--cache-dir", str(REPOSITORY / ".cache" / "mypy-of-users"))
        command = [sys.executable, "-m", "mypy", "--python-executable", str(python), *cache, "right.py", "wrong.py"]
    else:
        pytest.importorskip("basedpyright")
        command = [sys.executable, "-m", "basedpyright", "--pythonpath", str(python), "--level", "error", "."]
        (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = re.findall(r"(\w+\.py):(\d+)(?::\d+)?(?: -|:) error", done.stdout)
    mistakes = [
        i for i, line in enumerate(WRONG.splitlines(), 1) if re.search("casual|atention|Compresion|: str", line)
    ]
    assert sorted(found) == sorted(("wrong.py", str(line)) for line in mistakes), done.stdout + done.stderr


def test_the_installed_package_is_the_wheel_and_registers_its_operators(python, environment):
    location = python("import kvops; print(kvops.__file__)")
    assert Path(location).is_relative_to(environment.parent.parent)
    signature = python("import torch, kvops; print(torch.ops.kvops.flash_attention.default._schema)")
    assert signature.startswith("kvops::flash_attention(Tensor q, Tensor k, Tensor v, *")
    assert python("import kvops; from importlib.metadata import version; print(kvops.__version__ == version('kvops'))")
    kernels = python("import kvops.kernels.primitives as p; print(p.__file__)")
    assert Path(kernels).is_relative_to(environment.parent.parent)


def test_the_installed_operators_compute(python):
    code = """
import torch, kvops
q, k, v = torch.randn(3, 1, 5, 2, 16, dtype=torch.float64).float()
out, lse = kvops.flash_attention(q, k, v, causal=True)
exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
print((out - exact.transpose(1, 2)).abs().max().item() < 1e-5, tuple(lse.shape))
"""
    assert python(code) == "True (1, 2, 5)"


def test_it_lives_beside_the_kernels_package_of_hugging_face(python, environment):
    pip_output = (environment.parent.parent / "pip-output.txt").read_text()
    if "ERROR" in pip_output and "connection broken" in pip_output:
        pytest.skip("the package index cannot be reached, so Hugging Face's kernels is not here to be imported")
    code = (
        "import kernels, kvops.kernels, kvops.autotune, sys; "
        "print(kernels.__file__); print(list(kvops.kernels.__path__)[0]); print(kernels is kvops.kernels); "
        "print('get_kernel' in dir(kernels))"
    )
    theirs, ours, same, public = python(code).split("\n")
    assert Path(theirs).parent.name == "kernels"
    assert Path(theirs).parent.parent == Path(ours).parent.parent
    assert ours.endswith("kvops/kernels")
    assert (same, public) == ("False", "True"), pip_output


def test_importing_kvops_imports_torch_and_nothing_heavy(python):
    """Neither Triton nor the optional packages, and hardly more than ``import torch`` costs."""
    code = """
import sys, torch
before = set(sys.modules)
import kvops
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new), "triton" in sys.modules)
"""
    assert python(code) == "['kvops'] False"


def test_packages_are_imported_when_they_are_named(python):
    """And ``dir`` shows what is public, no more."""
    code = """
import sys, kvops
print([n for n in ("models", "policies", "generation", "parallel", "integrations") if "kvops." + n in sys.modules])
names = "policies models generation autotune parallel tables integrations".split()
print([n for n in names if getattr(kvops, n).__name__ not in ("kvops." + n, "kvops.cache." + n)])
print(dir(kvops) == sorted({*kvops.__all__, *names, "warm_up"}), [n for n in dir(kvops) if not hasattr(kvops, n)])
print(kvops.policies.Compression.__name__, kvops.models.load.__name__, kvops.tables.HeadBlocks.__name__)
print(kvops.warm_up.__name__)
kvops.no_such_name
"""
    with pytest.raises(AssertionError, match="module 'kvops' has no attribute 'no_such_name'"):
        python(code)
    assert python(code.rpartition("kvops.no_such")[0]).splitlines() == [
        "[]",
        "[]",
        "True []",
        "Compression load HeadBlocks",
        "warm_up",
    ]
