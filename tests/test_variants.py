"""A process compiles its kernels when it warms up and none later, whatever comes in."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_generate import prompts_of, tiny_model
from variants import recorded_variants

from kvops.__main__ import main
from kvops.cli import demo
from kvops.generation.generate import generate
from kvops.generation.options import GenerationOptions
from kvops.generation.warm_up import warm_up
from kvops.ops.registry import forget_launches
from kvops.policies import Compression, SnapKV

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the interpreter's launches")

OPTIONS = {
    "whole": GenerationOptions(),
    "compressed, with drafts": GenerationOptions(
        compression=Compression(ratio=2, every=3, policy=SnapKV()), draft="prompt_lookup", num_draft=3, temperature=0.8
    ),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_left_to_compile_after_a_warm_up(options, monkeypatch):
    """Lengths and slices of layers that were 1, or aligned to 16, made two or three variants of most kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, said = tiny_model(num_layers=2), []
    with recorded_variants() as warm:
        warm_up(model, options, lengths=(20,), progress=said.append)
    settings = {**vars(options), "max_new_tokens": 5}
    with recorded_variants() as later:
        for lengths in ([19], [24, 30, 32]):
            generate(model, prompts_of(*lengths), **settings)
    assert "paged_attention_kernel" in later
    new = {name: variants - warm.get(name, set()) for name, variants in later.items()}
    assert not {name: _differing(variants, warm[name]) for name, variants in new.items() if variants}
    assert [line.partition(",")[0] for line in said] == [
        "1 of 1: prompts of 20 tokens",
    ]


IN_PARALLEL = """
    import json, sys
    from triton import knobs
    from test_generate import prompts_of, tiny_model
    from kvops.generation import warm_up as module
    from kvops.generation.generate import generate
    from kvops.kernels import device
    from kvops.ops.compile_ahead import compiling_beside

    H100 = device.Device("NVIDIA H100 80GB HBM3", "cuda", "sm_90", 32, 132, 232448)
    model, said = tiny_model(num_layers=2), []
    module.backend = lambda device: "triton"
    device.current_device = lambda: H100
    module.warm_up(model, lengths=(20,), jobs=2, progress=said.append)
    launched, compiled = [], []
    knobs.compilation.listener = lambda **facts: compiled.extend([] if facts["cache_hit"] else [facts["src"].name])
    with compiling_beside(H100, told=launched.append):
        for lengths in ([19], [24, 30, 32]):
            generate(model, prompts_of(*lengths), max_new_tokens=5)
    print(json.dumps([said, launched, compiled]))
"""


@pytest.mark.compile
def test_on_a_gpu_processes_compile_side_by_side_and_nothing_is_left_to_compile(tmp_path):
    """Without a GPU: the processes compile for an H100, and so do the launches that come later."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "KVOPS_CPU": "eager"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", textwrap.dedent(IN_PARALLEL)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "a warning"
    said, launched, compiled = json.loads(done.stdout.splitlines()[-1])
    assert "paged_attention_kernel" in launched
    assert not compiled
    kernels = [line.split(":")[1].split(",")[0].strip() for line in said if "kernels compiled" in line]
    assert Counter(launched) <= Counter(kernels)
    assert said[-1].startswith("1 of 1: prompts of 20 tokens, ")


def test_what_cannot_be_sent_to_a_process_compiles_where_it_is_launched(monkeypatch):
    monkeypatch.setattr("kvops.generation.warm_up.backend", lambda device: "triton")
    monkeypatch.setattr("kvops.generation.warm_up.generate", lambda model, prompts, **options: None)

    class Local(SnapKV):
        """No process can import it."""

    options = GenerationOptions(compression=Compression(ratio=2, policy=Local()))
    with pytest.warns(UserWarning, match="each kernel is compiled where it is launched first"):
        warm_up(tiny_model(num_layers=1), options, lengths=[5])


def _differing(variants, known):
    """The parts that no known variant has, or a whole variant where only their combination is new."""
    parts = {part for variant in known for part in variant}
    return [[part for part in variant if part not in parts] or variant for variant in variants]


def test_a_warm_up_names_what_the_model_cannot_read():
    model = tiny_model(num_layers=1, max_positions=16)
    with pytest.raises(
        ValueError, match=r"lengths: expected at least one from 1 to 12, as the model reads, got \[40\]"
    ):
        warm_up(model, lengths=[40])


def test_a_warm_up_takes_the_options_of_the_first_request_of_a_batch(monkeypatch):
    seen = []
    monkeypatch.setattr("kvops.generation.warm_up.generate", lambda model, prompts, **options: seen.append(options))
    options = GenerationOptions(temperature=[0.5, 0.7, 0.9], top_k=[4, 5, 6], stop_tokens=[3], bad_words=[[1]])
    warm_up(tiny_model(num_layers=1), options, lengths=[5])
    assert [(call["temperature"], call["top_k"], call["stop_tokens"]) for call in seen] == [(0.5, 4, ())] * 2
    assert set(seen[0]) == {field.name for field in dataclasses.fields(GenerationOptions)}


def test_the_command_warms_up_for_its_options(monkeypatch, capsys):
    asked = []
    tokenizer = SimpleNamespace(eos_token_ids=[2])
    monkeypatch.setattr("kvops.cli.models.load_model", lambda path, device: (tiny_model(num_layers=1), tokenizer, None))
    monkeypatch.setattr("kvops.generation.warm_up.generate", lambda model, prompts, **options: asked.append(options))
    assert main(["warm-up", "--compression", "4", "--draft", "lookup", "--device", "cpu"]) == 0
    assert (asked[0]["draft"], asked[0]["compression"].ratio) == ("prompt_lookup", 4)
    said = capsys.readouterr()
    assert "kept on disk (" in said.out
    assert said.err.count("prompts of") == 9


def test_the_demo_times_nothing_that_compiles(monkeypatch):
    """In a new environment the first row had the compilation of the CPU kernels in its time."""
    jit = pytest.importorskip("kvops.kernels.cpu.jit")
    model, bar = tiny_model(num_layers=1, head_dim=24), SimpleNamespace(update=lambda: None, set_postfix_str=str)
    forget_launches()
    jit.compiled.cache_clear()
    demo._compile(model, torch.device("cpu"), bar)
    compiled = jit.compiled.cache_info().misses
    demo._answer(model, prompts_of(40)[0], demo.Size(document=0, held_out=0, answer=6), bar)
    assert compiled
    assert jit.compiled.cache_info().misses == compiled
