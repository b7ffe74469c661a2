"""``python -m bench quality``: what is asked, what is counted, and that the study says what the rows say."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from bench import results
from bench.__main__ import main
from bench.quality import run, study, tasks
from bench.quality.kept import Form, Task, kept
from bench.quality.tasks import TINY
from kvops.generation.contexts import Context, Probe, ask, compress, fingerprint
from kvops.generation.evaluate import AFTER, BEFORE, TEXT, forced_logits
from kvops.generation.passes import new_cache, prefill, read_prompt
from kvops.models.config import LlamaConfig
from kvops.models.llama import Llama
from kvops.policies import POLICIES, Compression, KVzip, Recital

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_positions=256,
    tie_embeddings=True,
    sliding_window=None,
    attention_bias=False,
)
PREFIX = [(7 * place + place * place) % 61 for place in range(150)]
QUESTION = [3, 5, 8, 13, 21]


@pytest.fixture(scope="module", params=[None, 20], ids=["all", "window"])
def model(request) -> Llama:
    config = dataclasses.replace(CONFIG, sliding_window=request.param)
    generator = torch.Generator().manual_seed(3)
    shapes = config.weight_shapes()
    return Llama(config, {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()})


def policies(model):
    """All that the model can go with: a recital stands too far behind the prompt for a window."""
    every = {name: kind() for name, kind in POLICIES.items()}
    return {name: one for name, one in every.items() if model.config.sliding_window is None or one.recital is None}


def test_one_pass_scores_as_each_policy_alone_would(model):
    context = Context(model, PREFIX, policies(model), room=8, questions=False)
    for name, policy in policies(model).items():
        cache = new_cache(model, max_batch=1, max_tokens=len(PREFIX))
        with torch.no_grad():
            prefill(model, cache, torch.tensor([PREFIX]), 0, policy)
        alone = context.copy()
        compress(alone, context.scores[name], policy, 1, len(PREFIX))
        for layer in range(CONFIG.num_layers):
            ours, theirs = (
                one.scores[one.block_tables[layer, 0].long()].flatten(-2)[:, : len(PREFIX)] for one in (alone, cache)
            )
            if policy.recital is None:
                assert ours.equal(theirs), name
            else:  # judged over the cache, by another order of sums
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_a_question_read_later_is_judged_as_if_the_prompt_had_been_read_at_once(model):
    once = {name: policy for name, policy in policies(model).items() if policy.recital is None}
    context = Context(model, PREFIX, once, room=8, questions=True)
    later = context.judge(context.read(QUESTION), QUESTION)
    whole = Context(model, PREFIX + QUESTION, once, room=8, questions=False)
    for name, layers in whole.scores.items():
        for one, other in zip(layers, later[name], strict=True):
            torch.testing.assert_close(other, one, rtol=2e-3, atol=1e-5, msg=name)
    positions = context.cache.gather(1, 0, 1), whole.cache.gather(1, 0, 1)
    torch.testing.assert_close(positions[0][0], positions[1][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model", [None], indirect=True, ids=["all"])
def test_prefix_and_question_are_recited_as_they_are_read(model):
    policy = KVzip(recital=Recital(chunk=64))
    context = Context(model, PREFIX, {"kvzip": policy}, room=8, questions=True)
    assert context.recital_cost[policy.recital] > 1
    later = context.judge(context.read(QUESTION), QUESTION)["kvzip"]
    cache = new_cache(model, max_batch=1, max_tokens=192)
    compression = Compression(ratio=1, policy=policy, chunk=len(PREFIX))
    with torch.no_grad():
        read_prompt(model, cache, torch.tensor([PREFIX + QUESTION]), 0, compression)
    for layer, one in enumerate(later):
        held = cache.scores[cache.block_tables[layer, 0].long()].flatten(1)[:, : len(PREFIX + QUESTION)]
        torch.testing.assert_close(one[0], held, rtol=1e-3, atol=1e-6)


def test_probes_in_one_tree_answer_as_each_alone_and_leave_the_cache_as_it_was(model):
    cache = new_cache(model, max_batch=1, max_tokens=192)
    with torch.no_grad():
        hidden = prefill(model, cache, torch.tensor([PREFIX]), 0)
    before = cache.seq_lens.clone(), cache.next_positions.clone()
    probes = [Probe("a", [4], [9, 10, 11]), Probe("b", [4, 7, 2], [1]), Probe("c", [4, 7], [2, 2, 2, 2])]
    together = ask(model, cache, probes)
    assert cache.seq_lens.equal(before[0])
    assert cache.next_positions.equal(before[1])
    for probe, logits in zip(probes, together, strict=True):
        tokens = torch.tensor([*probe.tail, *probe.answer])
        forced = forced_logits(model, cache, hidden[:, -1:], tokens)[-len(probe.answer) :]
        cache.rollback(len(tokens) - 1)
        torch.testing.assert_close(logits, forced, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="probes: expected tails that begin with the same token"):
        ask(model, cache, [*probes, Probe("d", [5], [1])])


def test_a_copy_is_the_cache_again_whatever_was_done_to_the_last_one(model):
    context = Context(model, PREFIX, policies(model), room=8, questions=False)
    before = [part.clone() for part in context.cache.gather(0, 0, 0)]
    for name in ("snapkv", "knorm"):
        cache = context.copy()
        assert all(one.equal(other) for one, other in zip(cache.gather(0, 0, 0), before, strict=True))
        compress(cache, context.scores[name], policies(model)[name], 2, len(PREFIX))
        assert cache.stats().blocks_in_use < context.cache.stats().blocks_in_use
        cache.append(0, *(torch.zeros(1, 8, 2, 8) for _ in "kv"), cache.extend(8))
    assert all(one.equal(other) for one, other in zip(context.cache.gather(0, 0, 0), before, strict=True))


def test_a_fingerprint_is_that_of_the_tokens_kept(model):
    context = Context(model, PREFIX, policies(model), room=8, questions=False)
    prints = {}
    for variant in run.variants(["snapkv", "ada-kv", "knorm"]):
        cache = context.copy()
        compress(cache, context.scores[variant.name], variant.policy, 2, len(PREFIX))
        prints[variant.name, variant.policy.scope] = fingerprint(cache)
    assert prints["snapkv", "head"] == prints["ada-kv", "head"]
    assert len({prints["snapkv", "head"], prints["knorm", "head"], prints["knorm", "sequence"]}) == 3


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The real model on the smallest size, once keeping everything and once a quarter; the file it wrote."""
    path = tmp_path_factory.mktemp("quality") / "quality.json"
    one = run.Run(TINY, (1, 4), names=["snapkv"], json_path=path)
    one.quality()
    return one, path


