"""Proof without a GPU: what a source hash sees, what is compiled again, and that the shipped tables tell the truth."""

import importlib
import sys
import textwrap
from collections import Counter

import pytest
from autotune_fakes import triton_version

from kvops.autotune import feasibility, prune, specs
from kvops.autotune.devices import by_name
from kvops.autotune.feasibility import Proof, current_source, judge, load_table, parse_table
from kvops.autotune.prune import TARGET_ORDER, Task, missing, tasks
from kvops.autotune.source_hash import SourceError, reached, source_hash

# --- source hashes --------------------------------------------------------------------------------------------------

SHARED = """
WIDTH = 4
UNUSED = 1

def square(x):
    return x * x
"""
KERNEL = '''
import triton
import triton.language as tl
from PACKAGE.shared import WIDTH, square

def helper(x):
    return square(x) + WIDTH

@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    """What it does."""
    x = helper(tl.load(x_ptr))  # a comment
    tl.store(x_ptr, x)

def bystander():
    return 1
'''


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """The hash of KERNEL and SHARED, each with some text replaced, in a package of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def hashed(old="", new=""):
        name = f"hashed_{tmp_path.name}_{len(made)}"  # read once for each name
        made.append(name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        for module, text in (("shared", SHARED), ("kernels", KERNEL)):
            text = text.replace(old, new) if old else text
            (tmp_path / name / f"{module}.py").write_text(text.replace("PACKAGE", name))
        importlib.invalidate_caches()
        # Names of modules count, and those of these packages differ: they are taken out again.
        trees = reached(f"{name}.kernels", "kernel")
        return sorted((module.removeprefix(name), what, tree) for (module, what), tree in trees.items())

    return hashed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * x", "x * x * x"),  # a function that a function that the kernel calls calls
        ("WIDTH = 4", "WIDTH = 8"),  # a constant of another module
        ("square(x) + WIDTH", "square(x) - WIDTH"),
        ("tl.store(x_ptr, x)", "tl.store(x_ptr, x + 1)"),
        ("BLOCK: tl.constexpr", "BLOCK: tl.constexpr, MORE: tl.constexpr"),
        ("@triton.jit", "@triton.jit(do_not_specialize=['x_ptr'])"),
    ],
)
def test_what_the_kernel_computes_changes_its_hash(hash_of, old, new):
    assert hash_of(old, new) != hash_of()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # a comment", ""),
        ("What it does.", "What it really does."),
        ("\nimport triton\n", "\n\n\n\nimport triton\n"),  # line numbers
        ("helper(tl.load(x_ptr))", "helper(\n        tl.load(x_ptr),\n    )"),
        ("UNUSED = 1", "UNUSED = 2"),
        ("return 1", "return 2"),  # a function that the kernel does not call
    ],
)
def test_how_the_source_is_written_does_not_change_its_hash(hash_of, old, new):
    assert hash_of(old, new) == hash_of()


def test_a_hash_follows_kernels_into_the_functions_that_they_share():
    names = {name for _, name in reached("kvops.kernels.paged_attention_kernel", "paged_attention_kernel")}
    assert {"paged_attention_kernel", "online_softmax_step", "page_address", "load_slots", "dot", "LOG2_E"} <= names
    assert "paged_attention" not in names  # the launch function
    assert len({current_source(spec) for spec in specs().values()}) == len({spec.kernels for spec in specs().values()})
    with pytest.raises(SourceError, match="expected 'no_kernel' to be defined in"):
        source_hash(["kvops.kernels.paged_attention_kernel:no_kernel"])
    with pytest.raises(SourceError, match="expected a module with a Python file"):
        source_hash(["kvops.no_module:kernel"])


# --- compiling ------------------------------------------------------------------------------------------------------

FOREIGN = """
    import dataclasses, os, signal
    import torch, triton
    import triton.language as tl
    from kvops import autotune
    from kvops.kernels.device import current_device

    @triton.jit
    def doubling_kernel(x_ptr, BLOCK: tl.constexpr):
        index = tl.arange(0, BLOCK)
        tl.store(x_ptr + index, 2 * tl.load(x_ptr + index))

    @dataclasses.dataclass(frozen=True)
    class Config:
        block: int

    def workload(problem, device, small):
        x = torch.zeros(1024)
        def run():
            block = autotune.choose("doubling", current_device(), problem["size"]).block
            if block == 64:
                os.kill(os.getpid(), signal.SIGKILL)
            doubling_kernel[(1,)](x, BLOCK=block)
            return (x,)
        return autotune.Workload(run)

    autotune.register(autotune.OpSpec(
        name="doubling", config=Config, key=(), sizes=("size",), heuristic=lambda p, d: Config(128),
        space=lambda p, d: [Config(32), Config(64), Config(96)], kernels=(doubling_kernel,), workload=workload,
        problems=({"size": 1024},),
    ))
