"""The manual is true: its Python runs, its links lead somewhere, and its tables are complete."""

import contextlib
import io
import re

import pytest
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
