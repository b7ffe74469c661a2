"""Engines of the real vLLM for tests, in the test's own process; a module that imports this is skipped without vLLM."""

import gc
import os

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # two processes may share a core; vLLM reads it once
vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from kvops.integrations.vllm import register  # noqa: E402

PAGE = 32
MODELS = {
    "Llama": {},
    "Gemma2": {
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
    },
    "Qwen3": {"num_attention_heads": 6, "num_key_value_heads": 3},
}

register()
register()  # vLLM may load a plugin twice


def prompts(lengths, seed=0, vocabulary=128):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def start(model, **options):
    """An engine in this process, whose scheduler and worker can be looked at."""
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "block_size": PAGE,
        "kv_cache_memory_bytes": 64 * 2**20,
        "seed": 0,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    # An engine in a cycle of references takes the process groups of the next one along when it goes, if that is later.
    gc.collect()
    return vllm.LLM(model=str(model), **(settings | options))


def generate(llm, ids, max_tokens=24, **options):
    sampling = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options)
    outs = llm.generate([{"prompt_token_ids": each} for each in ids], sampling, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outs]


def layers(llm):
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if hasattr(layer, "impl")]
