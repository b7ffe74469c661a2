"""KVOpsCache with the batches that people have: padding anywhere, turns of different length, beams, other batch sizes.

The oracle is transformers: its own cache in eager attention, or each row alone without padding.
"""

import copy

import pytest
import torch
import transformers
from test_transformers import TINY
from test_transformers_cache import gemma4, left_padded, lfm2, make, new_tokens, prompts, shared

from kvops.integrations.transformers import KVOpsCache
from kvops.policies import Compression, SnapKV

FAMILIES = {"Llama": {}, "Mistral": {}, "Qwen2": {"use_sliding_window": False}}  # Mistral has a window of 5 tokens
# Turns of a chat, for each row: the numbers of tokens, and where the shorter ones are padded.
TURNS = [((9, 4, 6), "left"), ((3, 7, 5), "left"), ((6, 2, 4), "right"), ((2, 0, 5), "left"), ((1, 0, 1), "right")]


def turns() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens ``[3, T]`` and which of them are real, turn by turn."""
    generator = torch.Generator().manual_seed(5)
    chat = []
    for counts, side in TURNS:
        longest = max(counts)
        place = torch.arange(longest)
        lens = torch.tensor(counts)[:, None]
        real = place < lens if side == "right" else place >= longest - lens
        chat.append((torch.randint(1, 61, (3, longest), generator=generator) * real, real))
    return chat


def run_turns(model, cache) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The logits of every turn, and which tokens are real."""
    seen = torch.zeros(3, 0, dtype=torch.bool)
    logits = []
    with torch.no_grad():
        for ids, real in turns():
            seen = torch.cat((seen, real), 1)
            positions = (seen.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            inputs = {"input_ids": ids, "attention_mask": seen.long(), "position_ids": positions}
            logits.append(model(**inputs, past_key_values=cache).logits)
    return logits, seen


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_of_different_length_have_the_logits_of_each_row_alone(family):
    """Padding between the turns of a row was refused."""
    model = make(family, **FAMILIES[family])
    cache = KVOpsCache(model.config, max_tokens=64, block_size=4)
    logits, seen = run_turns(model, cache)
    got, ids = torch.cat(logits, 1), torch.cat([ids for ids, _ in turns()], 1)
    model.set_attn_implementation("eager")
    for row in range(3):
        with torch.no_grad():
            alone = model(ids[row, seen[row]][None], use_cache=False).logits[0]
        torch.testing.assert_close(got[row, seen[row]], alone, atol=1e-5, rtol=1e-4)
    if family != "Mistral":  # it gives up what is outside of its window
        assert (cache.paged.seq_lens == seen.sum(1)[:, None]).all()  # no padding is stored
    assert cache.paged.next_positions.tolist() == seen.sum(1).tolist()


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_turns_of_different_length_have_the_logits_of_the_dynamic_cache(family):
    """Without windows, in which transformers counts padding as distance."""
    model = make(family, **FAMILIES[family])
    got, _ = run_turns(model, KVOpsCache(model.config, max_tokens=64, block_size=4))
    model.set_attn_implementation("eager")
    expected, _ = run_turns(model, transformers.DynamicCache(config=model.config))
    for ours, theirs, (_, real) in zip(got, expected, turns(), strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-4)


def test_a_compressed_chat_goes_on_with_turns_of_different_length():
    """Each row is compressed after its first turn as if it were alone."""
    model = make()
    compression = Compression(ratio=2, policy=SnapKV(observe=2), protect_first=1, protect_last=2)

    def cache():
        return KVOpsCache(model.config, max_tokens=64, block_size=2, compression=compression)

    together = cache()
    logits, seen = run_turns(model, together)
    got, ids = torch.cat(logits, 1), torch.cat([ids for ids, _ in turns()], 1)
    for row in range(3):
        alone, start = cache(), 0
        for turn, _ in turns():
            real = seen[row, start : start + turn.shape[1]]
            if real.any():
                with torch.no_grad():
                    expected = model(turn[row, real][None], past_key_values=alone).logits[0]
                torch.testing.assert_close(
                    got[row, start : start + turn.shape[1]][real], expected, atol=1e-5, rtol=1e-4
                )
            start += turn.shape[1]
        assert torch.equal(together.paged.seq_lens[:, row], alone.paged.seq_lens[:, 0])
    assert (together.paged.seq_lens[:, 0] < ids.shape[1]).all()


def test_rows_padded_on_the_right_go_on_token_by_token():
    model = make("Mistral")
    rows = [row[:length] for row, length in zip(prompts(), (11, 4, 8), strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    seen, cache = ids > 0, KVOpsCache(model.config, max_tokens=32, block_size=4)
    answers = torch.randint(1, 61, (3, 6), generator=torch.Generator().manual_seed(3))
    got = []
    with torch.no_grad():
        model(ids, attention_mask=seen.long(), past_key_values=cache)
        for step in range(6):
            seen = torch.cat((seen, torch.ones(3, 1, dtype=torch.bool)), 1)
            inputs = {"attention_mask": seen.long(), "position_ids": seen.sum(1, keepdim=True) - 1}
            got.append(model(answers[:, step : step + 1], **inputs, past_key_values=cache).logits)
        for row, tokens in enumerate(rows):
            alone = model(torch.tensor([tokens + answers[row].tolist()]), use_cache=False).logits[:, -6:]
            torch.testing.assert_close(torch.cat(got, 1)[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_those_of_the_dynamic_cache(family):
    model = make(family, **FAMILIES[family])
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    got = new_tokens(model, prompts(), past_key_values=cache, **options)
    assert got == new_tokens(model, prompts(), **options)
    assert len({tuple(beam) for beam in got}) > 3
    # The beams of a prompt share its blocks; each has blocks of its own for what it added.
    assert family == "Mistral" or cache.stats().blocks_shared >= 3 * 2 * 2 * (min(map(len, prompts())) // 4)


def test_beams_of_a_hybrid_model_take_its_states_along():
    model = lfm2()
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    expected = new_tokens(model, prompts(), num_beams=3)
    assert new_tokens(model, prompts(), past_key_values=cache, num_beams=3) == expected


@pytest.mark.parametrize("order", [[1, 1, 0], [2, 0, 1], [0, 0, 0]])
def test_compressed_rows_continue_from_each_other(order):
    """Before rows are reordered their prompts are compressed, once and not once for every copy."""
    model = make()
    compression = Compression(ratio=3, policy=SnapKV(observe=8), protect_first=2, protect_last=4, every=2)
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4, compression=compression)
    inputs = left_padded(prompts())
    mask = torch.cat((inputs["attention_mask"], torch.ones(3, 6, dtype=torch.int64)), 1)
    tokens = torch.randint(1, 61, (3, 6), generator=torch.Generator().manual_seed(4))

    def go_on(cache, tokens, mask) -> torch.Tensor:
        length = inputs["input_ids"].shape[1]
        steps = range(tokens.shape[1])
        return torch.cat(
            [
                model(
                    tokens[:, step : step + 1],
                    attention_mask=mask[:, : length + step + 1],
                    position_ids=mask[:, : length + step + 1].sum(1, keepdim=True) - 1,
                    past_key_values=cache,
                ).logits
                for step in steps
            ],
            1,
        )

    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        copies = [copy.deepcopy(cache) for _ in range(3)]
        cache.reorder_cache(torch.tensor(order))
        got = go_on(cache, tokens, mask[order])
        for row, source in enumerate(order):
            alone = go_on(copies[row], tokens[row].expand(3, -1), mask)[source]
            torch.testing.assert_close(got[row], alone, atol=1e-5, rtol=1e-4)
    assert cache.stats().blocks_in_use < 0.6 * sum(map(cache.paged.blocks_for, map(len, prompts())))


def test_another_batch_size_after_reset():
    model = make()
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    for rows in (prompts(), prompts()[:1], prompts() * 2):
        assert new_tokens(model, rows, past_key_values=cache) == new_tokens(model, rows)
        assert cache.batch_size == len(rows)
        cache.reset()


@pytest.mark.parametrize("make_model", [make, lfm2])
def test_a_prompt_is_read_once_and_continued_many_times(make_model):
    """transformers' recipe for many answers to one prompt, and for some of the rows of a batch."""
    model = make_model()
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    ids = torch.tensor([prompts()[0], prompts()[0][::-1]])
    more = torch.randint(1, 61, (4, 3), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        assert cache.stats().blocks_in_use == 2 * cache.paged.blocks_for(70)
        got = model(more, past_key_values=cache).logits
        expected = model(torch.cat((ids.repeat_interleave(2, 0), more), 1), use_cache=False).logits[:, -3:]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        cache.batch_select_indices(torch.tensor([3, 0]))
        got = model(more[:2], past_key_values=cache).logits
        whole = torch.cat((ids.flip(0), more[[3, 0]], more[:2]), 1)
        torch.testing.assert_close(got, model(whole, use_cache=False).logits[:, -3:], atol=1e-5, rtol=1e-4)


def mimo() -> torch.nn.Module:
    """Layers with windows have twice as many KV heads, and values have another size than keys."""
    config = transformers.MiMoV2FlashConfig(
        **TINY
        | {"head_dim": 8, "v_head_dim": 4, "num_attention_heads": 8, "layer_types": ["sliding_attention"] * 2}
        | {"sliding_window": 16, "initializer_range": 0.2, "mlp_layer_types": ["dense"] * 2}
        | {"layer_types": ["full_attention", "sliding_attention"]}
    )
    return shared(transformers.MiMoV2FlashForCausalLM(config))


def other_sizes() -> torch.nn.Module:
    return gemma4(global_head_dim=16, num_kv_shared_layers=0)


@pytest.mark.parametrize("make_model", [mimo, other_sizes])
@pytest.mark.parametrize("beams", [1, 3])
def test_layers_with_other_heads_are_in_a_pool_of_their_own(make_model, beams):
    model = make_model()
    model.set_attn_implementation("eager")
    expected = new_tokens(model, prompts(), num_beams=beams)
    model.set_attn_implementation("kvops")
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    assert new_tokens(model, prompts(), past_key_values=cache, num_beams=beams) == expected
    assert len(cache.pools) == 2
    shapes = {(pool.num_kv_heads, pool.k_cache.shape[2]) for pool in cache.pools}
    assert len(shapes) == 2
    with pytest.raises(RuntimeError, match="paged: expected a model whose layers have heads of one number and size"):
        cache.stats()
    assert "KVOpsCache(79 tokens" in repr(cache)


@pytest.mark.parametrize("limit", [{"ratio": 2}, {"blocks": 40}, {"mib": 0.01}])
def test_every_pool_gets_its_part_of_the_budget(limit):
    model = other_sizes()
    compression = Compression(policy=SnapKV(observe=8), protect_first=1, protect_last=2, **limit)
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4, compression=compression)
    ids = torch.tensor([prompts()[0]])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-4)
        model(ids[:, :1], past_key_values=cache)
    pools = [pool.stats() for pool in cache.pools]
    whole = [pool.blocks_for(70) for pool in cache.pools]
    newest = sum(pool.num_layers * pool.num_kv_heads for pool in cache.pools)  # a block for the last token of each list
    if "blocks" in limit:
        assert sum(stats.blocks_in_use for stats in pools) <= 40 + newest
    elif "mib" in limit:
        added = sum(pool.bytes_per_block * pool.num_layers * pool.num_kv_heads for pool in cache.pools)
        assert sum(stats.bytes_in_use for stats in pools) <= 0.01 * 2**20 + added
    else:
        assert all(stats.blocks_in_use <= full // 2 + newest for stats, full in zip(pools, whole, strict=True))


def deepseek() -> torch.nn.Module:
    """Latent attention: the cache stores one latent for all heads, which the model expands in every pass."""
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    sizes = {"num_key_value_heads": 6, "first_k_dense_replace": 2, "head_dim": 4, "initializer_range": 0.2}
    return shared(transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**TINY | latent | sizes)))


def jetmoe() -> torch.nn.Module:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "kv_channels": 8}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2, "initializer_range": 0.2, "num_key_value_heads": 2}
    return shared(transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**sizes | experts)))