@pytest.mark.model
def test_everything_kept_is_the_full_cache_by_definition(tiny_run):
    _, path = tiny_run
    found = kept(results.load(path))
    assert not found.left_out
    assert {task.setting for task in found.tasks} == {TEXT, BEFORE, AFTER}
    for form in (Form("snapkv", True), Form("snapkv", False)):
        for task in found.tasks:
            assert found.shares[form, 1, task] == pytest.approx(1, abs=1e-4), task
        assert found.overall(form, 1) == pytest.approx(1, abs=1e-4)
        assert found.overall(form, 4) < 0.99
    assert all(row["blocks"] <= row["full_blocks"] / row["ratio"] for row in found.rows if row["setting"] == TEXT)


@pytest.mark.model
def test_a_stopped_run_goes_on_where_it_was(tiny_run, capsys):
    _, path = tiny_run
    whole = json.loads(path.read_text())
    results.save(path, "quality", whole["setting"], whole["rows"][:-1])
    again = run.Run(TINY, (1, 4), names=["snapkv"], json_path=path)
    again.quality()
    assert json.loads(path.read_text())["rows"] == whole["rows"]
    other = dataclasses.replace(TINY, name="other")
    with pytest.raises(ValueError, match="--json: expected a file to go on with, of size 'other', got one of 'tiny'"):
        run.Run(other, (4,), json_path=path)
    assert main(["quality", "--policies", "nonesuch", "--json", str(path)]) == 2
    assert "--policies: expected some of" in capsys.readouterr().err


