"""Compressed requests in the real vLLM, on the CPU: ``make test-vllm``, in an environment of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import MODELS, PAGE, generate, prompts, start, vllm
from test_vllm import kept_positions

from bench.serving.engine import scheduling_ahead
from bench.serving.small import small as random_model
from bench.serving.soak import Round, checks_of, run_round
from kvops.generation.passes import decode, new_cache, read_prompt
from kvops.models.llama import Llama
from kvops.models.loading import load
from kvops.policies import POLICIES, Compression

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("small"))


def compressed(llm):
    """The worker's layers, the scheduler's manager and its pool."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    builders = [group.get_metadata_builder(0) for groups in runner.attn_groups for group in groups]
    (layers,) = (builder._compressed for builder in builders if builder._compressed is not None)
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    (manager,) = (manager for manager in managers if type(manager).__name__ == "CompressedManager")
    return layers, manager, core.scheduler.kv_cache_manager.block_pool


BYTES = 2 * 2 * PAGE * 64 * 4  # of a page of the small model in float32


def start_compressed(model, pages, ratio=4, **options):
    """An engine with a pool of ``pages`` pages and vLLM's page of its own; options of kvops in ``kvops``."""
    ours = {"ratio": ratio, "check": True, "protect_last": 16} | options.pop("kvops", {})
    settings = {"kv_cache_memory_bytes": (pages + 1) * BYTES, "attention_backend": "CUSTOM"}
    return start(model, **(settings | options), additional_config={"kvops": ours})


