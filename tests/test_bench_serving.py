"""Measurements in vLLM: workloads, drawn settings, and pages with results. test_vllm_engine.py runs the engine."""

import re
from types import SimpleNamespace

import pytest

from bench import results
from bench.plots import draw
from bench.report import render
from bench.serving import arrivals as arriving
from bench.serving.answers import Question, question_file, questions_of
from bench.serving.arrivals import Request, arrivals, burst, serve
from bench.serving.soak import Round
from kvops.integrations.vllm.rule import Rule
from kvops.models.loading import load

SERVED = {
    "steps": 100,
    "tokens_per_second": 20.0,
    "first_token_seconds": 2.0,
    "most_at_once": 2,
    "mean_at_once": 1.5,
    "preemptions": 0,
    "right": [1, 4],
    "questions": 3,
    "running": [1, 2, 2, 1],
}
SETTING = {"runs": "here", "vllm": "0.32", "model": "small", "requests": 8, "pages": 48, "tokens of a page": 32}
ASKED = {"ratio": 4, "chunks": 256, "smaller": 3.9, "asked": 2}
ROWS = {
    "serving": [
        {"engine": "vLLM's own", "workload": "arrivals"} | SERVED,
        {"engine": "4x", "workload": "arrivals"} | SERVED | {"steps": 50, "tokens_per_second": 30.0, "right": [0, 4]},
    ],
    "answers": [
        {"engine": "vLLM", "right": ["a"], "tokens": {"a": [1], "b": [2]}} | ASKED,
        {"engine": "our loop", "right": ["a", "b"], "tokens": {"a": [1], "b": [3]}} | ASKED,
        {"engine": "vLLM", "right": ["a"], "tokens": {"a": [1], "b": [2]}}
        | ASKED
        | {"ratio": 8},  # its pair is missing
    ],
    "soak": [
        {
            **{"seed": 0, "ratio": 4, "policy": "h2o", "pages": 30, "page_size": 16, "max_num_batched_tokens": 64},
            **{"requests": 20, "aborted": 2, "preemptions": 1, "steps": 900, "checks": 4000, "longest": 1800},
            **{"pages_freed_early": 40, "worst_difference": 3e-6},
        }
    ],
}


def test_results_of_vllm_have_sections_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for kind, rows in ROWS.items():
        results.save(tmp_path / "results" / "cpu" / f"{kind}.json", kind, SETTING, rows)
    render(tmp_path / "results", tmp_path / "BENCHMARKS.md")
    text = re.sub(" +", " ", (tmp_path / "BENCHMARKS.md").read_text())
    assert "| 4x | 1.50 (2) | 50 | 2.00 | 30.0 | 1.50 |" in text
    assert "1 of 2" in text  # answers of both engines
    assert "| 4x | 256 | 3.9x | 2 of 2 | 1 of 2 | 1 |" in text
    assert "| 8x |" not in text
    assert "20 random requests, with prompts of up to 1800 tokens, in pools of 30 to 30 pages" in text
    assert "4,000 times" in text
    assert (tmp_path / "results" / "cpu" / "serving.png").exists()
    assert draw({"kind": "serving", "setting": SETTING, "rows": []}, tmp_path / "none") == []


class PretendEngine:
    """vLLM's engine as ``serve`` sees it: each request gets a token in each step; the first one is preempted once."""

    def __init__(self, most: int = 2) -> None:
        manager = SimpleNamespace(req_to_blocks={"a": [SimpleNamespace(block_id=3, is_null=False)]})
        self.scheduler = SimpleNamespace(
            running=[],
            schedule=lambda: None,
            _preempt_request=lambda request: None,
            kv_cache_manager=SimpleNamespace(
                block_pool=None, coordinator=SimpleNamespace(single_type_managers=[manager])
            ),
        )
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self.scheduler))
        self.most, self.waiting, self.preempted = most, [], False

    def add_request(self, name, prompt, sampling):
        self.waiting.append((name, sampling.max_tokens, []))

    def has_unfinished_requests(self):
        return bool(self.waiting or self.scheduler.running)

    def step(self):
        running = self.scheduler.running
        while self.waiting and len(running) < self.most:
            running.append(self.waiting.pop(0))
        if not self.preempted:
            self.scheduler._preempt_request(running[0])
            self.preempted = True
        self.scheduler.schedule()
        outs = []
        for request in list(running):
            name, wanted, tokens = request
            tokens.append(10 + len(tokens))
            if len(tokens) == wanted:
                running.remove(request)
            outs.append(
                SimpleNamespace(
                    request_id=name, finished=len(tokens) == wanted, outputs=[SimpleNamespace(token_ids=tokens)]
                )
            )
        return outs


def test_a_prompt_is_read_in_chunks_or_its_context_before_its_question():
    question = Question("a", list(range(1000)), 980, [1])
    assert question.ends(256) == [256, 512, 768, 1000]
    assert question.ends("context") == [980, 1000]
    assert question.ends(500) == [500, 1000]


def test_what_is_counted_while_requests_are_served(monkeypatch):
    monkeypatch.setattr(arriving, "require", lambda name: SimpleNamespace(SamplingParams=SimpleNamespace))
    engine = PretendEngine()
    requests = [Request(0.0, [1], 3, [10, 11]), Request(0.0, [1], 2), Request(0.0, [1], 4, [10, 12])]
    schedule = engine.scheduler.schedule
    row = serve(engine, requests)
    assert engine.scheduler.schedule is schedule  # the next workload is counted by itself
    assert row["right"] == [0]
    assert row["questions"] == 2
    assert row["preemptions"] == 1
    assert row["most_at_once"] == 2
    assert row["running"] == [2, 2, 2, 1, 1, 1]
    assert row["steps"] == 6
    assert row["tokens_per_second"] * row["seconds"] == pytest.approx(9)
    assert row["first_token_seconds"] >= 0


@pytest.mark.parametrize("seed", range(25))
def test_rounds_of_a_soak_are_the_same_each_time_and_their_longest_request_fits(seed):
    drawn = Round.drawn(seed)
    assert drawn == Round.drawn(seed)
    assert 25 <= drawn.pages <= 200
    assert 1 <= drawn.ratio <= 16
    rule = Rule(drawn.ratio, drawn.slack, drawn.chunk, drawn.page_size, drawn.protect_first, drawn.protect_last)
    in_flight = drawn.max_num_batched_tokens * (2 if drawn.async_scheduling else 1)
    assert rule.peak(drawn.max_model_len, in_flight) <= drawn.pages


@pytest.mark.model
def test_workloads_are_the_same_each_time():
    tokenizer = load(progress=False).tokenizer
    requests = arrivals(tokenizer, 20, gap=0.5)
    assert requests == arrivals(tokenizer, 20, gap=0.5)
    assert len(requests) == 20
    assert [request.arrives for request in requests] == sorted(request.arrives for request in requests)
    asked = questions_of(question_file(tokenizer))
    assert sum(request.answer is not None for request in requests) == len(asked) == 8
    assert all(isinstance(question, Question) and question.answer for question in asked)
    assert [len(request.prompt) for request in burst(tokenizer)] == list(range(520, 560, 5))
