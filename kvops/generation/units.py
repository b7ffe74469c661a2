"""Units for :func:`kvops.generation.evaluate.evaluate` from a text and from question files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvops import checks
from kvops.generation.contexts import Probe
from kvops.generation.evaluate import AFTER, BEFORE, TEXT, Unit
from kvops.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        question: the model reads ``"{context}\\n\\nQuestion: {question}\\nAnswer: {lead}"``.
        answer: the text that greedy decoding must give next, after a space.
        context: the text that is read first; empty for the text that all questions share.
        lead: how the answer begins, such as ``"The capital is"``; may be empty.
        task: the name that answers are counted under.
        before: True reads the question before the cache is compressed. False reads it afterwards, so that no policy
            has seen it.
    """

    question: str
    answer: str
    context: str = ""
    lead: str = ""
    task: str = "questions"
    before: bool = False

    def __post_init__(self) -> None:
        for name in ("question", "answer", "context", "lead", "task"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected a string, got {getattr(self, name)!r}")
        if not self.question or not self.answer:
            raise ValueError("question and answer: expected some text each, got an empty string")
        if not isinstance(self.before, bool):
            raise TypeError(f"before: expected true or false, got {self.before!r}")


def read_questions(path: str | Path) -> list[Question]:
    """Read a file of JSON lines. Each line has attributes of :class:`Question`: ``question`` and ``answer``, and
    optionally ``context``, ``lead``, ``task`` and ``before``.

    Raises ValueError, with the number of the line, for a line of other content, and for a file without questions.
    """
    questions = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            questions.append(_question(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise ValueError(f"{path}: expected questions as JSON lines, got none")
    return questions


def _question(entry: Any) -> Question:
    if not isinstance(entry, Mapping) or not {"question", "answer"} <= set(entry):
        raise ValueError('expected {"question": ..., "answer": ...}, got ' + json.dumps(entry)[:80])
    if unknown := set(entry) - set(Question.__dataclass_fields__):
        raise ValueError(f"expected the fields {', '.join(Question.__dataclass_fields__)}, got {', '.join(unknown)}")
    return Question(**entry)


def text_units(
    tokenizer: Tokenizer, text: str, *, context: int = 2048, held_out: int = 256, contexts: int = 2
) -> list[Unit]:
    """At most ``contexts`` parts of a text, evenly spread, each with the ``held_out`` tokens that follow it.

    A text shorter than ``context + held_out`` tokens is one part. Raises ValueError for a text of fewer than ``2 *
    held_out`` tokens.
    """
    for name, value in (("context", context), ("held_out", held_out), ("contexts", contexts)):
        checks.expect_int(name, value, 1 if name != "context" else 2)
    first = _first(tokenizer)
    tokens = tokenizer.encode(text, parse_special=False, add_bos=False)
    if len(tokens) < 2 * held_out:
        raise ValueError(f"text: expected at least {2 * held_out} tokens, twice held_out, got {len(tokens)}")
    size = min(context - len(first), len(tokens) - held_out)
    count = min(contexts, len(tokens) // (size + held_out))
    units = []
    for part in range(count):
        start = part * (len(tokens) // count)
        middle = start + size
        probe = Probe("continuation", tokens[middle - 1 : middle], tokens[middle : middle + held_out], exact=False)
        units.append(Unit(f"text, part {part}", TEXT, (*first, *tokens[start : middle - 1]), (), (probe,)))
    return units


def question_units(
    tokenizer: Tokenizer, questions: Sequence[Question], *, text: str = "", context: int | None = None
) -> list[Unit]:
    """A unit for each context with all its questions after compression, and one for each question before compression.

    ``text`` is the context of questions that have none; ``context`` cuts contexts to that many tokens. Raises
    ValueError for questions without a context where there is no text.
    """
    by_context: dict[str, list[Question]] = {}
    for question in questions:
        by_context.setdefault(question.context or text, []).append(question)
    if "" in by_context:
        asked = by_context[""][0].question
        raise ValueError(f"questions: expected a context for each, or a text for all, got none for {asked!r}")
    units = []
    for number, (content, members) in enumerate(by_context.items()):
        prefix = (*_first(tokenizer), *tokenizer.encode(content, parse_special=False, add_bos=False))[:context]
        name = f"context {number}"
        after = tuple(_probe(tokenizer, question) for question in members if not question.before)
        if after:
            units.append(Unit(name, AFTER, prefix, (), after))
        for place, question in enumerate(question for question in members if question.before):
            whole = _probe(tokenizer, question)
            probe = Probe(whole.task, whole.tail[-1:], whole.answer)
            units.append(Unit(f"{name}, question {place}", BEFORE, prefix, whole.tail[:-1], (probe,)))
    return units


def _first(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that a text begins with, if the model has one."""
    return (tokenizer.bos_token_id,) if tokenizer.add_bos and tokenizer.bos_token_id is not None else ()


def _probe(tokenizer: Tokenizer, question: Question) -> Probe:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, parse_special=False, add_bos=False)

    # The empty line is encoded separately, so that all tails begin with the same token.
    lead = f" {question.lead}" if question.lead else ""
    tail = [*encode("\n\n"), *encode(f"Question: {question.question}\nAnswer:{lead}")]
    return Probe(question.task, tail, encode(f" {question.answer}"))
