"""``python -m bench answers``: the same questions to vLLM and to our own loop, with whole and with compressed caches.

The questions are those of ``examples/questions.jsonl`` and of ``python -m bench quality``, in contexts of about a
thousand tokens. An answer counts if greedy decoding gives all of its tokens, and if the same engine gives them with the
whole cache. Our loop compresses the context, at its end or chunk by chunk, and reads the question then. vLLM reads
context and question as one prompt and compresses it as it goes. Sizes are those at the begin of an answer, with the
question.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.quality import tasks
from bench.serving.engine import page_bytes, start
from bench.timing import setting
from kvops.cache import PagedKVCache
from kvops.extras import require
from kvops.generation.evaluate import FULL, TEXT, Reader, Unit, Variant, evaluate, summarize
from kvops.generation.passes import Decoder, new_cache, read_prompt
from kvops.generation.units import question_units, read_questions
from kvops.models.llama import Llama
from kvops.models.loading import load
from kvops.models.tokenizer import Tokenizer
from kvops.policies import POLICIES, Compression, Policy

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
PAGE, STEP = 16, 256
"""Of vLLM: tokens of a page, tokens of a step."""
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
    """A prompt, and the tokens that are its answer."""

    name: str
    prompt: list[int]
    answer: list[int]


def questions_of(units: Iterable[Unit]) -> list[Question]:
    return [
        Question(f"{unit.name}: {number}", [*unit.prefix, *unit.question, *probe.tail], list(probe.answer))
        for unit in units
        if unit.setting != TEXT
        for number, probe in enumerate(unit.probes)
    ]


def asked_of_vllm(folder: Path, questions: Sequence[Question], ratio: float, policy: str, slack: int) -> dict[str, Any]:
    """Which questions vLLM answers right, and how much smaller the caches are when they do."""
    vllm = require("vllm")
    longest = max(len(question.prompt) + len(question.answer) for question in questions)
    config = require("transformers").AutoConfig.from_pretrained(folder)
    llm = start(
        folder,
        {"ratio": ratio, "policy": policy, "slack": slack},
        block_size=PAGE,
        max_model_len=longest + 1,
        max_num_seqs=4,
        max_num_batched_tokens=STEP,
        enable_prefix_caching=ratio == 1,  # the questions of a context share it
        kv_cache_memory_bytes=4 * (longest // PAGE + 4) * page_bytes(config, PAGE),
    )
    sampling = [
        vllm.SamplingParams(temperature=0, max_tokens=len(question.answer), ignore_eos=True, detokenize=False)
        for question in questions
    ]
    prompts = [{"prompt_token_ids": question.prompt} for question in questions]
    outs = llm.generate(prompts, sampling, use_tqdm=False)
    (manager,) = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers
    lengths = [len(question.prompt) for question in questions]
    whole = sum(-(-length // PAGE) for length in lengths)
    held = sum(manager.rule.held(length, length) for length in lengths) if ratio > 1 else whole
    return {
        "names": [
            question.name
            for question, out in zip(questions, outs, strict=True)
            if list(out.outputs[0].token_ids) == question.answer
        ],
        "smaller": whole / held,
    }


def chunked(policy: Policy) -> Reader:
    """Our loop, which compresses to its budget after every chunk of as many tokens as a step of vLLM has."""

    def read(model: Decoder, tokens: Sequence[int], ratio: float, room: int) -> PagedKVCache:
        cache = new_cache(model, max_batch=1, max_tokens=len(tokens) + room)
        read_prompt(model, cache, torch.tensor([list(tokens)]), 0, Compression(ratio, policy, chunk=STEP))
        return cache

    return read


@torch.no_grad()
def asked_of_our_loop(
    model: Llama, units: Sequence[Unit], ratios: Sequence[float], policy: str
) -> list[dict[str, Any]]:
    variants = [Variant("our loop, at the end", POLICIES[policy]())]
    readers = {"our loop, in chunks": chunked(POLICIES[policy]())}
    rows = [row for row, _ in evaluate(model, units, variants, ratios, readers=readers)]
    tails = {unit.name: [len(probe.tail) for probe in unit.probes] for unit in units}
    return [
        {
            "engine": "our loop" if line.policy == FULL else line.policy,
            "ratio": line.ratio,
            "smaller": smaller(
                [row for row in rows if (row["policy"], row["ratio"]) == (line.policy, line.ratio)], tails
            ),
            "right": line.right,
            "asked": line.asked,
        }
        for line in summarize(rows)
    ]


def smaller(rows: Iterable[Mapping[str, Any]], tails: Mapping[str, Sequence[int]]) -> float:
    """Tokens that are read before an answer over those that are held then, on average over heads.

    ``rows`` are those of :func:`evaluate`, ``tails`` the tokens that each unit's questions add to its compressed cache.
    """
    whole = held = 0.0
    for row in rows:
        for tail in tails[row["unit"]]:
            whole += row["length"] + tail
            held += row["length"] * row["blocks"] / row.get("full_blocks", row["blocks"]) + tail
    return whole / held


def run(
    folder: Path,
    json_path: Path | None,
    *,
    ratios: Sequence[float],
    slacks: Sequence[int],
    policy: str,
    contexts: int,
) -> int:
    loaded = load(progress=False)
    units = units_of(loaded.tokenizer, contexts)
    questions = questions_of(units)
    facts = setting(torch.device("cpu")) | {
        "vllm": require("vllm").__version__,
        "model": loaded.name,
        "policy": policy,
        "questions": len(questions),
        "tokens of a page": PAGE,
    }
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        if json_path:
            results.save(json_path, "answers", facts, rows)

    for row in asked_of_our_loop(Llama(loaded.config, loaded.weights), units, ratios, policy):
        note(row)
    whole = asked_of_vllm(folder, questions, 1, policy, 0)["names"]
    note({"engine": "vLLM", "ratio": 1, "smaller": 1.0, "right": len(whole), "asked": len(questions)})
    known = [question for question in questions if question.name in whole]
    for ratio, slack in itertools.product(ratios, slacks):
        got = asked_of_vllm(folder, known, ratio, policy, slack)
        lost = [question.name for question in known if question.name not in got["names"]]
        row = {"engine": f"vLLM, slack {slack}", "ratio": ratio, "smaller": got["smaller"]}
        note(row | {"right": len(known) - len(lost), "asked": len(known), "lost": lost})
    return 0
