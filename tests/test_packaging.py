"""The distribution that users install: one top-level name, everything inside, at peace with its neighbours on PyPI."""

import os
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
FOLDERS = ("kvops", "kernels", "autotune")
FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")


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
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(REPOSITORY / file, copy / file)
    return copy


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


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The Python of a fresh environment with the wheel, and Hugging Face's ``kernels`` where the index is in reach.

    The packages of this environment (torch, which is large) are put behind its own by a .pth line. Such a line does not
    run the .pth files of the folder it adds, so the editable installation of this repository stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check", "install")
    run(*pip, "--no-deps", "--no-index", str(wheel), cwd=folder)
    constraints = str(REPOSITORY / "constraints.txt")
    command = [*pip, "--no-deps", "--retries", "1", "--only-binary", ":all:", "-c", constraints, "kernels"]
    installed = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder)
    (folder / "pip-output.txt").write_text(installed.stdout + installed.stderr)
    site_packages = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    (site_packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


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


def test_the_repository_links_its_kernels_and_autotune_folders():
    for name in ("kernels", "autotune"):
        link = REPOSITORY / "kvops" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def test_the_wheel_owns_one_name_and_holds_every_module(wheel):
    check_contents(wheel)


def test_a_wheel_built_from_the_sdist_is_the_same(wheel, distribution):
    (sdist,) = distribution.glob("kvops-*.tar.gz")
    (from_sdist,) = distribution.glob("kvops-*.whl")
    check_contents(from_sdist)
    assert members(from_sdist) == members(wheel)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= inside


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