def watched(llm):
    """(requests that run, pages of the request that holds most) of each step from now on."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    steps, schedule = [], scheduler.schedule

    def recorded(*args, **kwargs):
        out = schedule(*args, **kwargs)
        held = [
            sum(not block.is_null for block in managers[0].req_to_blocks[request.request_id])
            for request in scheduler.running
        ]
        steps.append((len(scheduler.running), max(held, default=0)))
        return out

    scheduler.schedule = recorded
    return steps


def expect_sound(llm, pages, most_error=2e-4):
    layers, manager, pool = compressed(llm)
    assert pool.get_num_free_blocks() == pages
    assert layers.check.count > 0
    assert layers.check.worst < most_error
    assert not manager._freed
    assert not manager._old
    return layers, manager


def test_requests_that_are_short_are_not_touched(small):
    ids = prompts([5, 40, 20])
    expected = generate(start(small), ids)
    llm = start_compressed(small, 60)
    assert generate(llm, ids) == expected
    layers, manager = expect_sound(llm, 60)
    assert layers.cells.compactions == manager.num_freed == 0


@pytest.mark.parametrize(
    ("ratio", "policy"), [(4, "standout"), (8, "kv-compress"), (2, "snapkv"), (16, "knorm"), (4, "ada-kv")]
)
def test_pages_come_back_and_every_attention_is_over_the_kept_tokens(small, ratio, policy):
    llm = start_compressed(small, 60, ratio, kvops={"policy": policy})
    steps = watched(llm)
    generate(llm, prompts([700, 30, 520, 300, 610, 90]), max_tokens=40)
    layers, manager = expect_sound(llm, 60)
    assert layers.cells.compactions > 10
    assert manager.num_freed > 20
    assert max(held for _, held in steps) <= manager.rule.peak(740, manager.in_flight)


@pytest.mark.parametrize(("ratio", "policy"), [(4, "standout"), (8, "standout"), (4, "kv-compress"), (4, "ada-kv")])
@torch.no_grad()
def test_the_same_slots_and_the_same_answer_as_in_our_own_loop(small, ratio, policy):
    """A prompt in four chunks of 128 tokens, compressed after each to the same number of blocks; then 24 tokens."""
    llm = start_compressed(small, 60, ratio, kvops={"policy": policy, "protect_last": PAGE})
    generate(llm, prompts([3]), max_tokens=1)
    layers, manager, _ = compressed(llm)
    rule, build, kept = manager.rule, layers.build, {}

    def recorded(num_tokens, known_starts, starts, tokens, *args):
        step = build(num_tokens, known_starts, starts, tokens, *args)
        held = step.lens[:, 0] - num_tokens
        kept[int(tokens[0]) - num_tokens] = kept_positions(layers.cells.positions, step.tables[:, 0], held)
        return step

    layers.build = recorded
    ids = prompts([512])[0]
    (got,) = generate(llm, [ids])

    loaded = load(small)
    model, prompt = Llama(loaded.config, loaded.weights), torch.tensor([ids])
    cache = new_cache(model, max_batch=1, max_tokens=600, block_size=PAGE)
    for end in (128, 256, 384, 512):
        budget = Compression(
            blocks=rule.held(end, end) * layers.cells.num_lists, policy=POLICIES[policy](), protect_last=PAGE
        )
        hidden = read_prompt(model, cache, prompt[:, :end], 0, budget, held=end - 128)
        assert kept[end] == kept_positions(cache.positions, cache.block_tables[:, 0], cache.seq_lens[:, 0]), end
    tokens = []
    for _ in got:
        if tokens:
            hidden = decode(model, cache, torch.tensor([tokens[-1:]]))
        tokens.append(int(model.logits(hidden[:, -1:]).argmax()))
    assert tokens == got
    assert layers.cells.compactions == 4


def test_more_requests_fit_at_once_and_take_fewer_steps(small):
    """Eight prompts of 530 tokens in 48 pages; without compression two of them fit at once."""
    ids, seen = prompts([530] * 8), []
    for llm in (start(small, kv_cache_memory_bytes=49 * BYTES), start_compressed(small, 48, 4, kvops={"check": False})):
        steps = watched(llm)
        generate(llm, ids, max_tokens=64)
        seen.append((max(running for running, _ in steps), len(steps)))
    (alone, steps), (together, fewer) = seen
    assert together >= 2 * alone
    assert steps >= 1.7 * fewer


def test_a_prompt_runs_that_does_not_fit_uncompressed(small):
    with pytest.raises(ValueError, match="KV cache"):
        start(small, kv_cache_memory_bytes=21 * BYTES)
    llm = start_compressed(small, 20)
    generate(llm, prompts([1000]), max_tokens=20)
    expect_sound(llm, 20)


def test_requests_that_are_preempted_are_computed_again(small):
    llm = start_compressed(small, 22, max_num_batched_tokens=64)
    ids = prompts([500, 480, 510, 470])
    seen = []
    preempt = llm.llm_engine.engine_core.engine_core.scheduler._preempt_request
    llm.llm_engine.engine_core.engine_core.scheduler._preempt_request = lambda *args, **kwargs: (
        seen.append(args[0].request_id),
        preempt(*args, **kwargs),
    )
    generate(llm, ids, max_tokens=200)
    assert seen, "nothing was preempted: the test shows nothing"
    expect_sound(llm, 22)


def test_a_resumed_request_goes_on_with_the_tokens_that_it_had(small):
    """Preempted after its cache was compressed, it is computed from its beginning: with what it had generated."""
    llm = start_compressed(small, 60)
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    sampling = vllm.SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
    engine.add_request("a", {"prompt_token_ids": prompts([400])[0]}, sampling)
    outputs = []
    while len(outputs) < 20:
        outputs += engine.step()
    (request,) = scheduler.running
    before = list(request.output_token_ids)
    assert compressed(llm)[1].num_freed > 5
    scheduler.running.remove(request)
    scheduler._preempt_request(request, 0.0)
    assert request.num_computed_tokens == 0
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 60
    while engine.has_unfinished_requests():
        outputs += engine.step()
    got = list(outputs[-1].outputs[0].token_ids)
    assert len(before) >= 20
    assert (got[: len(before)], len(got)) == (before, 60)
    expect_sound(llm, 60)


def test_samples_of_a_prompt_are_compressed_each_by_itself(small):
    llm = start_compressed(small, 80)
    # Without a seed of their own: vLLM 0.32 fails on a CPU where a prompt with one is read in chunks.
    sampling = vllm.SamplingParams(n=3, max_tokens=70, ignore_eos=True, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": prompts([100])[0]}], sampling, use_tqdm=False)
    samples = [tuple(sample.token_ids) for sample in out.outputs]
    assert [len(tokens) for tokens in samples] == [70] * 3
    assert len(set(samples)) == 3
    layers, manager = expect_sound(llm, 80)
    assert layers.cells.compactions % 3 == 0
    assert manager.num_freed >= 9


@pytest.mark.parametrize("ratio", [1, 4])
def test_beams_are_those_of_vllms_own_search(small, ratio, monkeypatch):
    """vLLM's search is a loop around the engine: each beam is a prompt of its own, and asks for its next token."""
    if ratio == 1:
        llm = start(small, attention_backend="CUSTOM")
    else:
        llm = start_compressed(small, 60, ratio)

    def beams(llm):
        tokenizer = SimpleNamespace(eos_token_id=2, decode=lambda tokens, **options: "")
        monkeypatch.setattr(llm.renderer, "get_tokenizer", lambda: tokenizer)
        found = llm.beam_search(
            [{"prompt_token_ids": ids} for ids in prompts([300, 40])],
            vllm.sampling_params.BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True),
        )
        return [[beam.tokens for beam in each.sequences] for each in found]

    found = beams(llm)
    assert [[len(tokens) for tokens in each] for each in found] == [[304, 304], [44, 44]]
    if ratio == 1:
        assert found == beams(start(small))
    else:
        expect_sound(llm, 60)
        assert found[1] == beams(start(small))[1]  # a short prompt is not compressed