"""


def test_candidates_are_proved_once_and_again_when_the_source_changes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (tmp_path / "doubling_module.py").write_text(textwrap.dedent(FOREIGN))
    importlib.import_module("doubling_module")
    try:
        spec = specs()["doubling"]
        told = []
        arguments = {"imports": ["doubling_module"], "progress": lambda task, proof, done, total: told.append(task)}
        assert prune.prune([spec], ["sm_90"], tmp_path / "out", **arguments) == (4, 0)
        table = parse_table((tmp_path / "out" / "doubling.json").read_text(), spec)
        group = table.group("sm_90", {})
        assert group.rows[spec.config(128)].registers > 0
        assert "crashed its process" in group.rows[spec.config(64)].problem
        assert "does not compile" in group.rows[spec.config(96)].problem  # no power of two
        h100 = by_name("sm_90")
        verdicts = {config.block: judge(spec, config, {"size": 9}, h100, table).status for config in group.rows}
        assert verdicts == {128: "proven", 32: "proven", 64: "impossible", 96: "impossible"}
        # Nothing is compiled twice; a proof of what the space does not hold goes.
        group.rows[spec.config(256)] = Proof()
        (tmp_path / "out" / "doubling.json").write_text(feasibility.dump_table(spec, table))
        assert prune.prune([spec], ["sm_90"], tmp_path / "out", **arguments) == (0, 0)
        assert len(told) == 4
        del group.rows[spec.config(256)]
        assert parse_table((tmp_path / "out" / "doubling.json").read_text(), spec) == table
        # Other sources prove nothing.
        monkeypatch.setattr(prune, "current_source", lambda spec: "changed")
        assert len(missing(tasks([spec], ["sm_90"]), lambda spec: table, triton_version())) == 4
    finally:
        specs().pop("doubling")
        sys.modules.pop("doubling_module")


def test_defaults_are_proved_before_candidates_and_common_gpus_before_rare_ones():
    work = tasks(specs().values(), TARGET_ORDER)
    defaults = [task.config == task.spec.heuristic(task.problem, by_name(task.target)) for task in work]
    assert defaults == sorted(defaults, reverse=True)
    places = [TARGET_ORDER.index(task.target) for task in work if not defaults[0]]
    assert places == sorted(places)
    with pytest.raises(ValueError, match="targets: expected names among sm_80"):
        prune.prune([], ["sm_1"], feasibility.FOLDER)


# --- the shipped tables ---------------------------------------------------------------------------------------------

SHIPPED = [spec for spec in specs().values() if spec.workload and load_table(spec).groups]
of_these_versions = pytest.mark.skipif(
    any(group.triton != triton_version() for spec in SHIPPED for group in load_table(spec).groups.values()),
    reason="the shipped tables were compiled by another Triton",
)


@of_these_versions
def test_the_shipped_tables_prove_every_candidate_of_the_sources_as_they_are():
    left = Counter(task.spec.name for task in missing(tasks(SHIPPED, TARGET_ORDER), load_table, triton_version()))
    assert not left, "kernels or spaces changed; next step: make prune"


@of_these_versions
@pytest.mark.compile
def test_compiling_again_gives_what_the_tables_say(tmp_path, monkeypatch):
    """A default of every third family, of another target each: ``verify --recompile`` does more."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    picked: list[Task] = []
    expected = {}
    for number, spec in list(enumerate(SHIPPED))[::3]:
        order = [*TARGET_ORDER[number % len(TARGET_ORDER) :], *TARGET_ORDER]
        target = next(target for target in order if tasks([spec], [target]))  # some families have one target
        task = tasks([spec], [target])[0]
        group = load_table(spec).group(target, spec.proof_of(task.problem))
        if group is None or group.source != current_source(spec):
            continue  # the test above tells
        picked.append(task)
        expected[spec.name] = group.rows[task.config]
    found = {task.spec.name: proof for task, proof in prune.run(picked)}
    assert found == expected


@pytest.mark.compile
@pytest.mark.parametrize(("member", "representative"), [("sm_103", "sm_100"), ("sm_121", "sm_120")])
@pytest.mark.parametrize("op", ["flash_forward", "paged_attention", "paged_append"])
def test_a_member_of_a_family_takes_what_the_table_says_of_its_family(
    op, member, representative, tmp_path, monkeypatch
):
    """Shared memory and spills decide whether a launch fits; sm_103 and sm_121 have no tables of their own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    spec = specs()[op]
    task = tasks([spec], [member])[0]
    group = load_table(spec).group(representative, spec.proof_of(task.problem))
    of_family = group.rows[task.config]
    ((_, found),) = prune.run([task])
    assert (found.shared_memory, found.spills, found.problem) == (of_family.shared_memory, of_family.spills, "")
    assert found.matrix == of_family.matrix
    assert found.registers <= of_family.registers + 8
