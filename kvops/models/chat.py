"""Chat templates: Jinja as Hugging Face renders it."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvops.extras import require


def render_chat(source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Render a chat template. ``tools`` and ``documents`` are None if ``variables`` does not have them.

    Raises:
        ValueError: the template refuses the messages, is not valid, or fails on them.
    """
    jinja2 = require("jinja2")
    names = {"tools": None, "documents": None, **variables}
    try:
        return _compiled(source).render(messages=messages, **names)
    except jinja2.TemplateError as error:
        raise ValueError(f"messages: the model's chat template says: {error}") from error
    except Exception as error:  # a template is a program, which can raise anything
        raise ValueError(f"messages: the model's chat template fails with {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    jinja2, sandbox = require("jinja2"), require("jinja2.sandbox")
    ext: Any = require("jinja2.ext")

    class Generation(ext.Extension):
        """``{% generation %}`` marks the assistant's text for training. Here it renders its content."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        # Jinja's own filter would escape <, > and & for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    # Templates come with models of any source. The sandbox hides Python's internals and keeps templates from changing
    # what they are given.
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
