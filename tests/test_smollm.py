"""The real model: SmolLM2-135M-Instruct from its GGUF, beside transformers with the same file."""

import copy
from pydoc_data.topics import topics

import pytest
import torch
from oracle import assert_accurate
from torch import Tensor

from kvops.generation.evaluate import agreement, forced_logits
from kvops.generation.generate import generate
from kvops.generation.passes import new_cache, prefill
from kvops.models.config import LlamaConfig
from kvops.models.llama import Llama
from kvops.models.loading import find_default_model, load
from kvops.ops.attention import flash_attention
from kvops.policies import AdaKV, Compression

pytestmark = [pytest.mark.model, pytest.mark.xdist_group("model")]


@pytest.fixture(scope="module")
def loaded():
    return load(progress=False)


@pytest.fixture(scope="module")
def model(loaded) -> Llama:
    return Llama(loaded.config, loaded.weights)


@pytest.fixture(scope="module")
def transformers_model():
    from transformers import AutoModelForCausalLM

    path = find_default_model()
    theirs = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs.eval()


@pytest.fixture(scope="module")
def prompts(loaded) -> list[list[int]]:
    """Four chats of different lengths; the last asks for a quotation."""
    passage = topics["context-managers"]
    quoted = " ".join(topics["with"][20:800].split())
    questions = [
        "What is the capital of France?",
        f"{topics['lambda']}\n\nWhat does the text above describe?",
        f"{passage[:600]}\n\nSummarise the text above in one sentence.",
        f"Correct the spelling of the following text and give the whole text back:\n\n{quoted}",
    ]
    tokenizer = loaded.tokenizer
    return [tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": text}])) for text in questions]


@pytest.fixture(scope="module")
def greedy(model, transformers_model, prompts) -> list[list[int]]:
    """64 tokens behind each prompt, all at once. Each is the likeliest that transformers sees behind the prompt alone
    and the tokens before it: they are the ones that it would generate."""
    answers = generate(model, prompts, max_new_tokens=64).tokens
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = transformers_model(torch.tensor([prompt + answer]), logits_to_keep=65).logits
        assert logits[0, :-1].argmax(-1).tolist() == answer
    return answers


def test_gguf_loads_to_what_transformers_loads(loaded, transformers_model):
    expected = transformers_model.state_dict()
    assert expected.pop("lm_head.weight").data_ptr() == expected["model.embed_tokens.weight"].data_ptr()
    assert loaded.weights.keys() == expected.keys()
    for name in expected:
        assert torch.equal(loaded.weights[name], expected[name]), name
    epsilon = transformers_model.config.rms_norm_eps
    assert loaded.config == LlamaConfig(
        49152, 576, 1536, 30, 9, 3, 64, epsilon, 100000.0, None, 8192, tie_embeddings=True
    )
    assert loaded.name == "SmolLM2-135M-Instruct.Q4_1"


def test_logits_agree_with_transformers_over_512_tokens(model, transformers_model, loaded):
    tokens = torch.tensor([loaded.tokenizer.encode(topics["types"])[:512]])
    assert tokens.shape[1] == 512

    def attend(layer, q, k, v):
        return flash_attention(q, k, v, causal=True)[0]

    with torch.no_grad():
        ours = model.logits(model(tokens, torch.arange(512)[None], attend))
        theirs = transformers_model(tokens).logits
    assert (ours - theirs).abs().max() < 1e-3


def test_logits_over_the_paged_cache_agree_with_transformers(model, transformers_model, loaded):
    tokens = torch.tensor(loaded.tokenizer.encode(topics["types"])[:256])
    with torch.no_grad():
        theirs = transformers_model(tokens[None]).logits[0]
        cache = new_cache(model, max_batch=1, max_tokens=256)
        hidden = prefill(model, cache, tokens[None, :100], 0)
    ours = forced_logits(model, cache, hidden[:, -1:], tokens[100:], chunk=48)
    assert (ours - theirs[99:-1]).abs().max() < 1e-3


def test_64_greedy_tokens_are_those_of_transformers_in_a_ragged_batch_and_alone(model, prompts, greedy):
    assert [len(answer) for answer in greedy] == [64] * len(prompts)
    assert generate(model, prompts[3:], max_new_tokens=64).tokens == greedy[3:]


def test_drafts_change_none_of_the_64_greedy_tokens_in_a_ragged_batch_and_alone(model, prompts, greedy):
    assert generate(model, prompts, max_new_tokens=64, draft="prompt_lookup").tokens == greedy
    alone = generate(model, prompts[3:], max_new_tokens=64, draft="prompt_lookup")
    assert alone.tokens == greedy[3:]
    assert alone.stats.accepted_per_step > 1  # a quotation is looked up


def test_transformers_with_kvops_gives_the_greedy_tokens_alone_and_in_a_padded_batch(
    transformers_model, prompts, greedy
):
    import kvops.integrations.transformers as kvops_transformers

    usual = transformers_model.config._attn_implementation
    transformers_model.set_attn_implementation(kvops_transformers.enable())
    try:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"max_new_tokens": 32, "do_sample": False}
        together = transformers_model.generate(ids, attention_mask=mask, **options)
        alone = transformers_model.generate(torch.tensor(prompts[:1]), **options | {"max_new_tokens": 16})
    finally:
        transformers_model.set_attn_implementation(usual)
    assert together[:, longest:].tolist() == [answer[:32] for answer in greedy]
    assert alone[0, -16:].tolist() == greedy[0][:16]