def diffllama() -> torch.nn.Module:
    return shared(transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**TINY | {"initializer_range": 0.2})))


@pytest.mark.parametrize("make_model", [deepseek, jetmoe, diffllama])
def test_models_that_compute_with_stored_keys_get_copies_of_them(make_model):
    """They were refused. What is stored is what the model hands over: a latent, and no padding."""
    model = make_model()
    model.set_attn_implementation("eager")
    rows = [row[:length] for row, length in zip(prompts(), (13, 6, 10), strict=True)]
    expected = {beams: new_tokens(model, rows, num_beams=beams) for beams in (1, 2)}
    model.set_attn_implementation("kvops")
    for beams, tokens in expected.items():
        cache = KVOpsCache(model.config, max_tokens=32, block_size=4)
        assert new_tokens(model, rows, past_key_values=cache, num_beams=beams) == tokens
        assert cache.paged.next_positions.tolist() == [len(row) + 9 for row in rows for _ in range(beams)]
        assert (cache.paged.seq_lens == cache.paged.next_positions[:, None]).all()
    if make_model is deepseek:
        assert (cache.paged.num_kv_heads, cache.paged.k_cache.shape[2], cache.paged.v_cache.shape[2]) == (1, 8, 4)
    plain = new_tokens(model, rows[:1] * 1, prompt_lookup_num_tokens=3, past_key_values=cache_for(model))
    assert plain == new_tokens(model, rows[:1])