@pytest.mark.model
def test_times_are_added_to_the_rows_that_there_are(tiny_run, tmp_path):
    one, path = tiny_run
    before = json.loads(path.read_text())["rows"]
    one.times()
    after = json.loads(path.read_text())["rows"]
    timed = [row for row in after if "ms" in row]
    assert len(timed) == sum(row["setting"] == TEXT and row["policy"] != "full" for row in before)
    assert all(row.pop("ms") > 0 and row.pop("full_ms") > 0 for row in timed)
    assert after == before
    with pytest.raises(ValueError, match="--times: expected --json with the file of an earlier run"):
        run.Run(TINY, (4,), json_path=tmp_path / "none.json").times()


@pytest.mark.model
def test_what_is_asked_lies_within_the_size_and_the_answer_is_not_given_away(tiny_run):
    tokenizer = tiny_run[0].tokenizer
    for size in tasks.SIZES.values():
        units = tasks.units(tokenizer, size)
        assert len({unit.name for unit in units}) == len(units)
        assert sum(unit.setting == BEFORE for unit in units) == len(size.facts) * size.before + 1
        for unit in units:
            longest = max([length for length, _ in size.texts] + [length + 64 for length, _ in size.facts])
            assert unit.length + max(len(probe.tail) + len(probe.answer) for probe in unit.probes) <= longest + 2
            assert len({probe.tail[0] for probe in unit.probes}) == 1
        for _, part in size.facts:
            facts = next(unit for unit in units if unit.name == f"facts, part {part}")
            text = tokenizer.decode(facts.prefix)
            for probe in facts.probes:
                answer = tokenizer.decode(probe.answer)
                assert answer in text
                assert answer not in tokenizer.decode(probe.tail)
    digits = next(unit for unit in units if unit.name == "digits")
    assert tokenizer.decode(digits.prefix).startswith(f"Digits:{tokenizer.decode(digits.probes[0].answer)}")


def row(unit, setting, policy, scope, ratio, **figures):
    return {
        "unit": unit,
        "setting": setting,
        "length": 4000,
        "policy": policy,
        "scope": scope,
        "default": scope == "sequence",
        "ratio": ratio,
        "blocks": 800 // ratio,
        "full_blocks": 800,
        **figures,
    }


def a_result(size="full"):
    """Two policies, two ratios: text, one question unit of each setting, and a unit that was not finished."""
    rows = [row("text 4k, part 0", TEXT, "full", "", 1, nll=2.0, kl=0.0, top1=1.0)]
    rows += [row("facts", AFTER, "full", "", 1, right={"needle": [1, 1, 0], "digits": [0, 0]})]
    rows += [row("facts, question 0", BEFORE, "full", "", 1, right={"needle": [1]})]
    rows += [row("text 2k, part 1", TEXT, "full", "", 1, nll=1.0, kl=0.0, top1=1.0)]
    for policy, worth in (("snapkv", 0.0), ("h2o", 0.2)):
        for scope in ("sequence", "head"):
            for ratio in (4, 8):
                loss = ratio / 40 + worth + (scope == "head") * 0.1
                key = (policy, scope, ratio)
                lengths = [[ratio, 2], [3, 4]]
                figures = {"nll": 2 + loss, "kl": loss, "top1": 1 - loss, "lengths": lengths}
                rows.append(row("text 4k, part 0", TEXT, *key, **figures))
                rows.append(row("facts", AFTER, *key, right={"needle": [int(scope == "sequence"), 0]}))
                rows.append(row("facts, question 0", BEFORE, *key, right={"needle": [int(policy == "snapkv")]}))
    rows.append(row("text 2k, part 1", TEXT, "snapkv", "head", 4, nll=1.0, kl=0.0, top1=1.0))
    setting = {"runs": "here", "model": "m", "size": size, "date": "2026-01-02T03:04:05"}
    return {"kind": "quality", "setting": setting, "rows": rows}


