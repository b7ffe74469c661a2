"""Contexts and probes: Python's own manual, facts hidden in it, and random digits.

A context is read into the cache, the cache is compressed, and then the probes are read. So the compressed cache
predicts
every token of an answer: the token before the answer belongs to the probe, not to the context.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvops.generation.contexts import Probe
from kvops.generation.evaluate import AFTER, BEFORE, TEXT, Unit
from kvops.models.tokenizer import Tokenizer

MAP_RATIO = 8
"""The ratio at which every head's length is recorded."""

_WORDS = """
anchor apple arrow autumn barrel basket bridge bronze butter candle canyon carpet castle cherry copper cotton desert
dragon eagle engine falcon feather forest garden ginger granite hammer harbor helmet honey island ivory jungle kettle
ladder lantern lemon marble meadow mirror mountain needle ocean olive orange palace paper pepper pillow planet pocket
rabbit ribbon river rocket saddle salmon shadow silver spider summer sunset temple thunder ticket timber tunnel
turtle valley velvet violet walnut whisper willow window winter wizard yellow
"""
_NAMES = ("Alma", "Boris", "Clara", "Daniel", "Elena", "Frank", "Greta", "Hugo")
_STORIES = (
    (
        "Report on the Harrow expedition. The expedition was led by Ingrid Solberg, a geologist from Bergen. It left "
        "the harbour of Tromso in March 1931 with eleven sailors aboard a ship named Perseverance. The cook of the "
        "ship was Anton Weiss. After forty days the crew reached the island of Kvitoya, where they found a chest made "
        "of copper. The chest held nine silver coins and a map drawn by a monk named Aurelio.",
        (
            ("Who led the Harrow expedition?", "The expedition was led by", "Ingrid Solberg"),
            ("Who was the cook of the ship?", "The cook of the ship was", "Anton Weiss"),
            ("Which island did the crew reach?", "The crew reached the island of", "Kvitoya"),
            ("From where did the expedition leave?", "The expedition left the harbour of", "Tromso"),
            ("What was the chest made of?", "The chest was made of", "copper"),
            ("Who drew the map?", "The map was drawn by a monk named", "Aurelio"),
        ),
    ),
    (
        "Notes on the Lindqvist observatory. The observatory was founded by Lucia Marchetti, an astronomer from Padua. "
        "It opened in October 1958 on a mountain named Bellavista, with seven rooms and a telescope made of brass. The "
        "gardener of the observatory was Otto Brandt. In its third winter a student named Ravi saw a comet from the "
        "roof, and the comet was named Tamarind. The drawings of the comet hang in the library of Geneva.",
        (
            ("Who founded the Lindqvist observatory?", "The observatory was founded by", "Lucia Marchetti"),
            ("Who was the gardener?", "The gardener of the observatory was", "Otto Brandt"),
            ("On which mountain did it open?", "It opened on a mountain named", "Bellavista"),
            ("What was the telescope made of?", "The telescope was made of", "brass"),
            ("How was the comet named?", "The comet was named", "Tamarind"),
            ("Where do the drawings hang?", "The drawings hang in the library of", "Geneva"),
        ),
    ),
)


@dataclass(frozen=True)
class Size:
    """The size of a study: lengths of contexts, and the number of questions before compression.

    Attributes:
        texts: lengths of contexts of prose with the ``held_out`` tokens that follow, each with the number of its part
            of the manual.
        facts: of the contexts that have facts hidden in them, as for ``texts``; every context has different facts.
        before: how many of the questions about each of them are also part of the prompt, one prompt each.
        digits: how many random digits are to be repeated; the first ``repeated`` of them are asked for.
    """

    name: str
    texts: tuple[tuple[int, int], ...]
    held_out: int
    facts: tuple[tuple[int, int], ...]
    before: int
    digits: int
    repeated: int


FULL = Size("full", ((4096, 0), (2048, 1), (8192, 2), (4096, 3)), 96, ((4096, 0), (4096, 1)), 25, 800, 48)
QUICK = Size("quick", ((1024, 0),), 32, ((1024, 0),), 2, 200, 16)
TINY = Size("tiny", ((224, 0),), 8, ((300, 0),), 1, 48, 8)
SIZES = {size.name: size for size in (FULL, QUICK, TINY)}


def units(tokenizer: Tokenizer, size: Size) -> list[Unit]:
    """Every unit of a size, those with the same prefix next to each other; the same at every call."""
    first, *others = size.texts
    return [
        *_prose(tokenizer, size, *first),
        *(unit for number in range(len(size.facts)) for unit in facts(tokenizer, size, number)),
        *_digits(tokenizer, size),
        *(unit for text in others for unit in _prose(tokenizer, size, *text)),
    ]