def test_requests_of_a_higher_priority_preempt_compressed_ones(small):
    """The one that is preempted gives its pages back and has all its tokens in the end."""
    llm = start_compressed(small, 11, max_num_batched_tokens=64, max_model_len=700, scheduling_policy="priority")
    engine = llm.llm_engine
    scheduler, preempted = engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *args, **options: (
        preempted.append(request.request_id),
        preempt(request, *args, **options),
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, detokenize=False)
    got = {}

    def step():
        for out in engine.step():
            got[out.request_id] = len(out.outputs[0].token_ids)

    engine.add_request("low", {"prompt_token_ids": prompts([500])[0]}, sampling, priority=9)
    while scheduler.running == [] or not scheduler.running[0].output_token_ids:
        step()
    engine.add_request("high", {"prompt_token_ids": prompts([500], seed=1)[0]}, sampling, priority=0)
    while engine.has_unfinished_requests():
        step()
    assert got == {"low": 150, "high": 150}
    assert preempted, "nothing was preempted: the test shows nothing"
    assert all(name.startswith("low") for name in preempted)
    expect_sound(llm, 11)


@pytest.mark.parametrize("ratio", [1, 4])
def test_steps_that_are_scheduled_ahead_give_the_same_tokens(small, ratio):
    """Asynchronous scheduling: a step is scheduled before the tokens of the one before it are known."""
    ids = prompts([300, 40, 500])
    expected = [
        generate(start_compressed(small, 80, ratio, enable_prefix_caching=False), [each], 60)[0] for each in ids
    ]
    with scheduling_ahead():
        llm = start_compressed(small, 80, ratio, enable_prefix_caching=False)
    core = llm.llm_engine.engine_core.engine_core
    assert type(core.scheduler).__name__ == "AsyncScheduler"
    assert core.batch_queue_size == 2
    assert [generate(llm, [each], 60)[0] for each in ids] == expected
    generate(llm, prompts([300, 40, 500, 610]), 60)
    if ratio > 1:
        _, manager = expect_sound(llm, 80)
        assert manager.num_freed > 20


def test_a_request_that_is_aborted_gives_all_its_pages_back(small):
    """Pages that its compaction freed are not freed again, and its first page may begin another request."""
    llm = start_compressed(small, 30)
    engine = llm.llm_engine
    sampling = vllm.SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, detokenize=False)
    for name, ids in zip("ab", prompts([500, 300]), strict=True):
        engine.add_request(name, {"prompt_token_ids": ids}, sampling)
    for _ in range(20):
        engine.step()
    _, manager, pool = compressed(llm)
    assert manager.num_freed > 8
    engine.abort_request(["a"])
    engine.step()
    (blocks,) = manager.req_to_blocks.values()
    assert pool.get_num_free_blocks() == 30 - sum(not block.is_null for block in blocks)
    engine.abort_request(["b"])
    engine.step()
    assert pool.get_num_free_blocks() == 30
    assert [len(tokens) for tokens in generate(llm, prompts([400, 350], seed=2))] == [24, 24]
    expect_sound(llm, 30)


def test_drafts_are_verified_over_a_compressed_cache(small):
    llm = start_compressed(
        small,
        60,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    )
    repeated = prompts([60])[0] * 8
    generate(llm, [repeated, prompts([400])[0]], max_tokens=64)
    layers, _ = expect_sound(llm, 60)
    assert layers.cells.compactions > 2


def test_requests_may_be_numbered_as_by_model_runner_v2(small, monkeypatch):
    """vLLM's runner on GPUs, which needs Triton, says which request each row is."""
    from kvops.integrations.vllm.backend import StepBuilder
    from kvops.integrations.vllm.compressed import CompressedLayers

    build, compress, numbered = StepBuilder.build, CompressedLayers.build, []

    def with_numbers(self, common_prefix_len, metadata, fast_build=False):
        metadata.req_idx = metadata.block_table_tensor[: metadata.num_reqs, 0].numpy()
        return build(self, common_prefix_len, metadata, fast_build)

    def recorded(self, *args):
        numbered.append(args[-1])
        return compress(self, *args)

    monkeypatch.setattr(StepBuilder, "build", with_numbers)
    monkeypatch.setattr(CompressedLayers, "build", recorded)
    llm = start_compressed(small, 60, max_num_seqs=3)
    generate(llm, prompts([700, 30, 520, 300, 610, 90]), max_tokens=40)
    layers, manager = expect_sound(llm, 60)
    assert layers.cells.compactions > 10
    assert manager.num_freed > 20
    assert numbered
    assert all(numbers is not None for numbers in numbered)