def llama4() -> torch.nn.Module:
    """Chunks of 8 tokens in the first layer."""
    sizes = {"num_local_experts": 2, "intermediate_size_mlp": 48, "moe_layers": [], "attention_chunk_size": 8}
    types = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0], "initializer_range": 0.2}
    return shared(transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**TINY | sizes | types)))


def test_layers_with_chunks_see_their_own_chunk_of_each_row():
    model = llama4()
    rows = [row[:length] for row, length in zip(prompts(), (21, 6, 13), strict=True)]
    model.set_attn_implementation("eager")
    alone = [new_tokens(model, [row])[0] for row in rows]
    model.set_attn_implementation("kvops")
    cache = KVOpsCache(model.config, max_tokens=64, block_size=4)
    assert new_tokens(model, rows, past_key_values=cache) == alone
    cache.stats()  # gives up the chunks that are over
    assert cache.paged.seq_lens[0].max() < 8 + 8
    chat = KVOpsCache(model.config, max_tokens=64, block_size=4)
    logits, seen = run_turns(model, chat)
    got, ids = torch.cat(logits, 1), torch.cat([ids for ids, _ in turns()], 1)
    model.set_attn_implementation("eager")
    for row in range(3):
        with torch.no_grad():
            expected = model(ids[row, seen[row]][None], use_cache=False).logits[0]
        torch.testing.assert_close(got[row, seen[row]], expected, atol=1e-5, rtol=1e-4)


def cache_for(model, **options) -> KVOpsCache:
    return KVOpsCache(model.config, max_tokens=64, block_size=4, **options)


def test_what_a_model_computes_with_is_not_compressed_and_has_no_gradient():
    model = deepseek()
    ids = torch.ones(1, 4, dtype=torch.int64)
    expected = r"^compression: expected None, as this model computes .*, got Standout$"
    with torch.no_grad(), pytest.raises(ValueError, match=expected):
        model(ids, past_key_values=cache_for(model, compression=Compression(2)))
    with pytest.raises(RuntimeError, match="no gradient: generate under"):
        model(ids, past_key_values=cache_for(model))
    cache = cache_for(model)
    with torch.no_grad():
        new, _ = cache.update(torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 4), 0)
        with pytest.raises(
            TypeError, match="past_key_values: expected a model that hands new keys and values straight"
        ):
            new.unsqueeze(0)
