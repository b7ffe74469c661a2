"""KVOpsCache in transformers' generate: the tokens of transformers' own cache, and memory that really comes back."""

import pytest
import torch
import transformers
from test_transformers import make_model

import kvops
import kvops.integrations.transformers as kvops_transformers
from kvops.generation.generate import generate
from kvops.integrations.transformers import KVOpsCache
from kvops.models.config import LlamaConfig
from kvops.models.llama import Llama
from kvops.policies import AdaKV, Compression, ExpectedAttention, KVzip, SnapKV

LENGTHS = (70, 41, 64)


def make(family: str = "Llama", **changes) -> torch.nn.Module:
    model = make_model(family, **changes)
    model.set_attn_implementation(kvops_transformers.enable())
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, 61, (length,), generator=generator).tolist() for length in LENGTHS]


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def new_tokens(model: torch.nn.Module, rows: list[list[int]], **options) -> list[list[int]]:
    inputs = left_padded(rows)
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_without_compression_the_tokens_are_those_of_the_dynamic_cache(family):
    model = make(family)
    cache = KVOpsCache(model.config, max_tokens=96, block_size=4)
    assert new_tokens(model, prompts(), past_key_values=cache) == new_tokens(model, prompts())
    # Padding takes no memory, and the last token is never run. Keys behind a window are given up now and then.
    types = getattr(model.config, "layer_types", None) or ["sliding_attention" if family == "Mistral" else ""] * 2
    for layer, kind in enumerate(types):
        lens = cache.paged.seq_lens[layer, :, 0]
        if kind == "sliding_attention":
            assert 4 <= lens.min() <= lens.max() <= 4 + 4
        else:
            assert lens.tolist() == [length + 9 for length in LENGTHS]
    assert cache.get_seq_length() == max(LENGTHS) + 9


@pytest.mark.parametrize(
    ("policy", "every"), [(SnapKV(observe=8), 4), (ExpectedAttention(scope="head"), 0), (AdaKV(observe=8), 0)]
)
def test_compressed_tokens_are_those_of_the_reference_model(policy, every):
    """Two ways to the same lists: transformers with this cache, and the loop of kvops.models."""
    theirs = make()
    config = theirs.config
    ours = Llama(
        LlamaConfig(
            61, 48, 32, 2, 6, 2, 8, config.rms_norm_eps, config.rope_parameters["rope_theta"], None, 128, False
        ),
        {name: weight.detach() for name, weight in theirs.state_dict().items()},
    )
    compression = Compression(ratio=3, policy=policy, protect_first=2, protect_last=4, every=every)
    expected = generate(ours, prompts(), max_new_tokens=10, compression=compression)
    # The loop's cache has blocks of 16.
    cache = KVOpsCache(theirs.config, max_tokens=96, compression=compression)
    assert new_tokens(theirs, prompts(), past_key_values=cache) == expected.tokens
    uncompressed = sum(cache.paged.blocks_for(length + 9) for length in LENGTHS)
    stats = cache.stats()
    assert stats.bytes_in_use <= stats.bytes_per_block * uncompressed / 2
    assert cache.get_seq_length() == max(LENGTHS) + 9
    assert cache.paged.next_positions.tolist() == [length + 9 for length in LENGTHS]


def test_freed_blocks_let_a_small_pool_go_on():
    model = make()
    compression = Compression(ratio=4, protect_first=2, protect_last=4)
    tight = KVOpsCache(model.config, max_tokens=128, num_blocks=4 * 16, block_size=4)
    row = prompts()[2:]  # 64 tokens: 16 blocks in each of 4 lists, all there are
    with pytest.raises(kvops.OutOfBlocksError):
        new_tokens(model, row, past_key_values=tight)
    roomy = KVOpsCache(model.config, max_tokens=128, num_blocks=4 * 16, block_size=4, compression=compression)
    new_tokens(model, row, past_key_values=roomy)
    assert roomy.stats().blocks_in_use <= 4 * 4 + 4 * 3
    roomy.reset()
    assert roomy.stats().blocks_in_use == 0
    assert roomy.get_seq_length() == 0


def test_prompt_lookup_of_one_sequence_takes_refused_drafts_back():
    model = make()
    row = [prompts()[1] * 2]
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4)
    plain = new_tokens(model, row)
    assert new_tokens(model, row, past_key_values=cache, prompt_lookup_num_tokens=3) == plain
    assert cache.paged.seq_lens.unique().tolist() == [len(row[0]) + 9]


def test_drafts_are_gone_before_the_prompt_is_compressed():
    model = make()
    compression = Compression(ratio=2, protect_first=2, protect_last=4)
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4, compression=compression)
    row = [prompts()[1] * 2]  # 82 tokens: 21 blocks in each of 4 lists
    assert len(new_tokens(model, row, past_key_values=cache, prompt_lookup_num_tokens=3)[0]) == 10
    assert cache.paged.next_positions.tolist() == [82 + 9]
    assert cache.stats().blocks_in_use <= 4 * 21 // 2 + 4 * 4


