"""Every problem of every operator on every GPU: what a launch takes fits, and for realistic ones it was compiled.

Nothing is compiled here: the shipped tables say what each configuration takes. ``make fuzz-compile`` compiles random
problems.
"""

import itertools

import pytest

from kvops.autotune import lookup, specs
from kvops.autotune.config import VerifyConfig
from kvops.autotune.devices import KNOWN_DEVICES, by_name
from kvops.autotune.feasibility import judge, load_table
from kvops.autotune.inspect import TARGETS
from kvops.autotune.prune import tasks
from kvops.autotune.store import Store

# Query heads, KV heads and padded head size of Llama 8B and 1B, SmolLM2, gpt-oss, Gemma 2 and 3, Phi-3 (96), MQA, and
# heads of 512.
MODELS = (
    (32, 8, 128),
    (32, 8, 64),
    (9, 3, 64),
    (64, 8, 64),
    (16, 8, 256),
    (4, 1, 256),
    (32, 32, 128),
    (32, 1, 128),
    (8, 1, 512),
)
PROMPTS = (1, 5, 16, 17, 40, 64, 100, 1000, 8192)
DRAFTS_AND_CHUNKS = (1, 2, 5, 8, 16, 64, 512)
# All candidates spill there; spill instructions of the configuration that runs.
SPILLS = {"attention_scores": 10, "paged_attention": 32, "verify": 4, "gluon_flash_forward_varlen": 3}
# Dense float32 heads of 512: of dQ on AMD.
SPILLS_OF_WIDEST = 512


def dense_problems(lengths=PROMPTS):
    for heads, _, width in MODELS:
        for mask, length, batch in itertools.product((0, 1, 2), lengths, (1, 16)):
            yield (width, 2, mask, batch * heads, length, max(length, 1000))


