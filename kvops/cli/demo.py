"""``python -m kvops demo``: one long document and one question, without and with compression and drafts."""

from __future__ import annotations

import copy
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvops
from kvops.cli.console import table
from kvops.cli.demo_plot import draw
from kvops.cli.environment import chosen_device, what_runs
from kvops.cli.models import load_model
from kvops.extras import require
from kvops.generation.evaluate import agreement, forced_logits, perplexity
from kvops.generation.generate import Generation, generate
from kvops.generation.options import GenerationOptions
from kvops.generation.passes import Decoder, new_cache, prefill
from kvops.generation.warm_up import warm_up
from kvops.models.tokenizer import Tokenizer
from kvops.policies import Compression

QUESTION = "What does the document above say about the debugger? Quote its first paragraphs."
RATIOS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Size:
    """The sizes of a demo, in tokens."""

    document: int
    held_out: int
    answer: int


FULL = Size(document=2400, held_out=256, answer=96)
QUICK = Size(document=900, held_out=96, answer=32)


@dataclass(frozen=True)
class Row:
    """One line of the table; ``answer_kept`` is the share of the full cache's answer that this cache predicts too."""

    compression: float
    drafts: bool
    first_token_seconds: float
    tokens_per_second: float
    blocks: int
    mebibytes: float
    accepted_per_step: float
    perplexity: float
    answer_kept: float


def document_tokens(tokenizer: Tokenizer, count: int) -> list[int]:
    """The first ``count`` tokens of a long real text that comes with Python: the manual's page on its debugger."""
    from pydoc_data.topics import topics

    tokens = tokenizer.encode(topics["debugger"] + topics["types"], parse_special=False)
    return tokens[:count]


def run(
    *,
    model_path: Path | None = None,
    quick: bool = False,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    device: str | None = None,
) -> None:
    """Run the demo and print its table; see ``python -m kvops demo --help``."""
    if plot_path:
        require("matplotlib")  # before runs that take minutes

    place = chosen_device(device)
    model, tokenizer, name = load_model(model_path, place)
    size = QUICK if quick else FULL
    text = document_tokens(tokenizer, size.document + size.held_out)
    question = f"{tokenizer.decode(text[: size.document])}\n\n{QUESTION}"
    prompt = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": question}]))

    with require("tqdm").tqdm(total=1 + 3 * len(RATIOS), unit="run", desc="demo", disable=None, leave=False) as bar:
        _compile(model, place, bar)
        answers = _answer(model, prompt, size, bar)
        full_answer = answers[1, False].tokens[0]
        quality, lengths = _measure(model, prompt, text, size, full_answer, bar)
    rows = _rows(answers, quality)
    print(f"{name}: {len(prompt)} tokens read, {len(full_answer)} generated, {size.held_out} held out\n")
    print(f"Q: {QUESTION}\nA: {tokenizer.decode(full_answer).strip()}\n")
    print(_render(rows))
    for (ratio, drafts), answer in answers.items():
        for sentence in () if drafts else answer.stats.unmet:
            print(f"{ratio}x: {sentence}")
    print(f"\nRan: {what_runs(place)}")
    record = _record(rows, lengths, name, place, size, len(prompt))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=2) + "\n")
        print(f"Table written to {json_path}")
    if plot_path:
        plot_path.parent.mkdir(parents=True, exist_ok=True)
        draw(record).savefig(plot_path, dpi=120)
        print(f"Plot written to {plot_path}")


def _compression(ratio: int) -> Compression | None:
    return Compression(ratio=ratio) if ratio > 1 else None


def _compile(model: Decoder, device: torch.device, bar: Any) -> None:
    """Compile the kernels first: in a new environment the first rows would otherwise have that in their times."""
    bar.set_postfix_str("compiling")
    lengths = (64,) if device.type == "cpu" else (64, 300)  # a GPU has other tiles for a prompt that fills several
    for ratio in RATIOS[:2]:  # other ratios launch the same kernels
        for draft in (None, "prompt_lookup"):
            warm_up(model, GenerationOptions(compression=_compression(ratio), draft=draft), lengths=lengths)
    bar.update()


def _answer(model: Decoder, prompt: Sequence[int], size: Size, bar: Any) -> dict[tuple[int, bool], Generation]:
    """The answers from every cache, without and with drafts."""
    answers: dict[tuple[int, bool], Generation] = {}
    for ratio in RATIOS:
        for drafts in (False, True):
            bar.set_postfix_str(f"{ratio}x{', drafts' if drafts else ''}")
            answers[ratio, drafts] = generate(
                model,
                [prompt],
                max_new_tokens=size.answer,
                compression=_compression(ratio),
                draft="prompt_lookup" if drafts else None,
            )
            bar.update()
    return answers


