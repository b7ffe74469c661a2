"""Evaluation of your own model, text, questions and policies: units, rows, summaries and the command."""

import itertools
import json
import math
from dataclasses import dataclass

import pytest
import torch
from test_console import Letters
from test_generate import prompts_of, tiny_model

import kvops.__main__
from kvops.cli import evaluate as command
from kvops.cli import models
from kvops.cli.evaluate_plot import draw
from kvops.generation.contexts import Probe
from kvops.generation.evaluate import AFTER, BEFORE, TEXT, Summary, Unit, Variant, evaluate, forced_logits, summarize
from kvops.generation.passes import new_cache, prefill
from kvops.generation.units import Question, question_units, read_questions, text_units
from kvops.policies import POLICIES, Compression, Policy


class Encoder(Letters):
    """Letters with what evaluation asks of a tokenizer; 1 begins every text of ``with_bos``."""

    bos_token_id = 1

    def __init__(self, with_bos=False):
        self.add_bos = with_bos

    def encode(self, text, *, parse_special=True, add_bos=None):
        assert not parse_special
        assert add_bos is False
        return super().encode(text)


@dataclass(frozen=True)
class Oldest(Policy):
    """A user's own policy."""

    def score(self, seen):
        return -seen.positions.float()


class Misshapen(Policy):
    def score(self, seen):
        return torch.zeros(3)


NOT_A_POLICY = 7


def greedy_unit(model, context, name="asked", setting=AFTER):
    """A question that the full cache answers right: the answer is what greedy decoding gives."""
    tail, answer = [5, 9], []
    with torch.no_grad():
        for _ in range(3):
            cache = new_cache(model, max_batch=1, max_tokens=256)
            hidden = prefill(model, cache, torch.tensor([[*context, *tail, *answer]]), 0)
            answer.append(int(model.logits(hidden[0, -1]).argmax()))
    if setting == BEFORE:
        return Unit(name, BEFORE, context, tail[:-1], (Probe("a task", tail[-1:], answer),))
    return Unit(name, AFTER, context, (), (Probe("a task", tail, answer), Probe("a task", tail, [96, 95, 94])))


def test_rows_hold_the_figures_of_compressed_caches():
    """A text's figures are those of its own compressed cache, and only answers that the full cache knows count."""
    model, prompt = tiny_model(), prompts_of(180)[0]
    text = Unit("text", TEXT, prompt[:120], (), (Probe("continuation", prompt[120:121], prompt[121:160], exact=False),))
    units = [text, greedy_unit(model, prompt[:150]), greedy_unit(model, prompt[:150], "before", BEFORE)]
    policy = POLICIES["standout"]()
    rows = [row for row, _ in evaluate(model, units, [Variant("standout", policy)], (1, 2))]
    assert [(row["unit"], row["policy"], row["ratio"]) for row in rows] == [
        (unit.name, name, ratio) for unit in units for name, ratio in (("full", 1), ("standout", 1), ("standout", 2))
    ]
    full, whole, half = rows[:3]
    assert whole["nll"] == pytest.approx(full["nll"], abs=1e-4)
    assert whole["top1"] == 1
    assert half["blocks"] <= half["full_blocks"] / 2
    cache = new_cache(model, max_batch=1, max_tokens=256)
    with torch.no_grad():
        prefill(model, cache, torch.tensor([prompt[:120]]), 0, policy)
        Compression(ratio=2, policy=policy).apply(cache, [120])
        logits = forced_logits(model, cache, torch.zeros(1, 1, 48), torch.tensor(prompt[120:160]))[1:]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(prompt[121:160]))
    assert half["nll"] == pytest.approx(float(expected), abs=1e-4)
    assert rows[3]["right"] == {"a task": [1, 0]}
    assert rows[4]["right"] == {"a task": [1]}  # the other answer is unknown to the full cache
    assert rows[7]["right"] == {"a task": [1]}


def test_a_unit_that_the_full_cache_does_not_know_is_not_compressed():
    model, prompt = tiny_model(), prompts_of(60)[0]
    unit = Unit("asked", AFTER, prompt, (), (Probe("a task", [5], [96, 95]),))
    done = []
    variants = [Variant("standout", POLICIES["standout"]()), Variant("knorm", POLICIES["knorm"]())]
    rows = list(evaluate(model, [unit], variants, (2, 4), progress=lambda what, count: done.append(count)))
    assert [row["policy"] for row, _ in rows] == ["full"]
    assert sum(done) == 4


def test_wanted_rows_alone_are_measured():
    model, prompt = tiny_model(), prompts_of(60)[0]
    probe = Probe("continuation", prompt[50:51], prompt[51:60], exact=False)
    units = [Unit(name, TEXT, prompt[:50], (), (probe,)) for name in ("one", "two")]
    done, variants = [], [Variant("knorm", POLICIES["knorm"]())]
    rows = evaluate(
        model,
        units,
        variants,
        (2, 4),
        wanted=lambda unit, variant, ratio: unit.name == "two" and ratio == 4,
        progress=lambda what, count: done.append(count),
    )
    assert [(row["unit"], row["policy"], row["ratio"]) for row, _ in rows] == [("two", "full", 1), ("two", "knorm", 4)]
    assert sum(done) == 4