def test_shares_are_those_of_the_full_cache_task_by_task():
    found = kept(a_result())
    assert found.left_out == ["text 2k, part 1"]
    assert found.ratios == [4, 8]
    assert found.answered == {
        Task(AFTER, "needle"): (2, 3),
        Task(AFTER, "digits"): (0, 2),
        Task(BEFORE, "needle"): (1, 1),
    }
    form = Form("h2o", False)
    assert found.shares[form, 4, Task(TEXT, "perplexity")] == pytest.approx(math.exp(-0.4))
    assert found.setting(form, 4, TEXT) == pytest.approx((math.exp(-0.4) + 0.6) / 2)
    assert found.setting(form, 4, BEFORE) == found.setting(form, 4, AFTER) == 0
    assert found.overall(form, 4) == pytest.approx((math.exp(-0.4) + 0.6) / 6)
    assert found.best(8) == (Form("snapkv", True), found.overall(Form("snapkv", True), 8))
    assert found.best(8, ragged=False)[0] == Form("snapkv", False)
    assert found.gain("snapkv", 4, AFTER) == 0.5
    assert found.gain("snapkv", 4, BEFORE) == 0
    assert found.pairs() == ["h2o", "snapkv"]
    later = a_result()
    later["rows"].append(row("facts", AFTER, "knorm", "head", 4, right={"needle": [1, 1]}))
    assert kept(later).left_out == ["knorm", "text 2k, part 1"]
    assert kept(later).shares == found.shares
    unfinished = a_result()
    unfinished["rows"] = unfinished["rows"][:-2]
    assert kept(unfinished).left_out == ["facts, question 0"]
    unfinished["rows"] = unfinished["rows"][:4]
    with pytest.raises(ValueError, match="quality: expected units measured for every policy and ratio"):
        kept(unfinished)


def test_the_study_says_what_the_rows_say(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results" / "cpu" / "quality.json"
    result = a_result()
    results.save(path, result["kind"], result["setting"], result["rows"])
    assert results.load(path) == result
    page = tmp_path / "BENCHMARKS.md"
    assert main(["report", "--results", str(tmp_path / "results"), "--page", str(page)]) == 0
    text = (tmp_path / "docs" / "compression-study.md").read_text()
    best = kept(result).overall(Form("snapkv", True), 4)
    assert f"4x smaller, snapkv with ragged heads keeps {best:.1%}: the goal of 95% is **missed**." in text
    assert "worse in 0" in text
    assert (
        "Where it breaks, asked after: the best policy falls from 50% at 4x to 50% at 8x and never below 50%." in text
    )
    assert "It fails digits, asked after altogether" in text
    assert "left out of everything above: text 2k, part 1." in text
    assert "tokens/s" not in text, "nothing was timed"
    for picture in ("curves", "ragged", "heads"):
        assert f"](../results/cpu/quality-{picture}.png)" in text
        assert (path.parent / f"quality-{picture}.png").stat().st_size > 5000
    assert "docs/compression-study.md" in page.read_text()
    for place in result["rows"]:
        if place["setting"] == TEXT and place["policy"] == "h2o":
            place |= {"ms": 10.0, "full_ms": 15.0}
    memory = study._memory(kept(result))
    assert "1.50" in memory
    assert "measured with h2o." in memory
    assert not study._reading(kept(result))
    for place in result["rows"]:
        if place["setting"] == TEXT and place["policy"] == "snapkv":
            place["reading"] = 2.5
    assert any(
        line.endswith("as a multiple of reading it: snapkv 2.5 (2.5 to 2.5).") for line in study.summary(kept(result))
    )


def test_the_figures_of_the_default_policy_are_those_of_the_study():
    """What ``Compression`` says about its default policy, in the form in which it is the default."""
    found = kept(results.load(Path(results.__file__).parent / "results" / "cpu" / "quality.json"))
    default = Compression()
    assert type(default.policy) is POLICIES["standout"]
    assert Form("standout", default.policy.scope != "head") in found.default
    text = " ".join(Compression.__doc__.split())
    for name, sentence in (
        ("standout", "keeps {}, {} and {} of the full cache's quality at 4x, 8x and 16x"),
        ("snapkv", "SnapKV, which costs as much, keeps {}, {} and {}"),
        ("by-heart", "`~kvops.policies.ByHeart` keeps {}, {} and {}"),
    ):
        shares = (f"{found.overall(Form(name, True), ratio):.0%}" for ratio in (4, 8, 16))
        assert sentence.format(*shares) in text