def test_drafts_do_not_change_what_a_compressed_cache_says(model, prompts):
    compression = Compression(ratio=2, protect_last=16)
    plain = generate(model, prompts[2:], max_new_tokens=32, compression=compression)
    drafted = generate(model, prompts[2:], max_new_tokens=32, compression=compression, draft="prompt_lookup")
    assert drafted.tokens == plain.tokens
    assert drafted.stats.accepted > 0


def test_compression_keeps_most_of_what_the_full_cache_says(model, loaded):
    """Half of the blocks gone, and the model still agrees with itself; random eviction would not do."""
    tokens = loaded.tokenizer.encode(topics["try"])[:700]
    prompt, rest = tokens[:600], torch.tensor(tokens[600:])
    cache = new_cache(model, max_batch=1, max_tokens=720)
    compression = Compression(ratio=2)
    with torch.no_grad():
        hidden = prefill(model, cache, torch.tensor([prompt]), 0, compression.policy)[:, -1:]
        full_cache = new_cache(model, max_batch=1, max_tokens=720)
        prefill(model, full_cache, torch.tensor([prompt]), 0)
        compression.apply(cache, [600])
    assert cache.stats().blocks_in_use <= cache.blocks_for(600) / 2
    lengths = cache.seq_lens[:, 0]
    assert lengths.min() < lengths.max()  # heads are compressed at their own rates
    full = forced_logits(model, full_cache, hidden, rest).argmax(-1)
    kept = forced_logits(model, cache, hidden, rest)
    assert agreement(kept, full) > 0.8


def logits_under_a_mask(theirs, prompt: list[int], rest: list[int], kept: Tensor) -> Tensor:
    """What transformers says of ``rest`` and of the token after it, where ``kept`` bool [layers, KV heads, prompt] are
    the keys that each head still sees: its own full cache, and a mask in its own attention."""
    from transformers import AttentionInterface

    new = torch.ones(len(rest), len(rest), dtype=torch.bool).tril()

    def attend(module, query, key, value, attention_mask, scaling, **_):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        old = kept[module.layer_idx].repeat_interleave(group, 0)[:, None].expand(-1, len(rest), -1)
        seen = torch.cat([old, new.expand(len(old), -1, -1)], -1)
        weights = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("masked_by_hand", attend)
    usual = theirs.config._attn_implementation
    cache = theirs(torch.tensor([prompt])).past_key_values
    theirs.set_attn_implementation("masked_by_hand")
    try:
        return theirs(torch.tensor([rest]), past_key_values=cache).logits[0]
    finally:
        theirs.set_attn_implementation(usual)


@torch.no_grad()
def test_a_ragged_cache_says_what_transformers_says_under_a_mask_of_the_same_keys(model, transformers_model, loaded):
    """AdaKV evicts for each head on its own; transformers keeps every key and hides the same ones."""
    tokens = loaded.tokenizer.encode(topics["with"])[:216]
    prompt, rest = tokens[:200], tokens[200:]
    compression = Compression(policy=AdaKV(), protect_last=8)
    cache = new_cache(model, max_batch=1, max_tokens=240)
    hidden = prefill(model, cache, torch.tensor([prompt]), 0, compression.policy)[:, -1:]
    compression.apply(cache, [len(prompt)])
    lengths = cache.seq_lens[:, 0]
    assert cache.stats().blocks_in_use <= cache.blocks_for(len(prompt)) / 4
    assert (lengths.amin(1) < lengths.amax(1)).any()
    kept = torch.zeros(*lengths.shape, len(prompt), dtype=torch.bool)
    for layer, head in torch.cartesian_prod(*map(torch.arange, lengths.shape)).tolist():
        kept[layer, head, cache.gather(layer, 0, head)[2].long()] = True
    assert torch.equal(kept.sum(-1), lengths)

    ours = forced_logits(model, cache, hidden, torch.tensor([*rest, 0]), chunk=5)[1:]
    theirs = logits_under_a_mask(transformers_model, prompt, rest, kept)
    exact = logits_under_a_mask(copy.deepcopy(transformers_model).double(), prompt, rest, kept)
    assert_accurate(ours, exact, theirs, "logits")
    everything = logits_under_a_mask(transformers_model, prompt, rest, torch.ones_like(kept))
    assert (everything - theirs).abs().max() > 1  # what was evicted mattered


@pytest.mark.parametrize("batch", [1, 8])
def test_drafts_change_nothing_over_many_prompts_with_compression_on(model, loaded, batch):
    """Eight texts, half of them to be repeated; the cache is halved behind the prompt and again every 8 tokens."""
    tokenizer, texts = loaded.tokenizer, []
    for number, topic in enumerate(("with", "try", "lambda", "types", "if", "class", "del", "import")):
        passage = " ".join(topics[topic].split()[: 24 + 6 * number])
        texts.append(f"Repeat this text: {passage}" if number % 2 else f"{passage}\n\nWhat is this text about?")
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.encode(tokenizer.apply_chat_template(chat)) for chat in chats]
    compression = Compression(ratio=2, protect_last=16, every=8)
    options = {"max_new_tokens": 20, "compression": compression}
    accepted = 0
    for start in range(0, 8 if batch == 8 else 2, batch):
        part = prompts[start : start + batch]
        drafted = generate(model, part, draft="prompt_lookup", min_ngram=1, **options)
        assert drafted.tokens == generate(model, part, **options).tokens
        accepted += drafted.stats.accepted
    assert accepted > 2
