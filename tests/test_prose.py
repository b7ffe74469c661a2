"""The words of docs, docstrings, comments and messages: phrases that read as translated stay out.

The list is short on purpose. Add a phrase when it is found twice.
"""

import re

import pytest
from snippets import ROOT

# A phrase, and what to write in its place.
PHRASES = {
    r"\bwhoever\b": "the function, the caller or the process",
    r"(?:[.:;(]|\b(?:and|but|only|for|of|to|by)) who (?:is|has|does|copies|writes|reads|asks|would)\b": "a row that",
    r"\bsomebody\b|\bdustbin\b": "the thing itself",
    r"\bby lot\b": "random",
    r"\bthat are (?-i:none)\b|\b(?:is|be) no (?:number|tensor|int\d*)\b": "that are not ...; NaN",
    r"\banew\b": "again",
    r"\bin silence\b": "without an error",
    r"\bone's own\b": "your own",
    r"\bsooner served\b": "faster",
    r"\bhands? out\b": "returns, yields",
    r"\bknows nothing of\b": "does not have",
}
SUFFIXES = (".py", ".md", ".sh")
FOLDERS = ("autotune", "bench", "docs", "examples", "kernels", "kvops", "tests")


def pages():
    """The files that people write. ``kvops/kernels`` and ``kvops/autotune`` are links, which rglob does not follow."""
    written = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*") if path.suffix in SUFFIXES]
    return [path for path in [*written, *ROOT.glob("*.md"), ROOT / "Makefile"] if path.name != "test_prose.py"]


def found_in(text):
    """Each phrase of the list in ``text``: its line, the phrase, and what to write."""
    # A phrase may be broken over two lines, in a comment or in strings.
    joined = re.sub(r"\s*\n[\s#\"]*", lambda gap: "\n" + " " * (len(gap[0]) - 1), text)
    for pattern, plain in PHRASES.items():
        for match in re.finditer(pattern.replace(" ", r"\s+"), joined, re.I):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), plain


def test_phrases_that_read_as_translated_stay_out():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {phrase!r}; write: {plain}"
        for path in pages()
        for line, phrase, plain in found_in(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("words drawn by lot", [1]),
        ("contenders, who is wrong gets no figure", []),
        ("A row. Only\n    # who writes gets a copy", [1]),
        ("it may be no number", [1]),
        ("a token that is no\n# number", [1]),
        ("Whoever reads this", [1]),
    ],
)
def test_phrases_are_found_over_the_ends_of_lines(text, lines):
    assert [line for line, _, _ in found_in(text)] == lines
