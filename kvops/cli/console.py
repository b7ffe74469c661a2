"""What the command lines share."""

from __future__ import annotations

import os
import select
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

_P = ParamSpec("_P")


def quiet_without_reader(main: Callable[_P, int]) -> Callable[_P, int]:
    """``main`` of a command, which ends as Unix tools do where nobody reads on (``| head``): at once, without a word,
    with the exit status that a shell shows for SIGPIPE."""

    @wraps(main)
    def quiet(*args: _P.args, **kwargs: _P.kwargs) -> int:
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not _nobody_reads(sys.stdout.fileno()):
                raise  # it was another pipe: that of a worker, say
            # What is left would be written, and complained about, once more when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE

    return quiet


def positive(text: str) -> int:
    """The type of an argparse argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)


def _nobody_reads(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
