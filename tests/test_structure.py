"""The structure of the sources: no circle of imports, no long file, and a reason beside every long function."""

import ast
import subprocess
from pathlib import Path

import pytest
from test_imports import FILES, REPOSITORY, imports, module_name

LONGEST_FILE = 500
LONGEST_FUNCTION = 80
# Above its decorators a longer function has a comment that begins so and gives the reason.
REASON = f"# Over {LONGEST_FUNCTION} lines: "

# The one deliberate circle. A family names its workload as a string, and the tuner imports it when it runs candidates:
# workloads launch kernels, and kernels look up their configuration among the families.
AT_RUN_TIME = "kvops.autotune.workloads"

MODULES = FILES | {module_name(path): path for path in sorted((REPOSITORY / "bench").rglob("*.py"))}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True)
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    if not names:  # an unpacked sdist is no repository
        names = [str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("[a-z]*/**/*.py")]
    return [path for path in map(REPOSITORY.joinpath, names) if path.is_file()]


SOURCES = {str(path.relative_to(REPOSITORY)): path for path in tracked()}


def edges() -> dict[str, set[str]]:
    """Module to the modules that it imports, at the top or in a function."""
    graph = {}
    for name, path in MODULES.items():
        modules = set()
        for module, lazily, _ in imports(name, ast.parse(path.read_text())):
            if module != name and not (lazily and module == AT_RUN_TIME and name.startswith("kvops.autotune")):
                modules.add(module)
        graph[name] = modules & MODULES.keys()
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in order; empty if there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for module in sorted(graph[name]):
            if around := visit(module):
                return around
        path.pop()
        done.add(name)
        return []

    return next((around for name in sorted(graph) if (around := visit(name))), [])


def test_imports_have_no_circle():
    assert circle(edges()) == []


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b", "c"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
    ],
)
def test_a_circle_is_found(graph, found):
    assert circle(graph) == found


def test_no_file_is_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    assert {name for name, length in lengths.items() if length > LONGEST_FILE} == set()


def long_functions(source: str) -> list[str]:
    """The functions of a file that are too long and give no reason above their decorators."""
    lines = source.splitlines()
    long = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            above = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
            while above > 0 and lines[above - 1].lstrip().startswith("#"):
                above -= 1
            reason = lines[above].lstrip().startswith(REASON)
            if node.end_lineno - node.lineno >= LONGEST_FUNCTION and not reason:
                long.append(node.name)
    return long


@pytest.mark.parametrize("name", SOURCES)
def test_a_long_function_gives_its_reason(name):
    assert long_functions(SOURCES[name].read_text()) == []


def test_a_long_function_is_found():
    body = "    pass\n" * LONGEST_FUNCTION
    assert long_functions(f"def f():\n{body}") == ["f"]
    assert long_functions(f"@cache\ndef f():\n{body}") == ["f"]
    assert long_functions(f"{REASON}a table.\n@cache\ndef f():\n{body}") == []
    assert long_functions("def f():\n" + body.removesuffix("    pass\n")) == []


def undecided_launches(source: str) -> list[int]:
    """The lines of launches, ``kernel[grid](...)``, that do not say whether Triton fuses multiply-adds."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    launches = (call for call in calls if isinstance(call.func, ast.Subscript))
    return [launch.lineno for launch in launches if "enable_fp_fusion" not in [word.arg for word in launch.keywords]]


def test_every_launch_says_whether_multiply_adds_are_fused():
    """Triton 3.9 warns where a launch does not, and 3.10 fuses none then: kernels would be slower, and round otherwise
    than those that the tables were made with."""
    kernels = {name: path.read_text() for name, path in SOURCES.items() if name.startswith("kernels/")}
    assert sum("enable_fp_fusion=True" in source for source in kernels.values()) > 10
    assert {name: lines for name, source in kernels.items() if (lines := undecided_launches(source))} == {}
    assert undecided_launches("f(x)\nkernel[(1,)](x, num_warps=4)\nkernel[(1,)](x, enable_fp_fusion=True)") == [2]