def paged_problems():
    for heads, kv_heads, width in MODELS:
        for cache, tokens, batch in itertools.product((1, 2), DRAFTS_AND_CHUNKS, (1, 8, 256)):
            yield (width, 2, cache, 16, heads // kv_heads * tokens, batch * kv_heads, 8192)


def append_problems():
    for _, kv_heads, width in MODELS:
        for tokens, batch in itertools.product(DRAFTS_AND_CHUNKS, (1, 8, 256)):
            yield (width, 2, tokens, batch * kv_heads)


def latent_problems():
    for heads, tokens, batch in itertools.product((8, 16, 40, 64, 128), (1, 2, 4), (1, 8, 256)):
        yield (512, 2, 64, heads * tokens, batch, 8192)


REALISTIC = {
    **{f"flash_backward_{part}": list(dense_problems((64, 100, 1000, 8192))) for part in ("keys", "queries")},
    "paged_attention": list(paged_problems()),
    "paged_latent_attention": list(latent_problems()),
    "paged_append": list(append_problems()),
    "select_blocks": list(itertools.product((512, 2048, 32768), (8, 256))),
    "compact": [(itemsize, width, 8192, 64) for itemsize in (1, 2) for width in (64, 128, 256)],
    "verify": list(itertools.product((2, 4), (32000, 49152, 50257, 128256, 151936, 201088, 262144))),
    "prompt_lookup": [(length,) for length in (257, 1000, 8192, 100_000)],
}


def choices(name, problems, devices):
    spec = specs()[name]
    with lookup.using(Store([])):
        for values, device in itertools.product(dict.fromkeys(problems), devices):
            problem = dict(zip(spec.fields, values, strict=True))
            if not spec.twin or spec.candidates(problem, device):
                yield lookup.resolve(spec, problem, device)


def statuses(choice):
    spec, problem, device = choice.spec, choice.problem, choice.device
    return {judge(spec, config, problem, device).status for config in spec.candidates(problem, device)}


@pytest.mark.parametrize("name", [name for name in specs() if specs()[name].workload])
def test_every_realistic_problem_starts_from_a_configuration_that_was_compiled_for_its_gpu(name):
    problems = REALISTIC.get(name) or list(dense_problems())
    for choice in choices(name, problems, KNOWN_DEVICES.values()):
        verdict = choice.verdict
        if verdict.status == "spills":
            assert verdict.proof.spills <= SPILLS.get(name, 0), choice
            others = choice.spec.candidates(choice.problem, choice.device)
            assert choice.spec.twin or "proven" not in {
                judge(choice.spec, c, choice.problem, choice.device).status for c in others
            }
        else:
            assert verdict.status == "proven", (choice, verdict)


# Everything that operators accept: head sizes up to 512, any number of rows, every dtype and mask.
GRID = {
    "width": (16, 32, 64, 128, 256, 512),
    "itemsize": (2, 4),
    "cache_itemsize": (1, 2, 4),
    "mask": (0, 1, 2),
    "block_size": (16,),
    "rows": (1, 16, 17, 33, 64, 256),
    "heads": (32,),
    "seqlen_q": (1, 16, 17, 32, 40, 4096),
    "seqlen_k": (4096,),
    "tokens": (1, 2, 3, 5, 8, 16, 17, 64, 500),
    "lists": (64,),
    "capacity": (8192,),
    "slots": (8192,),
    "vocab": (2, 100, 300, 5000, 128256),
    "length": (1, 10, 300, 4096),
}


def grid(name):
    fields = specs()[name].fields
    for values in itertools.product(*(GRID[field] for field in fields)):
        problem = dict(zip(fields, values, strict=True))
        if problem.get("cache_itemsize", 1) in (1, problem.get("itemsize")):
            yield values


@pytest.mark.parametrize("name", [name for name in specs() if specs()[name].workload])
def test_no_problem_is_launched_with_what_is_known_not_to_fit_or_to_spill_much(name):
    for choice in choices(name, grid(name), map(by_name, TARGETS)):
        verdict = choice.verdict
        if choice.spec.twin and verdict.status == "impossible":
            continue  # the twin runs
        widest = choice.problem.get("width") == 512 and choice.problem["itemsize"] == 4 and "mask" in choice.problem
        if widest and "backward" in name and choice.device.nvidia and choice.device.shared_memory < 131_072:
            assert choice.origin == "none", choice  # 128 KiB hold the smallest tiles: refused before the launch
            assert "needs 131072 bytes of shared memory" in choice.reason
            continue
        assert verdict.status != "impossible", (choice, verdict)
        assert choice.origin != "none"
        if verdict.proof is not None:
            assert verdict.proof.shared_memory <= choice.device.shared_memory
            assert verdict.proof.spills <= (SPILLS_OF_WIDEST if widest else SPILLS.get(name, 0)), choice


@pytest.mark.parametrize("name", [name for name in specs() if specs()[name].workload])
def test_every_problem_that_operators_accept_starts_from_what_was_compiled(name):
    for choice in choices(name, grid(name), map(by_name, TARGETS)):
        assert choice.verdict.status != "unproven", choice


def test_no_vocabulary_asks_for_more_programs_than_the_second_axis_of_a_grid_has():
    spec, device = specs()["verify"], by_name("sm_90")
    for vocab in (65_535 * 1024, 65_535 * 1024 + 1, 65_535 * 4096):
        for config in spec.candidates({"itemsize": 2, "vocab": vocab}, device):
            assert max(-(-vocab // config.block), -(-vocab // config.race_block)) <= 65_535
    assert "65535 programs" in spec.refuse(VerifyConfig(4096, 1024, 8), {"itemsize": 2, "vocab": vocab}, device)


@pytest.mark.parametrize("name", [name for name in specs() if specs()[name].workload])
def test_the_tables_hold_for_every_target(name):
    """sm_103 and sm_121 as well, which have the proofs of their families: what ``verify`` says of them."""
    spec = specs()[name]
    for task in tasks([spec], TARGETS):
        assert judge(spec, task.config, task.problem, by_name(task.target)).status != "unproven", task


def test_in_the_tables_narrower_heads_never_take_more_shared_memory():
    """What lets a proof of wider heads stand for narrower ones (``feasibility.judge``); a few spills may come."""
    pairs = 0
    for spec in specs().values():
        table = load_table(spec)
        for (target, key), group in table.groups.items():
            wide = dict(key).get("width", 0)
            narrower = [width for width in (64, 128, 256) if width < wide]
            for other in (table.group(target, {**dict(key), "width": width}) for width in narrower):
                for config in set(group.rows) & set(other.rows if other else ()):
                    wider, own = group.rows[config], other.rows[config]
                    if wider.problem or wider.spills:
                        continue
                    pairs += 1
                    assert not own.problem, (spec.name, target, key, config)
                    assert own.shared_memory <= wider.shared_memory, (spec.name, target, key, config)
                    assert own.spills <= 12, (spec.name, target, key, config, own)
    assert pairs > 300
