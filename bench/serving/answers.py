"""``python -m bench answers``: the same questions to vLLM and to our own loop, with whole and with compressed caches.

The questions are those of ``examples/questions.jsonl`` and of ``python -m bench quality``, in contexts of about a
thousand tokens. Both engines read a prompt in the same chunks, compress after each of them, and hold the same number of
blocks then. An answer counts if greedy decoding gives all of its tokens, and if vLLM gives them with the whole cache.
Sizes are those at the begin of an answer, with the question.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench import results
from bench.quality import tasks
from bench.serving.engine import page_bytes, start
from bench.timing import setting
from kvops.cache import PagedKVCache
from kvops.extras import require
from kvops.generation.evaluate import TEXT, Unit
from kvops.generation.passes import Decoder, decode, new_cache, read_prompt
from kvops.generation.units import question_units, read_questions
from kvops.integrations.vllm.options import Options
from kvops.integrations.vllm.rule import Rule
from kvops.models.llama import Llama
from kvops.models.loading import load
from kvops.models.tokenizer import Tokenizer
from kvops.policies import Compression

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
PAGE = 16
"""Tokens of a page."""
Chunks = int | Literal["context"]
"""How a prompt is read: so many tokens at a time, or its context first and its question afterwards."""
_SIZE = tasks.Size("answers", (), 0, ((1024, 0), (1024, 1)), 0, 0, 0)


def question_file(tokenizer: Tokenizer) -> list[Unit]:
    """The questions of ``examples``."""
    text = (EXAMPLES / "harbour.txt").read_text(encoding="utf-8")
    return question_units(tokenizer, read_questions(EXAMPLES / "questions.jsonl"), text=text)


def units_of(tokenizer: Tokenizer, contexts: int) -> list[Unit]:
    """The questions of ``examples``, and those about ``contexts`` contexts of the study."""
    hidden = (tasks.facts(tokenizer, _SIZE, number) for number in range(contexts))
    return [*question_file(tokenizer), *(unit for units in hidden for unit in units)]


@dataclass(frozen=True)
class Question:
    """A prompt, how many of its tokens are the context, and the tokens that are its answer."""

    name: str
    prompt: list[int]
    context: int
    answer: list[int]

    def ends(self, chunks: Chunks) -> list[int]:
        """Where each chunk of the prompt ends."""
        size = self.context if chunks == "context" else chunks
        return [*range(size, len(self.prompt), size), len(self.prompt)]


def questions_of(units: Iterable[Unit]) -> list[Question]:
    return [
        Question(f"{unit.name}: {number}", [*unit.prefix, *unit.question, *probe.tail], unit.length, list(probe.answer))
        for unit in units
        if unit.setting != TEXT
        for number, probe in enumerate(unit.probes)
    ]


Asked = Callable[[Question, Chunks], list[int]]
"""The tokens of an answer, as many as are right, if the prompt is read in these chunks."""


def vllm_at(folder: Path, questions: Sequence[Question], options: Options) -> Asked:
    """An engine of vLLM that answers one question after the other."""
    vllm = require("vllm")
    longest = max(len(question.prompt) + len(question.answer) for question in questions)
    config = require("transformers").AutoConfig.from_pretrained(folder)
    llm = start(
        folder,
        {"ratio": options.ratio, "policy": options.policy, "slack": options.slack},
        block_size=PAGE,
        max_model_len=longest + 1,
        max_num_seqs=1,
        max_num_batched_tokens=longest + 1,
        async_scheduling=False,
        enable_prefix_caching=not options.compresses,  # the questions of a context share it
        kv_cache_memory_bytes=(longest // PAGE + 4) * page_bytes(config, PAGE),
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler

    def asked(question: Question, chunks: Chunks) -> list[int]:
        scheduler.max_num_scheduled_tokens = question.ends(chunks)[0]  # one request runs at a time
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=len(question.answer), ignore_eos=True, detokenize=False
        )
        (out,) = llm.generate([{"prompt_token_ids": question.prompt}], sampling, use_tqdm=False)
        return list(out.outputs[0].token_ids)

    return asked


def our_loop_at(model: Decoder, options: Options) -> Asked:
    """Our own loop, which holds after each chunk what vLLM does."""
    rule = Rule.of(options, PAGE)
    lists = model.config.num_layers * model.config.num_kv_heads
    # What was read last: questions about the same context share all chunks but the last one.
    read: dict[tuple[int, ...], PagedKVCache] = {}

    def compression(tokens: int) -> Compression | None:
        old = rule.old(tokens)
        if not options.compresses or not old:
            return None
        # In vLLM the columns of the newest tokens are whole.
        return Compression(
            blocks=rule.held(tokens, tokens) * lists,
            policy=options.make_policy(),
            protect_first=options.protect_first,
            protect_last=tokens - old * PAGE,
        )

    @torch.no_grad()
    def asked(question: Question, chunks: Chunks) -> list[int]:
        tokens = torch.tensor([question.prompt])
        *ends, length = question.ends(chunks)
        shared = tuple(question.prompt[: ends[-1]]) if ends else ()
        if shared not in read:
            read.clear()
            read[shared] = new_cache(model, max_batch=1, max_tokens=len(shared) + 512, block_size=PAGE)
            for begin, end in zip([0, *ends], ends, strict=False):
                read_prompt(model, read[shared], tokens[:, :end], 0, compression(end), held=begin)
        cache = copy.deepcopy(read[shared])
        hidden = read_prompt(model, cache, tokens, 0, compression(length), held=len(shared))
        answer: list[int] = []
        while len(answer) < len(question.answer):
            if answer:
                hidden = decode(model, cache, torch.tensor([answer[-1:]]))
            answer.append(int(model.logits(hidden[:, -1:]).argmax()))
        return answer

    return asked


def smaller(questions: Iterable[Question], options: Options) -> float:
    """Pages of the whole prompts over those that are held when their answers begin."""
    rule, lengths = Rule.of(options, PAGE), [len(question.prompt) for question in questions]
    return sum(map(rule.columns, lengths)) / sum(rule.held(length, length) for length in lengths)


def run(
    folder: Path,
    json_path: Path | None,
    *,
    ratios: Sequence[float],
    slack: int,
    policy: str,
    contexts: int,
    chunks: Sequence[Chunks],
) -> int:
    """Ask all; goes on with the rows that are in ``json_path``."""
    loaded = load(progress=False)
    model = Llama(loaded.config, loaded.weights)
    questions = questions_of(units_of(loaded.tokenizer, contexts))
    facts = setting(torch.device("cpu")) | {
        "vllm": require("vllm").__version__,
        "model": loaded.name,
        "policy": policy,
        "questions": len(questions),
        "tokens of a page": PAGE,
    }
    rows = list(results.load(json_path)["rows"]) if json_path and json_path.exists() else []

    def found(engine: str, ratio: float, size: Chunks) -> dict[str, Any] | None:
        return next(
            (row for row in rows if (row["engine"], row["ratio"], row["chunks"]) == (engine, ratio, size)), None
        )

    def note(row: dict[str, Any]) -> dict[str, Any]:
        rows.append(row)
        print(row, flush=True)
        if json_path:
            results.save(json_path, "answers", facts, rows)
        return row

    for ratio in (1, *ratios):
        options = Options(ratio=ratio, policy=policy, slack=slack)
        whole = found("vLLM", 1, chunks[0])
        known = questions if whole is None else [each for each in questions if each.name in whole["right"]]
        engines = {
            "vLLM": lambda options=options, known=known: vllm_at(folder, known, options),
            "our loop": lambda options=options: our_loop_at(model, options),
        }
        for name, begin in engines.items():
            missing = [size for size in (chunks[:1] if ratio == 1 else chunks) if found(name, ratio, size) is None]
            asked = begin() if missing else None
            for size in missing:
                assert asked is not None
                got = {question.name: asked(question, size) for question in known}
                right = [question.name for question in known if got[question.name] == question.answer]
                row = {"engine": name, "ratio": ratio, "chunks": size, "smaller": smaller(known, options)}
                note(row | {"right": right, "asked": len(known), "tokens": got})
            del asked
            gc.collect()  # one engine at a time in memory
    return 0