def test_a_second_turn_adds_to_what_is_there():
    model = make("Mistral")
    first, more = prompts()[0], prompts()[1][:7]
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4)
    said = new_tokens(model, [first], past_key_values=cache)[0]
    longer = [first + said + more]
    assert new_tokens(model, longer, past_key_values=cache) == new_tokens(model, longer)


def test_a_pass_that_was_broken_off_leaves_nothing_behind():
    """The next pass went on as the broken one: at its positions, with its padding."""
    model = make()
    cache = KVOpsCache(model.config, max_tokens=128, block_size=4)
    rows = left_padded(prompts()[:2])
    broken = {"input_ids": torch.ones(2, 5, dtype=torch.int64)}

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        model(**rows, past_key_values=cache)
        for layer in model.model.layers:
            hook = layer.self_attn.o_proj.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**broken, past_key_values=cache)
            hook.remove()
            if layer is model.model.layers[-1]:  # all layers had attended: for the cache the pass was whole
                cache.crop(-5)
            new = torch.tensor([[7, 8, 9], [9, 8, 7]])
            mask = torch.cat((rows["attention_mask"], torch.ones_like(new)), 1)
            whole = torch.cat((rows["input_ids"], new), 1)
            expected = model(input_ids=whole, attention_mask=mask).logits[:, -3:]
            got = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(got, expected)
            assert cache.get_seq_length() == whole.shape[1]
            cache.crop(-3)


def test_kernels_read_the_cache(backend, device):
    model = make("Gemma2", num_hidden_layers=1).to(device)
    cache = KVOpsCache(model.config, max_tokens=16, block_size=8)
    rows = [row[:length] for row, length in zip(prompts(), (7, 3), strict=False)]
    inputs = {name: value.to(device) for name, value in left_padded(rows).items()}
    options = {"max_new_tokens": 2, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), model.generate(**inputs, **options))


def test_misuse_is_told_apart():
    model = make()
    ids = torch.ones(1, 4, dtype=torch.int64)

    def cache(**options):
        return KVOpsCache(model.config, max_tokens=16, **options)

    with pytest.raises(RuntimeError, match=r"no gradient: generate under torch.no_grad"):
        model(ids, past_key_values=cache())
    with pytest.raises(NotImplementedError, match="num_beams=1"):
        model.generate(ids, past_key_values=cache(), num_beams=2, max_new_tokens=3, do_sample=False)
    with pytest.raises(RuntimeError, match="paged: expected a cache that a model has run with"):
        cache().stats()
    used = cache()
    with torch.no_grad():
        model(ids, past_key_values=used)
        with pytest.raises(ValueError, match="key_states: expected a batch of 1, as before, got 2"):
            model(ids.repeat(2, 1), past_key_values=used)
    with pytest.raises(ValueError, match="tokens_to_remove: expected a number from 0 down, got 2"):
        used.crop(2)
    with pytest.raises(ValueError, match=r"tokens_to_remove: expected at least -4, got -5$"):
        used.crop(-5)
    with pytest.raises(TypeError, match=r"compression: expected a kvops.policies.Compression, got 4"):
        cache(compression=4)
    with pytest.raises(TypeError, match=r"config: expected that of a model, model.config, got LlamaForCausalLM"):
        KVOpsCache(model, max_tokens=16)
    for sizes in ({"max_tokens": 0}, {"max_tokens": 16, "num_blocks": 0}, {"max_tokens": 16, "block_size": 0}):
        with pytest.raises(ValueError, match=f"{list(sizes)[-1]}: expected at least 1, got 0"):
            KVOpsCache(model.config, **sizes)
    with pytest.raises(ValueError, match="compression: expected chunk=0"):
        cache(compression=Compression(chunk=4))
    with pytest.raises(ValueError, match="compression: expected every=0 with ExpectedAttention"):
        cache(compression=Compression(every=4, policy=ExpectedAttention()))
    with pytest.raises(ValueError, match="compression: expected a policy without recital, as a cache cannot make"):
        cache(compression=Compression(policy=KVzip()))
    sliding = make("Mistral")
    trimmed = KVOpsCache(sliding.config, max_tokens=16, block_size=2)
    with torch.no_grad():
        sliding(torch.ones(1, 9, dtype=torch.int64), past_key_values=trimmed)
    with pytest.raises(ValueError, match="tokens_to_remove: expected at least 0, got -1: what earlier tokens saw"):
        trimmed.crop(-1)
    model.set_attn_implementation("eager")
    with pytest.raises(AttributeError, match="attn_implementation='kvops'"), torch.no_grad():
        model(ids, past_key_values=cache())
    config = transformers.LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ValueError, match="config: expected layers of full or sliding attention, got linear_attention"):
        KVOpsCache(config, max_tokens=16)