def _manual(part: int) -> str:
    """A quarter of the language reference that comes with Python, about 30,000 tokens."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    start = text.index("\n\n", part * len(text) // 4) + 2
    return text[start : start + len(text) // 4]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, parse_special=False)


def _prose(tokenizer: Tokenizer, size: Size, length: int, part: int) -> list[Unit]:
    # Ten characters a token are plenty: a token has about four.
    tokens = _encode(tokenizer, _manual(part)[: 10 * length])[:length]
    start = length - size.held_out
    probe = Probe("continuation", tokens[start - 1 : start], tokens[start:], exact=False)
    name = f"{length // 1024}k" if length >= 1024 else str(length)
    return [Unit(f"text {name}, part {part}", TEXT, tokens[: start - 1], (), (probe,))]


def facts(tokenizer: Tokenizer, size: Size, number: int) -> list[Unit]:
    """Questions about context ``number`` of ``size``, which has facts hidden in prose."""
    length, part = size.facts[number]
    story, questions = _STORIES[number]
    rng = random.Random(2026 + number)
    words = _WORDS.split()
    rng.shuffle(words)

    def phrase() -> str:
        return f"{words.pop()} {words.pop()}"

    needles = {
        "The secret passphrase of the lighthouse is": phrase(),
        "The ferry to the northern islands is called the": phrase(),
        "The best thing to bring to the market of Ravenna is a": phrase(),
    }
    passwords = {f"The password of {name} is": phrase() for name in _NAMES}
    pairs = {words.pop(): phrase() for _ in range(12)}
    inserted = [f"{start} {end}." for start, end in (needles | passwords).items()]
    inserted += [story, "\n".join(f"{key}: {value}" for key, value in pairs.items())]
    rng.shuffle(inserted)
    context = _spread(tokenizer, inserted, length, part)

    asked = [("needle", start, end) for start, end in needles.items()]
    asked += [("several needles", start, end) for start, end in passwords.items()]
    asked += [("key-value", f"{key}:", value) for key, value in list(pairs.items())[:8]]
    asked += [("questions", f"Question: {question}\nAnswer: {start}", end) for question, start, end in questions]
    gap = _encode(tokenizer, "\n\n")
    probes = [
        Probe(task, [*gap, *_encode(tokenizer, start)], _encode(tokenizer, f" {end}")) for task, start, end in asked
    ]
    known = [place * len(probes) // size.before for place in range(size.before)]

    def asked_before(probe: Probe, name: str) -> Unit:
        answered = Probe(probe.task, probe.tail[-1:], probe.answer)
        return Unit(name, BEFORE, context, probe.tail[:-1], (answered,))

    return [
        Unit(f"facts, part {part}", AFTER, context, (), tuple(probes)),
        *(asked_before(probes[place], f"facts, part {part}, question {place}") for place in known),
    ]


def _spread(tokenizer: Tokenizer, inserted: Sequence[str], length: int, part: int) -> list[int]:
    """Paragraphs of a part of the manual with ``inserted`` spread evenly between them, about ``length`` tokens."""
    room = max(0, length - len(_encode(tokenizer, "\n\n".join(inserted))))
    filler = _encode(tokenizer, _manual(part)[: 10 * room + 1])[:room]
    paragraphs = tokenizer.decode(filler).split("\n\n")
    mixed: list[str] = []
    for number, fact in enumerate(inserted):
        start, end = (place * len(paragraphs) // len(inserted) for place in (number, number + 1))
        mixed += [*paragraphs[start:end], fact]
    return _encode(tokenizer, "\n\n".join(mixed))


def _digits(tokenizer: Tokenizer, size: Size) -> list[Unit]:
    """Repeating random digits, as in the test of vllm-kvcompress: none can be guessed, all must be found in the
    cache."""
    rng = random.Random(10)
    digits = [str(rng.randrange(10)) for _ in range(size.digits)]
    context = _encode(tokenizer, f"Digits: {''.join(digits)}")
    question = _encode(tokenizer, "\n\nDigits:")
    answer = _encode(tokenizer, f" {''.join(digits[: size.repeated])}")
    answered = (Probe("digits", question, answer, exact=False),)
    known = (Probe("digits", question[-1:], answer, exact=False),)
    return [
        Unit("digits", AFTER, context, (), answered),
        Unit("digits, asked before", BEFORE, context, question[:-1], known),
    ]