def test_methods_that_read_by_themselves_stand_beside_the_policies():
    model, prompt = tiny_model(), prompts_of(100)[0]
    unit = greedy_unit(model, prompt)
    called = []

    def reader(model, tokens, ratio, room):
        called.append((list(tokens), ratio, room))
        cache = new_cache(model, max_batch=1, max_tokens=len(tokens) + room)
        with torch.no_grad():
            prefill(model, cache, torch.tensor([list(tokens)]), 0)
        return cache

    rows = [row for row, _ in evaluate(model, [unit], [], (2, 4), readers={"press": reader})]
    assert called == [(prompt, 2, unit.room), (prompt, 4, unit.room)]
    assert [(row["policy"], row.get("right")) for row in rows[1:]] == [("press", {"a task": [1]})] * 2


def test_a_misshapen_score_names_the_policy():
    model, prompt = tiny_model(), prompts_of(60)[0]
    with pytest.raises(ValueError, match=r"Misshapen.score: expected shape \[B, Hkv, S\]"):
        list(evaluate(model, [greedy_unit(model, prompt)], [Variant("mine", Misshapen())], (2,)))


def test_a_summary_has_a_line_for_each_policy_and_ratio():
    base = {"scope": "", "ratio": 2, "blocks": 10, "full_blocks": 20}
    rows = [
        {"policy": "full", "scope": "", "ratio": 1, "blocks": 20, "nll": 1.0, "top1": 1.0},
        {"policy": "full", "scope": "", "ratio": 1, "blocks": 20, "right": {"a": [1, 0], "b": [1]}},
        {**base, "policy": "mine", "nll": 1.0, "top1": 0.5},
        {**base, "policy": "mine", "nll": 2.0, "top1": 1.0},
        {**base, "policy": "mine", "right": {"a": [1], "b": [0]}},
    ]
    full, mine = summarize(rows)
    assert full == Summary("full", "", 1, 1.0, math.e, 1.0, 2, 3)
    assert mine == Summary("mine", "", 2, 2.0, pytest.approx(math.exp(1.5)), 0.75, 1, 2)


@pytest.mark.parametrize("with_bos", [False, True])
def test_parts_of_a_text_do_not_overlap_and_begin_as_the_model_wants(with_bos):
    tokenizer, text = Encoder(with_bos), "".join(chr(32 + place * 7 % 90) for place in range(1000))
    units = text_units(tokenizer, text, context=200, held_out=50, contexts=3)
    tokens = Letters().encode(text)
    assert [unit.name for unit in units] == ["text, part 0", "text, part 1", "text, part 2"]
    for number, unit in enumerate(units):
        (probe,) = unit.probes
        start = number * (1000 // 3)
        first = [1] if with_bos else []
        whole = first + tokens[start:]
        assert [*unit.prefix, *probe.tail, *probe.answer] == whole[:250]
        assert (len(unit.prefix), len(probe.tail), len(probe.answer)) == (199, 1, 50)
    (unit,) = text_units(tokenizer, text[:300], context=2048, held_out=50)
    assert unit.length + 1 + 50 == 300 + with_bos
    with pytest.raises(ValueError, match="text: expected at least 100 tokens, twice held_out, got 99"):
        text_units(tokenizer, text[:99], held_out=50)


def test_questions_become_units_by_context_and_time():
    tokenizer = Encoder(with_bos=True)
    questions = [
        Question("who?", "me"),
        Question("what?", "it", context="other", lead="It is", task="things"),
        Question("when?", "now", before=True),
    ]
    shared, before, other = question_units(tokenizer, questions, text="the text", context=5)
    assert shared.prefix == before.prefix == (1, *Letters().encode("the "))
    assert (shared.setting, before.setting, other.setting) == (AFTER, BEFORE, AFTER)
    (probe,) = other.probes
    assert probe.task == "things"
    assert list(probe.tail) == Letters().encode("\n\nQuestion: what?\nAnswer: It is")
    assert list(probe.answer) == Letters().encode(" it")
    assert list(before.question) == Letters().encode("\n\nQuestion: when?\nAnswer:")[:-1]
    with pytest.raises(ValueError, match=r"questions: expected a context for each, or a text for all, .* 'who\?'"):
        question_units(tokenizer, questions)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected questions as JSON lines, got none"),
        ("{}", 'line 1: expected {"question": ..., "answer": ...}, got {}'),
        ('\n["a"]', "line 2: expected"),
        ("{", "line 1: "),
        ('{"question": "a", "answer": 4}', "line 1: answer: expected a string, got 4"),
        ('{"question": "", "answer": "b"}', "line 1: question and answer: expected some text each"),
        (
            '{"question": "a", "answer": "b", "contxt": "c"}',
            "line 1: expected the fields .* got contxt",
        ),
        ('{"question": "a", "answer": "b", "before": 1}', "line 1: before: expected true or false, got 1"),
    ],
)
def test_a_file_of_questions_is_refused_by_line(tmp_path, content, message):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"q.jsonl.*{message}"):
        read_questions(tmp_path / "q.jsonl")


