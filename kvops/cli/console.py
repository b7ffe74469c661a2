"""Shared by the command lines: parsing with suggestions, tables, and the behaviour of a Unix tool in a pipe."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import select
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec

_P = ParamSpec("_P")


class Parser(argparse.ArgumentParser):
    """argparse's parser, with suggestions for misspelt options.

    argparse itself reports a missing required argument first, which may be the misspelt one. Options
    are never abbreviated, so that a new option cannot change what an old command means.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:  # otherwise the options belong to a command
            self._expect_known(given)
        return super().parse_known_args(given, namespace)

    def _expect_known(self, args: Sequence[str]) -> None:
        known = self._option_string_actions
        for text in args:
            if text == "--":
                return
            name = text.partition("=")[0]
            if re.fullmatch(r"--?[a-zA-Z][\w-]*", name) and name not in known:
                self.error(f"{name}: expected an option of this command{suggestion(name, known)}")


def suggestion(word: str, choices: Iterable[str]) -> str:
    """``"; did you mean A or B?"`` for ``choices`` that resemble ``word``; an empty string without one."""
    close = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def table(rows: Iterable[Sequence[object]], headers: Sequence[str] = (), align: str = "") -> str:
    """Rows as columns of text, None as an empty cell. ``align``: a letter for each column, r for right-aligned."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if headers:
        widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
        cells = [list(headers), ["-" * width for width in widths], *cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align = align.ljust(len(widths), "l")
    lines = (
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def quiet_without_reader(main: Callable[_P, int]) -> Callable[_P, int]:
    """Wrap the ``main`` of a command so that it ends like a Unix tool when its output is no longer read (``| head``):
    at once, without a message, with the exit status of SIGPIPE."""

    @wraps(main)
    def quiet(*args: _P.args, **kwargs: _P.kwargs) -> int:
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not _nobody_reads(sys.stdout.fileno()):
                raise  # another pipe, such as a worker's
            # Python would write the rest when it ends, and report the error again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE

    return quiet


def positive(text: str) -> int:
    """The type of an argparse argument: an int of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)


def _nobody_reads(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