def _measure(
    model: Decoder, prompt: Sequence[int], text: Sequence[int], size: Size, answer: Sequence[int], bar: Any
) -> tuple[dict[int, tuple[float, float]], dict[int, Tensor]]:
    """For each cache: the perplexity of the held-out text, the share of the full cache's answer that it predicts, and
    the lengths [layers, heads] of its lists."""
    quality, lengths = {}, {}
    held_out = text[size.document :]
    document = _Prefilled(model, text[: size.document])
    question_asked = _Prefilled(model, prompt)
    for ratio in RATIOS:
        bar.set_postfix_str(f"{ratio}x, quality")
        logits, lengths[ratio] = document.go_on(_compression(ratio), held_out)
        kept_logits, _ = question_asked.go_on(_compression(ratio), answer)
        quality[ratio] = (
            perplexity(logits.cpu(), torch.tensor(held_out)),
            agreement(kept_logits.cpu(), torch.tensor(answer)),
        )
        bar.update()
    return quality, lengths


def _rows(answers: dict[tuple[int, bool], Generation], quality: dict[int, tuple[float, float]]) -> list[Row]:
    return [
        Row(
            compression=ratio,
            drafts=drafts,
            first_token_seconds=answer.stats.first_token_seconds,
            tokens_per_second=answer.stats.tokens_per_second,
            blocks=answer.stats.blocks_in_use,
            mebibytes=answer.stats.bytes_in_use / 2**20,
            accepted_per_step=answer.stats.accepted_per_step,
            perplexity=quality[ratio][0],
            answer_kept=quality[ratio][1],
        )
        for (ratio, drafts), answer in answers.items()
    ]


def _render(rows: Sequence[Row]) -> str:
    cells = [
        (
            "full" if row.compression == 1 else f"{row.compression}x",
            "lookup" if row.drafts else "-",
            f"{row.first_token_seconds:.2f}",
            f"{row.tokens_per_second:.1f}",
            row.blocks,
            f"{row.mebibytes:.1f}",
            f"{row.accepted_per_step:.2f}" if row.drafts else "-",
            f"{row.perplexity:.2f}",
            f"{row.answer_kept:.0%}",
        )
        for row in rows
    ]
    headers = (
        *("cache", "drafts", "first token s", "tokens/s", "blocks", "MiB"),
        *("accepted/step", "perplexity", "answer kept"),
    )
    return table(cells, headers, align="r" * len(headers))


class _Prefilled:
    """A text in an uncompressed cache, for several compressions."""

    def __init__(self, model: Decoder, tokens: Sequence[int]) -> None:
        self.model = model
        self.num_tokens = len(tokens)
        self.cache = new_cache(model, max_batch=1, max_tokens=len(tokens) + 512)
        self.device = model.embedding.weight.device
        with torch.no_grad():
            ids = torch.tensor([list(tokens)], device=self.device)
            self.last_hidden = prefill(model, self.cache, ids, 0, Compression().policy)[:, -1:]

    def go_on(self, compression: Compression | None, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Compress a copy. Returns the logits of the forced ``tokens`` and the lengths [layers, heads] before them."""
        cache = copy.deepcopy(self.cache)
        if compression:
            compression.apply(cache, [self.num_tokens])
        lengths = cache.seq_lens[:, 0].clone().cpu()
        forced = torch.tensor(list(tokens), device=self.device)
        return forced_logits(self.model, cache, self.last_hidden, forced), lengths


def _record(
    rows: Sequence[Row], lengths: dict[int, Tensor], model: str, device: torch.device, size: Size, prompt_tokens: int
) -> dict[str, Any]:
    """The record that ``--json`` writes and ``--plot`` draws. ``lengths`` is [layers, heads] for each ratio."""
    return {
        "kind": "demo",
        "what": "python -m kvops " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "ran": what_runs(device),
        "kvops": kvops.__version__,
        "torch": torch.__version__,
        "model": model,
        "policy": type(Compression().policy).__name__,
        "prompt_tokens": prompt_tokens,
        "size": asdict(size),
        "rows": [asdict(row) for row in rows],
        "lengths": {ratio: tokens.tolist() for ratio, tokens in lengths.items() if ratio > 1},
    }
