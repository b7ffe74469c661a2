"""transformers' own models on tiny random configurations: kvops against "eager", whose float64 run is the truth."""

import pytest
import torch
import transformers
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

import kvops.integrations.transformers as kvops_transformers
from kvops.integrations.transformers import attention

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
    # All queries see all keys that are real: they may belong to another sequence, as in cross-attention.
    assert both.packing.cu_seqlens_q.tolist() == [0, 0, 0, 6, 6, 6, 6, 6, 12, 12, 12]
    assert both.packing.cu_seqlens_k.tolist() == [0, 0, 1, 3, 3, 6, 6, 6, 12, 12, 12]
    nothing = mask_of(create_causal_mask, torch.zeros(2, 6)).packing
    assert nothing.cu_seqlens_q.diff().unflatten(0, (2, 5))[:, 2].tolist() == [0, 0]


def test_a_transformers_that_describes_masks_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(RuntimeError, match=r"transformers: expected a version .* upgrade it"):
        kvops_transformers.enable()


def prompts(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, TINY["vocab_size"], mask.shape).masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def assert_like_eager(model, batch, real, **options):
    """Logits of the real tokens and all gradients, to a ten thousandth of the largest number of each."""
    results = []
    for name in ("eager", "kvops"):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(**batch, **options).logits
        (logits * real[..., None]).square().sum().backward()
        gradients = [x.grad for x in model.parameters() if x.grad is not None]
        results.append((logits[real.bool()].detach(), *gradients))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()) + 1e-7)


