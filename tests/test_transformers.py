"""transformers' own models on tiny random configurations: kvops against "eager", whose float64 run is the truth."""

import pytest
import torch
import transformers
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, create_chunked_causal_mask

import kvops.integrations.transformers as kvops_transformers

TINY = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "attention_dropout": 0.0,
}
MODELS = {
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {"sliding_window": 5}),
    "Qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "Gemma2": ("Gemma2Config", {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "Gemma3": ("Gemma3TextConfig", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    "GptOss": (
        "GptOssConfig",
        {"sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"},
    ),
}
PADDING = (0, 4, 9)
LENGTH = 13

kvops_transformers.enable()


def make_model(family: str, **changes) -> torch.nn.Module:
    config, own = MODELS[family]
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, config)(**TINY | own | changes))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if family == "GptOss":  # as initialised they are near 0, where a forgotten sink would hardly show
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return model.eval()


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, TINY["vocab_size"], (1, LENGTH - count), generator=generator) for count in PADDING]


def padded(side: str) -> dict[str, torch.Tensor]:
    """The rows as one batch, with padding (token 0) on the left or right."""
    mask = torch.ones(len(PADDING), LENGTH, dtype=torch.int64)
    for row, count in enumerate(PADDING):
        mask[row, slice(count) if side == "left" else slice(LENGTH - count, None)] = 0
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.cat(rows(), 1)[0]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def train(model: torch.nn.Module, implementation: str, batches: list[dict]) -> dict[str, torch.Tensor]:
    """Logits of the real tokens, the loss and every gradient of all batches together."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits, targets = [], []
    for batch in batches:
        out = model(**batch, use_cache=False).logits
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        logits.append(out[real])
        targets.append(batch["input_ids"][real])
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logits": torch.cat(logits).detach(), "loss": loss.detach(), **gradients}


def assert_trains_alike(model: torch.nn.Module, batch: dict, eager_batches: list[dict]) -> None:
    ours, theirs = train(model, "kvops", [batch]), train(model, "eager", eager_batches)
    assert_no_worse(ours, theirs, train(model.double(), "eager", eager_batches))


def assert_no_worse(ours: dict, theirs: dict, exact: dict) -> None:
    """What :func:`train` gave with kvops, with eager in float32 and with eager in float64."""
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        # Norms, as the largest error of a few is luck; flash attention rounds once more, recomputing P in the backward.
        error, eager_error = (torch.linalg.vector_norm(run[name] - truth).item() for run in (ours, theirs))
        rounding = torch.finfo(torch.float32).eps * torch.linalg.vector_norm(truth).item()
        assert error <= 2 * eager_error + rounding, (name, error, eager_error, rounding)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODELS)
def test_padded_batches_train_like_their_rows_alone_in_eager(family, side):
    # Rows alone: in float64, eager makes NaN of padding that sees nothing.
    assert_trains_alike(make_model(family), padded(side), [{"input_ids": row} for row in rows()])


@pytest.mark.parametrize("family", MODELS)
def test_packed_sequences_train_like_in_eager(family):
    ids = torch.randint(1, TINY["vocab_size"], (2, LENGTH))
    starts = ((0, 5, 6), (0, 1, 9))
    positions = torch.stack([torch.cat([torch.arange(n) for n in torch.tensor([*s, LENGTH]).diff()]) for s in starts])
    batch = {"input_ids": ids, "position_ids": positions}
    assert_trains_alike(make_model(family), batch, [batch])


@pytest.mark.parametrize("family", MODELS)
def test_a_batch_without_padding_trains_like_in_eager(family):
    batch = {"input_ids": torch.randint(1, TINY["vocab_size"], (2, LENGTH))}
    assert_trains_alike(make_model(family), batch, [batch])


def test_cumulative_lengths_of_a_flattening_collator_are_used():
    model, lengths = make_model("Mistral"), (7, 1, 5)
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    features = [{"input_ids": torch.randint(1, TINY["vocab_size"], (n,)).tolist()} for n in lengths]
    batch = collator(features)
    assert batch["cu_seq_lens_q"].tolist() == [0, 7, 8, 13]
    model.set_attn_implementation("kvops")
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0]
        batch.pop("position_ids")
        alone = [model(torch.tensor([feature["input_ids"]])).logits[0] for feature in features]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GptOss"])
def test_generation_from_left_padded_prompts_gives_the_tokens_of_eager(family, cache):
    model = make_model(family)
    inputs = padded("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"max_new_tokens": 9, "do_sample": False, "disable_compile": True}
    model.set_attn_implementation("eager")
    expected = model.generate(ids, attention_mask=mask, **options)
    model.set_attn_implementation("kvops")
    options |= {"use_cache": False} if cache is None else {"cache_implementation": cache}
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)


def test_a_second_chunk_continues_a_padded_prefill():
    model = make_model("Mistral")
    ids, mask, positions = padded("left").values()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
        model.set_attn_implementation("kvops")
        cache = transformers.DynamicCache(config=model.config)
        for part in (slice(0, 8), slice(8, 13)):
            past = mask[:, : part.stop]
            chunk = model(
                ids[:, part], attention_mask=past, position_ids=positions[:, part], past_key_values=cache
            ).logits
            real = mask[:, part].bool()
            torch.testing.assert_close(chunk[real], whole[:, part][real])


def test_kernels_get_what_they_need(backend, device):
    model = make_model("Gemma2", num_hidden_layers=1).to(device)
    ids, mask, *_ = (x.to(device) for x in padded("left").values())
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation("kvops")
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected, rtol=1e-4, atol=1e-4)


def test_a_bidirectional_encoder_with_padding():
    config = transformers.ModernBertConfig(
        **{**TINY, "pad_token_id": 0}, local_attention=6, global_attn_every_n_layers=2
    )
    model = transformers.ModernBertModel(config).eval()
    ids, mask, *_ = padded("right").values()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        model.set_attn_implementation("kvops")
        torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state[mask.bool()], expected)


def mask_of(create, attention_mask=None, **config_options):
    config = transformers.LlamaConfig(**TINY, **config_options)
    config._attn_implementation = "kvops"
    return create(
        config=config,
        inputs_embeds=torch.empty(2, 6, 4),
        attention_mask=attention_mask,
        past_key_values=None,
    )


def test_masks_are_lengths_and_never_matrices():
    causal = mask_of(create_causal_mask)
    assert (causal.causal, causal.window_left, causal.window_right, causal.packing) == (True, -1, -1, None)
    assert mask_of(create_causal_mask, torch.ones(2, 6)).packing is None
    both = mask_of(create_bidirectional_mask, torch.tensor([[0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]))
    assert not both.causal
    assert both.packing.cu_seqlens_q.tolist() == [0, 1, 1, 3, 6, 6, 6, 6, 12, 12, 12]
    assert both.packing.cu_seqlens_k.tolist() == [0, 0, 1, 3, 3, 6, 6, 6, 12, 12, 12]
    assert both.packing.num_queries.tolist() == [2, 6]
    nothing = mask_of(create_causal_mask, torch.zeros(2, 6))
    assert nothing.packing.num_queries.tolist() == [0, 0]


def test_a_transformers_that_describes_masks_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(RuntimeError, match=r"transformers: expected a version .* upgrade it"):
        kvops_transformers.enable()


def test_what_cannot_be_expressed_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask: expected padding at the left or right end .* row 1"):
        mask_of(create_causal_mask, torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"mask_function: expected at most 4 tokens of chunked attention .* got 6"):
        mask_of(create_chunked_causal_mask, attention_chunk_size=4)
    assert mask_of(create_chunked_causal_mask, attention_chunk_size=6).causal

    def first_tokens_see_each_other(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx < 2

    config = transformers.LlamaConfig(**TINY, attn_implementation="kvops")
    with pytest.raises(ValueError, match=r"mask_function: .* got or_masks, which kvops cannot express: set attn"):
        create_causal_mask(config, torch.empty(1, 6, 4), None, None, or_mask_function=first_tokens_see_each_other)
    model = make_model("Llama")
    model.set_attn_implementation("kvops")
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"attention_mask: expected a 2-D mask of padding, got .* \[1, 1, 4, 4\]"):
        model(ids, attention_mask=torch.zeros(1, 1, 4, 4))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout: expected 0, got 0\.1"):
        model.train()(ids)
