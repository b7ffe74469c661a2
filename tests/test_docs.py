"""The manual is true: its Python runs, its links lead somewhere, and its tables are complete."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import re
import shlex

import pytest
import torch
from snippets import ROOT, blocks_of, skip_without

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EVERY_PAGE = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "BENCHMARKS.md"))]
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def name_of(page):
    return str(page.relative_to(ROOT))


def programs():
    """A page's Python, and whether it loads the real model."""
    for page in PAGES:
        blocks = [block for block in blocks_of(page.read_text(encoding="utf-8")) if block.kind == "python"]
        if blocks:
            marks = [pytest.mark.model] if any("model" in block.needs for block in blocks) else []
            yield pytest.param(page, blocks, id=name_of(page), marks=marks)


@pytest.mark.filterwarnings("error:kvops:DeprecationWarning")
@pytest.mark.parametrize(("page", "blocks"), list(programs()))
def test_python_of_a_page_runs_from_top_to_bottom(page, blocks, tmp_path, monkeypatch):
    """A page is a program: later blocks see what earlier ones defined."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        skip_without(block.needs)
        code = compile("\n" * block.line + block.code, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, namespace)


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name_of)
def test_relative_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for match in LINK.finditer(re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        target = match["target"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)}: {target} is not there"
        if heading and there.suffix == ".md":
            assert heading in headings(there), f"{name_of(page)}: {target} names no heading"


def headings(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


COMMANDS = {"kvops": "kvops.__main__", "kvops.autotune": "kvops.autotune.__main__", "bench": "bench.__main__"}
COMMAND = re.compile(r"^(?:\w+=\S+ )*python -m (?P<module>[\w.]+) (?P<arguments>[^|<>#\n]+)", re.M)


def command_lines():
    for page in EVERY_PAGE:
        for block in blocks_of(page.read_text(encoding="utf-8")):
            for match in COMMAND.finditer(block.code if block.kind == "sh" else ""):
                if match["module"] in COMMANDS:
                    yield pytest.param(match, id=f"{name_of(page)}: {match[0].strip()}")


@pytest.mark.parametrize("command", list(command_lines()))
def test_command_lines_of_the_manual_are_accepted(command, monkeypatch):
    def parse(parser, arguments=None, namespace=None):
        parser.parse_known_args(arguments, namespace)
        parser.exit(0)  # before the command runs; a wrong option exits with 2

    main = importlib.import_module(COMMANDS[command["module"]]).main
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command["arguments"]))
    assert ended.value.code == 0


def test_the_page_of_the_command_line_names_options_that_exist(capsys):
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    main = importlib.import_module("kvops.__main__").main
    commands = re.findall(r"^## ([\w-]+)$", page, re.M)
    helps = []
    for command in commands:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        helps.append(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.search(r"\{([\w,-]+)\}", capsys.readouterr().out)[1]
    assert sorted(commands) == sorted(listed.split(","))
    named, known = (set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) for text in (page, "".join(helps)))
    assert named <= known


def test_the_table_of_environment_variables_is_complete():
    table = set(re.findall(r"^\| `(KVOPS_\w+)`", (DOCS / "environment.md").read_text(encoding="utf-8"), re.M))
    sources = [
        path for folder in ("kvops", "kernels", "autotune", "bench", "tests", "examples") for path in python_of(folder)
    ]
    used = {
        name
        for path in [*sources, ROOT / "Makefile"]
        for name in re.findall(r"KVOPS_[A-Z][A-Z_]*[A-Z]", path.read_text(encoding="utf-8"))
    }
    assert table == used, "docs/environment.md lists every KVOPS_ variable of the sources and no other"


def python_of(folder):
    return list((ROOT / folder).rglob("*.py"))


def test_every_operator_is_on_exactly_one_page():
    shown = re.findall(
        r"autofunction:: kvops\.(\w+)$",
        "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "operators").glob("*.md"))),
        re.M,
    )
    operators = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("kvops::")
    }
    operators = {name.partition(".")[0] for name in operators}
    assert sorted(shown) == sorted(operators | {"tree_mask", "process_logits", "verify_tree_varlen"})


def test_figures_are_what_the_script_draws():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "figures" / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    drawn = draw.figures()
    stored = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "figures").glob("*.svg")}
    assert stored == drawn, "next step: python docs/figures/draw.py"


def toctree_pages(page, name):
    """The pages that an entry names, which may be a pattern and may begin with ../ ."""
    return [there.resolve() for there in page.parent.glob(f"{name}.md")]


def test_every_page_is_reached_from_the_index():
    """Sphinx warns of it too, in a build; this holds it without one."""
    reached, left = set(), [DOCS / "index.md"]
    while left:
        page = left.pop()
        reached.add(page)
        for toctree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            names = [line for line in toctree.splitlines() if line and not line.startswith(":")]
            pages = [there for name in names for there in toctree_pages(page, name)]
            left += [there for there in pages if there not in reached]
    assert reached == set(PAGES)
