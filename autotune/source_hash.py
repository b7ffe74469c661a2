"""A hash of a kernel's source: its syntax tree, and those of the functions and constants that it names.

Comments, docstrings, line numbers, formatting and the version of Python do not change the hash. Sources are read as
files; nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any


class SourceError(ValueError):
    """A kernel's source cannot be found."""


@cache
def _module(name: str) -> tuple[dict[str, list[ast.stmt]], dict[str, tuple[str, str]]]:
    """The statements that define each name of a module, and the origin of each imported name."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise SourceError(f"source: expected a module with a Python file, got {name!r}")
    return _read(Path(spec.origin).read_text())


def _read(source: str) -> tuple[dict[str, list[ast.stmt]], dict[str, tuple[str, str]]]:
    definitions: dict[str, list[ast.stmt]] = {}
    imported: dict[str, tuple[str, str]] = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            for alias in statement.names:
                imported[alias.asname or alias.name] = (statement.module, alias.name)
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            definitions.setdefault(statement.name, []).append(statement)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for node in ast.walk(target):
                    if isinstance(node, ast.Name):
                        definitions.setdefault(node.id, []).append(statement)
    return definitions, imported


def _text(node: Any) -> Iterator[str]:
    """A syntax tree as text that is the same in all versions of Python: without empty fields and docstrings."""
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if name in ("type_comment", "kind", "type_params", "ctx"):
                continue
            if (
                name == "body"
                and isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and ast.get_docstring(node) is not None
            ):
                value = value[1:]
            if value is not None and value != []:
                yield f" {name}="
                yield from _text(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _text(item)
            yield ","
        yield "]"
    else:
        yield repr(node)


def reached(module: str, name: str) -> dict[tuple[str, str], str]:
    """All definitions in this top-level package that ``name`` depends on: (module, name) to its tree as text.

    Raises SourceError if ``module`` has no ``name``.
    """
    package = module.partition(".")[0]
    trees: dict[tuple[str, str], str] = {}
    waiting = [(module, name)]
    while waiting:
        where, what = waiting.pop()
        if (where, what) in trees:
            continue
        definitions, imported = _module(where)
        if what not in definitions:
            if what in imported and imported[what][0].partition(".")[0] == package:
                waiting.append(imported[what])
                continue
            raise SourceError(f"source: expected {what!r} to be defined in {where}")
        trees[where, what] = "".join(text for statement in definitions[what] for text in _text(statement))
        for statement in definitions[what]:
            for node in ast.walk(statement):
                if not isinstance(node, ast.Name) or node.id == what:
                    continue
                if node.id in definitions:
                    waiting.append((where, node.id))
                elif node.id in imported and imported[node.id][0].partition(".")[0] == package:
                    source, original = imported[node.id]
                    if original in _module(source)[0]:
                        waiting.append((source, original))
    return trees


def source_hash(kernels: Iterable[Any]) -> str:
    """12 hexadecimal digits for JIT functions, given as ``"module:name"`` or as functions, in any order."""
    trees: dict[tuple[str, str], str] = {}
    for kernel in kernels:
        if isinstance(kernel, str):
            module, _, name = kernel.partition(":")
            trees |= reached(module, name)
        else:
            trees |= _from_function(kernel)
    digest = hashlib.sha256()
    for (module, name), tree in sorted(trees.items()):
        digest.update(f"{module}:{name} {tree}\n".encode())
    return digest.hexdigest()[:12]


def _from_function(kernel: Any) -> dict[tuple[str, str], str]:
    """The trees of a JIT function: by its module where that is a file, else by the source of its script or notebook."""
    function = getattr(kernel, "fn", kernel)
    module, name = function.__module__, function.__name__
    if module != "__main__":
        try:
            return reached(module, name)
        except SourceError:
            pass
    try:
        source = Path(inspect.getsourcefile(function) or "").read_text()
    except (OSError, TypeError) as error:
        raise SourceError(f"source: expected {name!r} to come from a file, got {module}") from error
    definitions, _ = _read(source)
    waiting, trees = [name], {}
    while waiting:
        what = waiting.pop()
        if what in definitions and (module, what) not in trees:
            trees[module, what] = "".join(text for statement in definitions[what] for text in _text(statement))
            waiting += [node.id for part in definitions[what] for node in ast.walk(part) if isinstance(node, ast.Name)]
    if (module, name) not in trees:
        raise SourceError(f"source: expected {name!r} to be defined at the top of its file")
    return trees