@pytest.fixture
def tiny(monkeypatch):
    def load_model(path, device, by_transformers=False):
        return models.LoadedDecoder(tiny_model(), Encoder(), "tiny")

    monkeypatch.setattr(models, "load_model", load_model)


def test_the_command_measures_a_text_questions_and_an_own_policy(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "text").write_text("".join(chr(33 + place * place % 90) for place in range(300)))
    (tmp_path / "questions").write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    (tmp_path / "mine.py").write_text(
        "from kvops.policies import Policy\nclass Oldest(Policy):\n    def score(self, seen):\n"
        "        return -seen.positions.float()\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--text", "text", "--questions", "questions", "--policy", "mine:Oldest", "--policy", "knorm"]
    arguments += ["--ratios", "2,4", "--context", "120", "--held-out", "30", "--json", "out/rows.json"]
    assert kvops.__main__.main(["evaluate", *arguments, "--plot", "out/plot.png"]) == 0
    printed = capsys.readouterr().out
    assert "60 held-out tokens in 2 parts of the text, 2 questions" in printed
    lines = [line.split() for line in printed.splitlines() if "x  " in line]
    assert [(line[0], line[1]) for line in lines[1:]] == [
        (name, f"{ratio}x") for ratio in (2, 4) for name in ("mine:Oldest", "knorm", "standout")
    ]
    record = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert len(record["summary"]) == 7
    assert {row["policy"] for row in record["rows"]} == {"full", "mine:Oldest", "knorm", "standout"}
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text: expected a file with a text, or --questions"),
        (["--text", __file__, "--policy", "nowhere:Policy"], "--policy: expected module:Class, got 'nowhere:Policy'"),
        (
            ["--text", __file__, "--policy", "test_evaluate:Absent"],
            "--policy: expected a kvops.policies.Policy or a press",
        ),
        (["--text", __file__, "--policy", "test_evaluate:NOT_A_POLICY"], "got 7"),
        (["--text", __file__, "--policy", "standot"], "did you mean standout"),
        (
            ["--text", __file__, "--context", "600"],
            "--context: expected context, question and answer within the model's 512",
        ),
        (["--text", "/nowhere"], "No such file"),
    ],
)
def test_the_command_refuses_what_it_cannot_measure(tiny, capsys, arguments, message):
    assert kvops.__main__.main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ratios_below_one_are_refused(capsys):
    for given in ("0.5", "2,x", "", "inf"):
        with pytest.raises(SystemExit):
            kvops.__main__.main(["evaluate", "--ratios", given])
        assert "expected numbers of at least 1, such as 2,4,8" in capsys.readouterr().err


def test_a_picture_has_a_panel_for_each_figure_that_there_is():
    lines = [Summary("full", "", 1, 1.0, 10.0, 1.0, None, None)]
    lines += [Summary(name, "", ratio, ratio, 10.0 + ratio, 0.9, None, None) for name in "ab" for ratio in (2, 4)]
    assert [axes.get_title(loc="left")[:10] for axes in draw(lines, "tiny").axes] == ["Perplexity", "Most likel"]


def test_shares_begin_at_zero_and_names_stand_apart_above_the_axis():
    lines = [Summary("full", "", 1, 1.0, 10.0, 1.0, 6, 8)]
    lines += [Summary(name, "", ratio, ratio, 11.0, 0.1 / ratio, 0, 6) for name in "abc" for ratio in (2, 4)]
    for axes in draw(lines, "tiny").axes:
        low, high = axes.get_ylim()
        assert low == 0 or axes.get_title(loc="left").startswith("Perplexity")
        places = sorted(text.xyann[1] for text in axes.texts if text.get_text() in "abc")
        assert places[0] >= low + 0.03 * (high - low)
        assert all(upper - lower >= 0.05 * (high - low) for lower, upper in itertools.pairwise(places))


def test_a_press_needs_a_model_of_transformers():
    reader = pytest.importorskip("kvops.integrations.kvpress").reader(None)
    with pytest.raises(ValueError, match="model: expected one that transformers loaded, for a press, got Llama"):
        reader(tiny_model(), [1, 2, 3], 2, 4)


def test_the_default_policy_is_always_compared():
    variants, readers = command.contenders(["test_evaluate:Oldest", "test_evaluate:Oldest", "standout"])
    assert [variant.name for variant in variants] == ["test_evaluate:Oldest", "standout"]
    assert readers == {}
