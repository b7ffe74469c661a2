"""``python -m kvops evaluate``: the quality that policies keep, measured on your own model, text and questions."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kvops
from kvops.cli import models, options
from kvops.cli.console import table
from kvops.cli.environment import chosen_device, what_runs
from kvops.cli.evaluate_plot import draw
from kvops.extras import require
from kvops.generation.evaluate import Reader, Row, Summary, Unit, Variant, evaluate, summarize
from kvops.generation.units import question_units, read_questions, text_units
from kvops.models.tokenizer import Tokenizer
from kvops.policies import POLICIES, Policy

_DEFAULT_POLICY = "standout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="a text, for perplexity and agreement of its continuation"
    )
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help='questions as JSON lines: {"question": ..., "answer": ...}; with "context" for another context than '
        '--text, "lead" for the beginning of the answer, "task" to count by, "before": true to read the question '
        "before compression",
    )
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(POLICIES)}; module:Class of a policy of your own, or of a press such as "
        f"kvpress:SnapKVPress; may be repeated. {_DEFAULT_POLICY} is always compared",
    )
    parser.add_argument("--ratios", type=ratios_of, default=[2.0, 4.0, 8.0], metavar="A,B,...", help="default: 2,4,8")
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens of a context; default: 2048")
    parser.add_argument(
        "--held-out", type=int, default=256, metavar="N", help="tokens after a context that are predicted; default: 256"
    )
    parser.add_argument("--contexts", type=int, default=2, metavar="N", help="the most parts of the text; default: 2")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every row and the table as JSON")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the table into a PNG")
    options.add_model(parser)


def ratios_of(text: str) -> list[float]:
    """Parse ``2,4,8``."""
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(1 <= ratio < float("inf") for ratio in ratios):
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, such as 2,4,8, got {text}")
    return ratios


def run(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        require("matplotlib")
    variants, readers = contenders(arguments.policy or [])
    device = chosen_device(arguments.device)
    model, tokenizer, name = models.load_model(arguments.model, device, by_transformers=bool(readers))
    units = _units(arguments, tokenizer)
    longest = max(unit.length + unit.room - len(unit.question) for unit in units)
    if longest > model.config.max_positions:
        raise ValueError(
            f"--context: expected context, question and answer within the model's {model.config.max_positions} "
            f"positions, got {longest}"
        )
    rows: list[Row] = []
    total = len(units) * (len(variants) + len(readers)) * len(arguments.ratios)
    with require("tqdm").tqdm(total=total, unit="cache", desc="evaluate", disable=None, leave=False) as bar:

        def progress(what: str, done: int) -> None:
            if what:
                bar.set_postfix_str(what)
            bar.update(done)

        for row, _ in evaluate(model, units, variants, arguments.ratios, readers=readers, progress=progress):
            rows.append(row)
    lines = summarize(rows)
    print(f"{name}: {describe(units)}\n")
    print(render(lines))
    print(f"\nRan: {what_runs(device)}")
    if arguments.json:
        _write_json(arguments.json, rows, lines, {"model": name, "ran": what_runs(device)})
        print(f"Rows and table written to {arguments.json}")
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(lines, name).savefig(arguments.plot, dpi=120)
        print(f"Plot written to {arguments.plot}")


def contenders(names: Sequence[str]) -> tuple[list[Variant], dict[str, Reader]]:
    """The policies and presses of ``--policy``, always including the default policy."""
    variants: dict[str, Variant] = {}
    readers: dict[str, Reader] = {}
    for name in dict.fromkeys([*names, _DEFAULT_POLICY]):
        given = _imported(name) if ":" in name else options.policy_of(name)
        if isinstance(given, Policy):
            variants[name] = Variant(name, given)
        else:
            from kvops.integrations.kvpress import reader

            readers[name] = reader(given)
    return list(variants.values()), readers


def _imported(name: str) -> Any:
    """The object ``module:Class``; a class is called without arguments."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # python -m adds it, the script kvops does not
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if module_name == "kvpress":
            require("kvpress")
        raise ValueError(f"--policy: expected module:Class, got {name!r}: {error}") from error
    named = getattr(module, attribute, None)
    made = named() if isinstance(named, type) else named
    bases = [kind.__name__ for kind in type(made).__mro__]
    if not isinstance(made, Policy) and "BasePress" not in bases:
        raise ValueError(
            f"--policy: expected a kvops.policies.Policy or a press of kvpress under {name!r}, got {made!r}"
        )
    return made


def _units(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[Unit]:
    if arguments.text is None and arguments.questions is None:
        raise ValueError("--text: expected a file with a text, or --questions with a file of questions")
    text = "" if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    units: list[Unit] = []
    if text:
        units += text_units(
            tokenizer, text, context=arguments.context, held_out=arguments.held_out, contexts=arguments.contexts
        )
    if arguments.questions:
        questions = read_questions(arguments.questions)
        units += question_units(tokenizer, questions, text=text, context=arguments.context)
    return units


def describe(units: Sequence[Unit]) -> str:
    """The amount of data behind the figures."""
    texts = [unit for unit in units if unit.setting == "text"]
    held_out = sum(len(probe.answer) for unit in texts for probe in unit.probes)
    asked = sum(len(unit.probes) for unit in units if unit.setting != "text")
    lengths = sorted({unit.length for unit in units})
    span = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    return f"contexts of {span} tokens; {held_out} held-out tokens in {len(texts)} parts of the text, {asked} questions"


def render(lines: Sequence[Summary]) -> str:
    """A table: perplexity, agreement and answers of each policy at each ratio, the full cache first."""

    def share(part: float | None, whole: float | None = 1) -> str:
        return "-" if part is None or not whole else f"{part / whole:.0%}"

    cells = [
        (
            line.policy,
            "" if line.policy == "full" else f"{line.ratio:g}x",
            f"{line.smaller:.1f}x",
            "-" if line.perplexity is None else f"{line.perplexity:.2f}",
            share(line.agreement),
            "-" if line.asked is None else f"{line.right} of {line.asked}",
            share(line.right, line.asked),
        )
        for line in lines
    ]
    headers = ("policy", "asked for", "smaller", "perplexity", "agreement", "answers", "kept")
    return table(cells, headers, align="lrrrrrr")


def _write_json(path: Path, rows: Sequence[Row], lines: Sequence[Summary], facts: dict[str, str]) -> None:
    record = {
        "what": "python -m kvops " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "kvops": kvops.__version__,
        "torch": torch.__version__,
        **facts,
        "summary": [asdict(line) for line in lines],
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