HOLES = torch.tensor(
    [[1, 1, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 1], [1] * 9]
)  # turns of different length in a chat


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GptOss"])
def test_padding_between_tokens_is_masked(family):
    assert_like_eager(make_model(family), prompts(HOLES), HOLES, use_cache=False)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_model_generates_after_a_prompt_with_holes(cache):
    model, batch = make_model("Llama"), prompts(HOLES[[0, 2, 3]])
    del batch["position_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    model.set_attn_implementation("eager")
    expected = model.generate(**batch, **options)
    model.set_attn_implementation("kvops")
    assert torch.equal(model.generate(**batch, **options), expected)


def test_functions_of_the_caller_chunks_and_blocks_become_a_bias():
    def first_tokens_see_each_other(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx < 2

    for make, options in (
        (create_causal_mask, {"or_mask_function": first_tokens_see_each_other}),
        (create_causal_mask, {"and_mask_function": first_tokens_see_each_other}),
        (create_chunked_causal_mask, {}),
        (create_sliding_window_causal_mask, {"block_sequence_ids": torch.tensor([[-1, 0, 0, 0, -1, -1]])}),
    ):
        masks = []
        for name in ("kvops", "sdpa"):
            config = transformers.LlamaConfig(**TINY, attn_implementation=name)
            config.attention_chunk_size, config.sliding_window = 4, 3
            masks.append(make(config, torch.empty(1, 6, 4), None, None, **options))
        assert torch.equal(masks[0].bias, masks[1])
        assert torch.equal(masks[0][:, :, 2:5, 1:].bias, masks[1][:, :, 2:5, 1:])
    assert mask_of(create_chunked_causal_mask, attention_chunk_size=6).bias is None  # a single chunk


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_a_mask_of_the_caller_is_added(kind):
    """[batch, 1, queries, keys], which transformers hands on as it is."""
    model, real = make_model("Llama"), torch.ones(2, 6, dtype=torch.int64)
    seen = torch.rand(2, 1, 6, 6) < 0.5
    seen |= torch.eye(6, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    ids = torch.randint(1, TINY["vocab_size"], (2, 6))
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=added).logits
    model.set_attn_implementation("kvops")
    torch.testing.assert_close(model(ids, attention_mask=seen if kind == torch.bool else added).logits, expected)
    assert_like_eager(model, {"input_ids": ids, "attention_mask": added}, real)


def test_what_cannot_be_expressed_is_refused():
    model = make_model("Llama")
    model.set_attn_implementation("kvops")
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"attention_mask: expected a mask \[batch, heads, 4, 4\] or one of padding"):
        model(ids, attention_mask=torch.zeros(1, 1, 4, 3))


def attend_directly(model, name, value):
    layer = model.model.layers[0].self_attn
    q, k, v = (torch.zeros(1, heads, 4, 8) for heads in (6, 2, 2))
    return attention(layer, q, k, v, None, scaling=1.0, **{name: value})


@pytest.mark.parametrize("name", ["sinks", "indices", "block_indices", "score_mod", "anything_new"])
def test_arguments_that_may_change_attention_are_refused(name):
    """They were swallowed."""
    model = make_model("Llama")
    with pytest.raises(ValueError, match=rf"^{name}: expected None, got Tensor of shape \[4\]: .* LlamaAttention"):
        attend_directly(model, name, torch.zeros(4))
    with pytest.raises(ValueError, match=f"^{name}: expected None, got False"):
        attend_directly(model, name, False)
    attend_directly(model, name, None)


def test_arguments_that_do_not_change_attention_are_let_through():
    attend_directly(make_model("Llama"), "position_ids", torch.zeros(1, 4))
    attend_directly(make_model("Llama"), "num_items_in_batch", torch.tensor(3))


def test_is_causal_may_not_contradict_the_mask():
    model, ids = make_model("Llama"), torch.randint(1, 61, (1, 6))
    with torch.no_grad():  # transformers makes the mask by it
        model.set_attn_implementation("eager")
        expected = model(ids, is_causal=False).logits
        model.set_attn_implementation("kvops")
        torch.testing.assert_close(model(ids, is_causal=False).logits, expected)
    q, k = torch.zeros(2, 6, 6, 8), torch.zeros(2, 2, 6, 8)
    with pytest.raises(ValueError, match="is_causal: expected True, as the mask has it, got False"):
        attention(model.model.layers[0].self_attn, q, k, k, mask_of(create_causal_mask), is_causal=False)


def test_half_of_a_packing_is_refused():
    model, lens = make_model("Llama"), torch.tensor([0, 1, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected together with cu_seq_lens_k"):
        attend_directly(model, "cu_seq_lens_q", lens)


def test_a_mask_knows_the_lengths_that_it_was_made_for():
    """Keys that a model adds after its mask was made were attended to as if they stood at the end of the text."""
    layer = make_model("Llama").model.layers[0].self_attn
    q, k = torch.randn(2, 6, 6, 8), torch.randn(2, 2, 9, 8)
    mask = mask_of(create_causal_mask)
    with pytest.raises(
        ValueError, match=r"attention_mask: expected the 6 queries and 6 keys .* got 6 queries and 9 keys"
    ):
        attention(layer, q, k, k, mask)
    with pytest.raises(
        ValueError, match=r"attention_mask: expected the 6 queries and 6 keys .* got 5 queries and 6 keys"
    ):
        attention(layer, q[:, :, 1:], k[:, :, :6], k[:, :, :6], mask)
    padded_mask = mask_of(create_causal_mask, torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="attention_mask: expected the 2 rows that the mask was made for, got 4"):
        attention(
            layer, q.repeat(2, 1, 1, 1), k[:, :, :6].repeat(2, 1, 1, 1), k[:, :, :6].repeat(2, 1, 1, 1), padded_mask
        )
    with pytest.raises(ValueError, match=r"attention_mask: expected a mask for 6 queries and 9 keys .* got None"):
        attention(layer, q, k, k, None)


@pytest.mark.parametrize("padding", [None, [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("part", [slice(-1, None), slice(-3, None), slice(1, 4), slice(None), slice(0, None)])
def test_a_slice_of_a_mask_is_the_mask_of_those_queries(padding, window, part):
    create = create_causal_mask if window is None else create_sliding_window_causal_mask
    padding = None if padding is None else torch.tensor(padding)
    q, k, v = torch.randn(2, 6, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    layer = make_model("Llama").model.layers[0].self_attn
    mask = mask_of(create, padding, sliding_window=window)
    whole, _ = attention(layer, q, k, v, mask)
    got, _ = attention(layer, q[:, :, part], k, v, mask[:, :, part, :])
    real = torch.ones(2, 6, dtype=torch.bool) if padding is None else padding.bool()
    torch.testing.assert_close(got[real[:, part]], whole[:, part][real[:, part]])
    fewer = mask[:, :, part, : part.stop] if (part.stop or 0) > 0 else mask[:, :, part, :6]  # keys that nobody sees
    shorter, _ = attention(layer, q[:, :, part], k[:, :, : fewer.kv_length], v[:, :, : fewer.kv_length], fewer)
    torch.testing.assert_close(shorter, got)


USES = {
    "bloom": lambda mask: torch.zeros(2, 2) + mask,
    "mpt": lambda mask: mask.bool(),
    "doge": lambda mask: mask.dtype,
    "falcon": lambda mask: torch.zeros(2, 2).masked_fill(mask, 0.0),
    "trocr": lambda mask: mask.size(),
    "index": lambda mask: mask[:, 0],
    "invert": lambda mask: ~mask,
    "difference": lambda mask: 1.0 - mask,
    "comparison": lambda mask: mask > 0,
    "cat": lambda mask: torch.cat([torch.zeros(1), mask]),
    "where": lambda mask: torch.where(mask, 1.0, 0.0),
}


@pytest.mark.parametrize("use", USES)
def test_a_model_that_reads_its_mask_is_told_so_in_one_sentence(use):
    with pytest.raises(TypeError, match=r"^attention_mask: expected a model that passes its mask on .*: set attn_imp"):
        USES[use](mask_of(create_causal_mask))


def test_cross_attention_sees_every_key_of_a_padded_encoder():
    """Queries behind the length of the encoder's text were taken for padding."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 61, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = transformers.BartModel(transformers.BartConfig(**sizes, **heads, pad_token_id=0)).eval()
    ids, mask, _ = padded("right").values()
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(1, 61, (3, LENGTH))}
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(**inputs).last_hidden_state
        model.set_attn_implementation("kvops")
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected)


def test_weights_that_are_asked_for_bring_a_warning_and_none(monkeypatch):
    """As with sdpa; it raised."""
    warned = []
    monkeypatch.setattr("logging.Logger.warning_once", lambda logger, message: warned.append(message))
    model = make_model("Llama")
    attend_directly(model, "output_attentions", True)
    assert len(warned) == 1
    assert "does not support `output_attentions=True`" in warned[0]
    model.set_attn_implementation("kvops")
    assert model(torch.ones(1, 4, dtype=torch.int64), output_attentions=True).logits.shape == (1, 4, 61)


@pytest.mark.parametrize("inputs", ["plain", "padded", "cached"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_a_whole_forward_compiles_to_one_graph(family, inputs):
    """Masks are made within: torch.compile cannot look into the functions that describe them."""
    model, batch = make_model(family), padded("left")
    model.set_attn_implementation("kvops")
    real = batch.pop("attention_mask").bool()
    if inputs == "plain":
        real = torch.ones_like(real)
    else:
        batch["attention_mask"] = real.long()
    batch.pop("position_ids")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(**batch, use_cache=inputs == "cached").logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")(**batch, use_cache=inputs == "cached").logits
    torch.testing.assert_close(compiled[real], expected[real])


def test_packed_sequences_compile_to_one_graph():
    model = make_model("Mistral")
    model.set_attn_implementation("kvops")
    ids = torch.randint(1, TINY["vocab_size"], (2, LENGTH))
    positions = torch.stack([torch.tensor([0, 1, 2, 0, 1, 0, *range(7)]), torch.arange(LENGTH)])
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, position_ids=positions, use_cache=False).logits, expected)


def test_functions_of_the_caller_become_a_bias_while_compiling_too():
    def first_tokens_see_each_other(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx < 2

    config = transformers.LlamaConfig(**TINY, attn_implementation="kvops")
    for kind in ("or_mask_function", "and_mask_function"):

        def make(x, kind=kind):
            return create_causal_mask(config, x, None, None, **{kind: first_tokens_see_each_other}).bias

        torch._dynamo.reset()
        compiled = torch.compile(make, fullgraph=True, backend="eager")
        assert torch.equal(compiled(torch.empty(1, 6, 4)), make(torch.empty(1, 6, 4)))