def test_two_ranks_of_a_tensor_parallel_engine_free_the_same_pages(small):
    """Each rank compacts its own heads and checks its attention. How many pages stay follows from the tokens alone."""
    llm = start_compressed(
        small,
        60,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        kv_cache_memory_bytes=61 * BYTES // 2,  # of each rank, which has one of the two KV heads
    )
    ids = prompts([700, 30, 520, 300])
    assert [len(tokens) for tokens in generate(llm, ids, max_tokens=40)] == [40] * 4
    kv_cache_manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    assert kv_cache_manager.block_pool.get_num_free_blocks() == 60
    (manager,) = kv_cache_manager.coordinator.single_type_managers
    assert manager.num_freed > 20


def test_two_stages_of_a_pipeline_free_the_same_pages(small):
    """Each stage compacts the cells of its own layers, with two batches under way."""
    llm = start_compressed(
        small,
        60,
        pipeline_parallel_size=2,
        # vLLM 0.32 runs no pipeline on a CPU without its warm-up, which it leaves out where nothing is compiled.
        enforce_eager=False,
        compilation_config={"mode": 1, "backend": "eager"},
        distributed_executor_backend="mp",
        kv_cache_memory_bytes=61 * BYTES // 2,  # of each stage, which has one of the two layers
    )
    ids = prompts([700, 30, 520, 300])
    assert [len(tokens) for tokens in generate(llm, ids, max_tokens=40)] == [40] * 4
    kv_cache_manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    assert kv_cache_manager.block_pool.get_num_free_blocks() == 60
    (manager,) = kv_cache_manager.coordinator.single_type_managers
    assert manager.num_freed > 20


def test_full_layers_are_compressed_beside_windows(tmp_path):
    model = random_model(tmp_path, "Gemma2", **MODELS["Gemma2"])
    with pytest.raises(ValueError, match="enable_prefix_caching: expected off where other layers"):
        generate(start_compressed(model, 80), prompts([10]))
    llm = start_compressed(model, 80, enable_prefix_caching=False)
    generate(llm, prompts([600, 50, 400]), max_tokens=32)
    layers, manager, _ = compressed(llm)
    assert layers.cells.num_layers == 1
    assert manager.num_freed > 5
    assert layers.check.worst < 2e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: kvops does not compress with fp8"),
        (
            {"kv_cache_dtype": "int8_per_token_head"},
            "kv_cache_dtype: kvops does not compress with int8_per_token_head",
        ),
        ({"kvops": {"policy": "kvzip"}}, "policy: KVzip needs a prompt that is read twice"),
    ],
)
def test_what_does_not_go_together_with_compression_is_refused(small, options, message):
    with pytest.raises(ValueError, match=message):
        generate(start_compressed(small, 60, **options), prompts([10]))


@pytest.mark.parametrize("seed", [0, 3])
def test_a_soak_of_random_requests_loses_no_page_and_no_token(small, seed):
    """Two short rounds of ``python -m bench soak``: aborts, priorities, several samples, drafts."""
    row = run_round(Round.drawn(seed, longest=500), small, 12)
    assert row["checks"] > 1000


def test_attention_of_a_whole_cache_is_checked_too(small):
    llm = start(
        small, attention_backend="CUSTOM", additional_config={"kvops": {"check": True}}, enable_prefix_caching=False
    )
    generate(llm, prompts([300, 5, 90]))
    (check,) = checks_of(llm.llm_engine)
    assert check.count >= 3 * 23 * 4  # requests, steps, layers x KV heads
    assert check.worst < 2e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "check: expected no prefix caching without compression"),
        ({"enable_prefix_caching": False, "kv_cache_dtype": "fp8"}, "check: expected a cache that holds what was comp"),
        (
            {"enable_prefix_caching": False, "kv_cache_dtype": "int8_per_token_head"},
            "check: expected a cache that holds what was comp",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(small, options, message):
    with pytest.raises(ValueError, match=message):
        start(small, attention_backend="CUSTOM", additional_config={"kvops": {"check": True}}, **options)


def test_the_example_asks_a_server(small, tmp_path):
    """The front end, the engine and the worker are processes of their own there."""
    root = Path(__file__).parent.parent
    words = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(125))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    )  # fmt: skip
    model = shutil.copytree(small, tmp_path / "model")
    tokenizer.save_pretrained(model)
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(
        [sys.executable, str(root / "examples" / "vllm_server.py"), "--model", str(model), "--ratios", "4"],
        env=environment | {"PYTHONPATH": str(root)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.match(r"4x, at most (?!0\.0%)[0-9.]+% of the pool: ", done.stdout), done.stdout
