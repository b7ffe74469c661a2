"""The instructions by kind; importing them enters each in the table (``table.TABLE``)."""

from kvops.autotune.machine.instructions import (
    asynchronous,
    convert,
    floating,
    integer,
    matrix,
    memory,
    move,
    warp,
    wgmma,
)
from kvops.autotune.machine.instructions.table import SECTIONS, TABLE, Operation, operation_of

__all__ = [
    "SECTIONS",
    "TABLE",
    "Operation",
    "asynchronous",
    "convert",
    "floating",
    "integer",
    "matrix",
    "memory",
    "move",
    "operation_of",
    "warp",
    "wgmma",
]
