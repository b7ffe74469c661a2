"""transformers' continuous batching with kvops: the tokens of its own paged attention and of generate."""

import inspect

import pytest
import torch
import transformers
from test_transformers import make_model
from test_transformers_cache import prompts
from transformers.generation import continuous_batching as engine

import kvops.integrations.transformers as kvops_transformers
from kvops.integrations.transformers import serving

ENGINE = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=64, use_cuda_graph=False)


def serve(model) -> list[list[int]]:
    """Greedy tokens of prompts that are longer than a batch: they are read in chunks beside others that decode."""
    options = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    rows = prompts() + [row[:9] for row in prompts()]
    out = model.generate_batch(rows, options, ENGINE, warmup=False)
    return [answer.generated_tokens for answer in out.values()]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_served_tokens_are_those_of_generate(family, monkeypatch):
    model = make_model(family)
    calls = []
    attend = serving.flash_attention_varlen
    monkeypatch.setattr(
        serving, "flash_attention_varlen", lambda *args, **options: calls.append(1) or attend(*args, **options)
    )
    with kvops_transformers.continuous_batching(model):
        got = serve(model)
    assert calls
    model.set_attn_implementation("eager")
    rows = prompts() + [row[:9] for row in prompts()]
    expected = [
        model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False)[0, len(row) :].tolist() for row in rows
    ]
    assert got == expected


def test_the_context_leaves_everything_as_it_was():
    model = make_model("Llama")
    interface = transformers.AttentionInterface()
    before, implementation = interface["paged|eager"], model.config._attn_implementation
    with kvops_transformers.continuous_batching(model):
        assert interface["paged|eager"] is serving.paged_attention_forward
        assert model.config._attn_implementation == "paged|eager"
    assert interface["paged|eager"] is before
    assert model.config._attn_implementation == implementation


def test_the_engine_takes_no_name_of_ours():
    """Why the context takes the place of a name: see "Continuous batching" in the manual. When this fails, the engine
    may take "kvops" itself."""
    model = make_model("Llama")
    model.set_attn_implementation(kvops_transformers.enable())
    with pytest.raises(ValueError, match="Implementation kvops is not supported for continuous batching"):
        serve(model)
    source = inspect.getsource(engine.continuous_api.ContinuousBatchingManager.switch_to_cb_friendly_attn)
    assert 'if not (target_implem in ["paged|eager", "sdpa"] or is_flash):' in source
    transformers.AttentionInterface.register("kvops_flash", serving.paged_attention_forward)
    try:
        with pytest.raises(ValueError, match="Could not find the currently requested flash attention implementation"):
            model.set_attn_implementation("kvops_flash")
    finally:
        del transformers.AttentionInterface._global_mapping["kvops_flash"]


def test_a_call_outside_of_the_engine_is_refused():
    model = make_model("Llama")
    ids = torch.ones(1, 3, dtype=torch.int64)
    refused = pytest.raises(ValueError, match="cu_seq_lens_q: expected the packed requests of generate_batch, got None")
    with kvops_transformers.continuous_batching(model), refused:
        model(ids)


def test_the_cache_may_be_updated_before_attention_or_by_it():
    """By the attention layer from transformers 5.24 on, and by the attention function before."""
    torch.manual_seed(0)
    query, new = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    stored = torch.randn(2, 1, 2, 8, 16)
    lengths = {"cu_seq_lens_k": torch.tensor([0, 5, 8], dtype=torch.int32), "max_length_k": 5}

    class Cache:
        def update(self, key_states, value_states, layer_idx, kwargs):
            assert key_states is value_states is new
            kwargs |= lengths
            return stored

    layer = torch.nn.Module()
    layer.layer_idx = 0
    options = {"cu_seq_lens_q": torch.tensor([0, 1, 3]), "max_length_q": 2}
    before, _ = serving.paged_attention_forward(layer, query, new, new, None, cache=Cache(), **options)
    now, _ = serving.paged_attention_forward(layer, query, *stored, None, **options, **lengths)
    assert before.isfinite().all()
    assert torch.equal(before, now)
