"""kvpress (NVIDIA) and kvops choose the same keys, for the policies that both have. Skipped where kvpress is absent."""

from itertools import product

import pytest
import torch

import kvops
from kvops.generation.passes import new_cache, read_prompt
from kvops.policies import (
    TOVA,
    AdaKV,
    Compression,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVzip,
    Prefill,
    Recital,
    SnapKV,
    Streaming,
)

kvpress = pytest.importorskip("kvpress")
modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
transformers = pytest.importorskip("transformers")

from test_transformers import make_model  # noqa: E402

from kvops.integrations.kvpress import _which, evicting  # noqa: E402
from kvops.integrations.transformers import Decoder, KVOpsCache  # noqa: E402

LENGTH, WINDOW, SINKS, RATIO = 96, 8, 4, 4
CUT = 1 - 1 / RATIO


@pytest.fixture(scope="module")
def attention():
    """A layer of random weights, what it saw and the two forms in which kvpress and kvops are shown it."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_hidden_layers=1
    )
    config._attn_implementation = "sdpa"
    rotary = modeling.LlamaRotaryEmbedding(config)
    module = modeling.LlamaAttention(config, layer_idx=0)
    module.rotary_emb = rotary
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    hidden = torch.randn(1, LENGTH, 96)
    cos, sin = rotary(hidden, torch.arange(LENGTH)[None])
    split = [
        projection(hidden).unflatten(-1, (-1, 16)).transpose(1, 2) for projection in (module.q_proj, module.k_proj)
    ]
    q, k = modeling.apply_rotary_pos_emb(*split, cos, sin)
    v = module.v_proj(hidden).unflatten(-1, (-1, 16))
    seen = [x.detach() for x in (q.transpose(1, 2), k.transpose(1, 2), v)]
    lse = kvops.flash_attention(*seen, causal=True)[1]
    shown = (module, hidden, k.detach(), v.detach().transpose(1, 2), None, {"position_embeddings": (cos, sin)})
    return shown, Prefill(*seen, lse, rope=rotary.inv_freq.float())


def kept_by_kvops(seen, policy, protect_first, protect_last):
    cache = kvops.PagedKVCache(
        num_layers=1, num_kv_heads=2, head_dim=16, num_blocks=2 * LENGTH, max_batch=1, max_tokens=LENGTH, block_size=1
    )
    cache.append(0, seen.k, seen.v, cache.extend(LENGTH))
    cache.set_scores(0, policy.score(seen))
    Compression(ratio=RATIO, policy=policy, protect_first=protect_first, protect_last=protect_last).apply(
        cache, [LENGTH]
    )
    return [set(cache.gather(0, 0, head)[2].tolist()) for head in range(2)]


@pytest.mark.parametrize(
    ("press", "policy", "protect_first", "protect_last"),
    [
        (lambda: kvpress.KnormPress(CUT), Knorm(), 0, 0),
        (lambda: kvpress.KeyDiffPress(CUT), KeyDiff(), 0, 0),
        (lambda: kvpress.TOVAPress(CUT), TOVA(), 0, 1),
        (lambda: kvpress.StreamingLLMPress(CUT, n_sink=SINKS), Streaming(scope="head"), SINKS, 0),
        (
            lambda: kvpress.SnapKVPress(CUT, window_size=WINDOW, kernel_size=5),
            SnapKV(scope="head", observe=WINDOW, pool=5, pooling="mean"),
            *(0, WINDOW),
        ),
        (
            lambda: kvpress.ExpectedAttentionPress(CUT, n_sink=SINKS, n_future_positions=64),
            ExpectedAttention(scope="head", sinks=SINKS, horizon=64),
            *(SINKS, 0),
        ),
    ],
    ids=["knorm", "keydiff", "tova", "streaming", "snapkv", "expected-attention"],
)
@torch.no_grad()
def test_the_same_keys_are_kept(attention, press, policy, protect_first, protect_last):
    shown, seen = attention
    theirs = press().score(*shown).topk(LENGTH // RATIO, dim=-1).indices[0]
    assert kept_by_kvops(seen, policy, protect_first, protect_last) == [set(head.tolist()) for head in theirs]


@torch.no_grad()
def test_adakv_gives_each_head_the_same_share(attention):
    shown, seen = attention
    press = kvpress.AdaKVPress(kvpress.SnapKVPress(CUT, window_size=WINDOW, kernel_size=5), alpha_safeguard=0.2)
    press.compress(*shown)
    _, heads, places = shown[0].masked_key_indices
    theirs = [set(range(LENGTH)) - set(places[heads == head].tolist()) for head in range(2)]
    ours = kept_by_kvops(seen, AdaKV(observe=WINDOW, pool=5, pooling="mean"), 0, WINDOW)
    assert ours == theirs
    assert len(ours[0]) != len(ours[1]), "the heads of this layer should differ, or the test shows nothing"


PROMPT, BLOCK = 40, 4


@torch.no_grad()
def test_kvzip_keeps_the_same_keys_of_all_layers_and_heads():
    """A prompt that is recited at once, behind the same instruction."""
    model, ids = make_model("Llama"), torch.randint(1, 61, (1, PROMPT))
    model.set_attn_implementation("sdpa")
    ask = torch.tensor([[7, 8, 9]])
    press = kvpress.KVzipPress(CUT, n_sink=SINKS)
    press._context_ids, press._cache = ids, transformers.DynamicCache()
    press._suffix_ids, press.context_length = ask[:, :0], PROMPT
    model(ids, past_key_values=press._cache)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
    press._perform_kvzip_compression(model, type("Tokenizer", (), {"encode": lambda *_, **__: ask}))
    theirs = {place: set(range(PROMPT)) for place in product(range(2), range(2))}
    for number, layer in enumerate(model.model.layers):
        _, heads, places = layer.self_attn.masked_key_indices
        for head, place in zip(heads.tolist(), places.tolist(), strict=True):
            theirs[number, head].remove(place)
    decoder = Decoder(model)
    cache = new_cache(decoder, max_batch=1, max_tokens=PROMPT, block_size=1)
    policy = KVzip(recital=Recital(ask=(7, 8, 9)))
    read_prompt(decoder, cache, ids, 0, Compression(RATIO, policy, protect_first=SINKS, protect_last=0))
    assert {place: set(cache.gather(place[0], 0, place[1])[2].tolist()) for place in theirs} == theirs
    assert len({len(kept) for kept in theirs.values()}) > 1


@pytest.mark.parametrize(
    "make_press",
    [
        lambda: kvpress.KnormPress(0.5),
        lambda: kvpress.ExpectedAttentionPress(0.7, n_sink=2, n_future_positions=8),
        lambda: kvpress.PyramidKVPress(0.5, window_size=4, beta=2),
        lambda: kvpress.ChunkPress(kvpress.SnapKVPress(0.6, window_size=2), chunk_length=14),
        lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(0.6, window_size=4)),
        lambda: kvpress.ComposedPress([kvpress.KnormPress(0.3), kvpress.StreamingLLMPress(0.4, n_sink=2)]),
        lambda: kvpress.PerLayerCompressionPress(kvpress.KnormPress(), [0.3, 0.8]),
        lambda: kvpress.ComposedPress(
            [kvpress.PerLayerCompressionPress(kvpress.KnormPress(), [0.3, 0.6]), kvpress.KeyDiffPress(0.2)]
        ),
        lambda: kvpress.PrefillDecodingPress(kvpress.KnormPress(0.5), None),
    ],
    ids=[
        *("knorm", "expected-attention", "pyramid-kv", "chunk", "ada-kv"),
        *("composed", "per-layer", "composed-per-layer", "prefill-only"),
    ],
)
@torch.no_grad()
def test_what_a_press_leaves_is_what_stays_in_the_cache(make_press):
    model = make_model("Llama")
    ids, press = torch.randint(1, 61, (2, PROMPT)), make_press()
    with evicting(model, press) as compression:
        cache = KVOpsCache(model.config, max_tokens=64, block_size=BLOCK, compression=compression)
        model(ids, past_key_values=cache)
    lens = cache.paged.seq_lens.clone()
    blocks = (lens + BLOCK - 1).div(BLOCK, rounding_mode="floor").sum()
    assert cache.stats().blocks_in_use == blocks < 0.7 * 8 * PROMPT / BLOCK
    model(ids[:, :1], past_key_values=cache)  # and on from there
    assert torch.equal(cache.paged.seq_lens, lens + 1)
    cache.crop(-1)
    torch.manual_seed(0)
    expected = left_by(make_press(), model, ids)
    for layer, row, head in product(range(2), range(2), range(2)):
        assert set(cache.paged.gather(layer, row, head)[2].tolist()) == expected[layer, row, head]


def left_by(press, model, ids) -> dict[tuple[int, int, int], set[int]]:
    """The positions that the press leaves, by layer, row and head, in a run of transformers alone."""
    model.set_attn_implementation("sdpa")
    press.post_init_from_model(model)
    theirs, found = transformers.DynamicCache(), {}

    def record(module, args, kwargs, output):
        layer = theirs.layers[module.layer_idx]
        keys = layer.keys
        module.masked_key_indices = None
        positions = {"cache_position": torch.arange(PROMPT), "past_key_values": theirs}
        press.forward_hook(module, args, kwargs | positions, (None, None))
        left = layer.keys
        for row, head in product(range(2), range(2)):
            same = (keys[row, head][:, None] == left[row, head]).all(-1).any(1)
            found[module.layer_idx, row, head] = set(same.nonzero().flatten().tolist())
        if module.masked_key_indices is not None:
            for row, head, place in zip(*(index.tolist() for index in module.masked_key_indices), strict=True):
                found[module.layer_idx, row, head].discard(place)
            module.masked_key_indices = None

    hooks = [layer.self_attn.register_forward_hook(record, with_kwargs=True) for layer in model.model.layers]
    model(ids, past_key_values=theirs)
    for hook in hooks:
        hook.remove()
    return found


def test_the_same_key_twice_counts_twice():
    keys = torch.tensor([[[[1.0], [2.0], [1.0], [3.0], [1.0]]]])
    assert _which(keys, keys[:, :, [3, 4, 0]])[0, 0].tolist() == [True, False, True, True, False]
    assert _which(keys, keys[:, :, []])[0, 0].tolist() == [False] * 5


@torch.no_grad()
def test_presses_that_do_more_than_select_are_refused():
    model, ids = make_model("Llama"), torch.randint(1, 61, (2, PROMPT))

    def run(press, **inputs):
        with evicting(model, press) as compression:
            cache = KVOpsCache(model.config, max_tokens=64, compression=compression)
            model(ids, past_key_values=cache, **inputs)

    with pytest.raises(ValueError, match="press: expected a press of kvpress, got str"):
        run("knorm")
    with pytest.raises(ValueError, match="press: expected one that needs no matrix of attention"):
        run(kvpress.ObservedAttentionPress(0.5))
    with pytest.raises(ValueError, match="press: expected one that selects keys and values as they are"):
        run(kvpress.KeyRerotationPress(kvpress.KnormPress(0.5)))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="attention_mask: expected prompts of one length"):
        run(kvpress.KnormPress(0.5), attention_mask=mask)


class Spoiling(kvpress.KnormPress):
    """Selects keys, and writes into what it was given."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        left = super().compress(module, hidden_states, keys.clone(), values.clone(), attentions, kwargs)
        keys.zero_()
        values.zero_()
        return left


class ValuesChanged(kvpress.KnormPress):
    def compress(self, *args):
        keys, values = super().compress(*args)
        return keys, values * 2


class ValuesSwapped(kvpress.KnormPress):
    def compress(self, *args):
        keys, values = super().compress(*args)
        return keys, values.flip(2)


class InPlace(kvpress.KnormPress):
    """As ThinK does: changes the keys that it was given, and returns them."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys.mul_(0.5), values


class Around(kvpress.BasePress):
    """Leaves everything to another press."""

    def __init__(self, press):
        self.press = press

    def compress(self, *args):
        return self.press.compress(*args)


def logits_with(press, model, ids) -> torch.Tensor:
    with evicting(model, press) as compression:
        cache = KVOpsCache(model.config, max_tokens=64, block_size=BLOCK, compression=compression)
        model(ids, past_key_values=cache)
        return model(ids[:, :1], past_key_values=cache).logits


@torch.no_grad()
def test_what_a_press_writes_into_its_keys_and_values_is_lost():
    model, ids = make_model("Llama"), torch.randint(1, 61, (2, PROMPT))
    torch.testing.assert_close(logits_with(Spoiling(0.5), model, ids), logits_with(kvpress.KnormPress(0.5), model, ids))


@pytest.mark.parametrize(
    "make_press",
    [
        lambda: kvpress.ThinKPress(0.5, window_size=4),
        lambda: kvpress.MergingPress(kvpress.KnormPress(0.5)),
        lambda: kvpress.KeyRerotationPress(kvpress.KnormPress(0.5)),
        lambda: ValuesChanged(0.5),
        lambda: ValuesSwapped(0.5),
        lambda: InPlace(0.5),
    ],
    ids=["think", "merging", "rerotation", "values", "swapped-values", "in-place"],
)
@torch.no_grad()
def test_presses_that_change_keys_or_values_are_refused(make_press):
    """ThinK changes keys in place and was compared with a view of itself; values were never looked at."""
    with pytest.raises(ValueError, match="press: expected one that selects keys and values as they are"):
        logits_with(make_press(), make_model("Llama"), torch.randint(1, 61, (2, PROMPT)))


@pytest.mark.parametrize(
    "make_press",
    [
        lambda: kvpress.KVzipPress(0.5),
        lambda: Around(kvpress.DecodingPress(kvpress.KnormPress(0.5))),
        lambda: kvpress.ComposedPress([kvpress.DecodingPress(kvpress.KnormPress(0.5))]),
        lambda: kvpress.DecodingPress(kvpress.AdaKVPress(kvpress.KnormPress(0.5))),
        lambda: kvpress.BasePress(),
    ],
    ids=["kvzip", "inner-decoding", "composed-decoding", "ada-kv-while-decoding", "base"],
)
def test_presses_that_cannot_be_shown_what_they_want_are_refused(make_press):
    """Their compress() was called on the prompt, whatever they do at other times."""
    expected = r"press: expected one (that acts once|with a compress|that keeps the same number)"
    with pytest.raises(ValueError, match=expected):
        logits_with(make_press(), make_model("Llama"), torch.randint(1, 61, (2, PROMPT)))


def decoding_presses():
    """SnapKV pools neighbours, which a press leaves in the order of their scores and kvops in that of the text: it acts
    once here. The others do not depend on the order."""
    yield lambda: kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=4, target_size=20)
    yield lambda: kvpress.DecodingPress(
        kvpress.SnapKVPress(window_size=3, kernel_size=3), compression_interval=9, target_size=16
    )
    yield lambda: kvpress.PrefillDecodingPress(
        kvpress.KnormPress(0.5), kvpress.DecodingPress(kvpress.KeyDiffPress(), compression_interval=3, target_size=12)
    )
    yield lambda: kvpress.CompressionRatioDecodingPress(
        kvpress.KnormPress(), compression_interval=4, target_compression_ratio=0.5
    )


@pytest.mark.parametrize("make_press", list(decoding_presses()), ids=["knorm", "snapkv", "prefill-too", "ratio"])
@torch.no_grad()
def test_presses_that_act_while_decoding_choose_what_stays(make_press):
    """Step by step the logits are those of transformers' cache, which the press itself compresses."""
    model = make_model("Llama")
    ids, more = torch.randint(1, 61, (2, PROMPT)), torch.randint(1, 61, (2, 14))
    press = make_press()
    with evicting(model, press) as compression:
        cache = KVOpsCache(model.config, max_tokens=64, block_size=BLOCK, compression=compression)
        got = [model(ids, past_key_values=cache).logits]
        for step in range(14):
            place = torch.full((2, 1), PROMPT + step)
            got.append(model(more[:, step : step + 1], position_ids=place, past_key_values=cache).logits)
    part = press.decoding_press if isinstance(press, kvpress.PrefillDecodingPress) else press
    assert compression.every == part.compression_interval
    assert not part.layer_step_counts  # reset for another run
    expected, lens = decoded_by(make_press(), model, ids, more)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert cache.paged.seq_lens.unique().tolist() == [lens]
    assert lens < PROMPT


def decoded_by(press, model, ids, more) -> tuple[list[torch.Tensor], int]:
    """Logits of the prompt and of each further token, and the length at the end, in a run of transformers alone."""
    model.set_attn_implementation("sdpa")
    press.post_init_from_model(model)
    theirs, seen = transformers.DynamicCache(), torch.arange(0)

    def act(module, args, kwargs, output):
        press.forward_hook(module, args, kwargs | {"cache_position": seen, "past_key_values": theirs}, (None, None))

    hooks = [layer.self_attn.register_forward_hook(act, with_kwargs=True) for layer in model.model.layers]
    logits = []
    for tokens in (ids, *more.split(1, 1)):
        first = int(seen[-1]) + 1 if len(seen) else 0
        seen = torch.arange(first, first + tokens.shape[1])
        logits.append(model(tokens, position_ids=seen.expand(2, -1), past_key_values=theirs).logits)
    for hook in hooks:
        hook.remove()
    return logits, theirs.layers[0].keys.shape[2]


@torch.no_grad()
def test_heads_of_different_length_are_refused_while_decoding():
    model, ids = make_model("Llama"), torch.randint(1, 61, (2, PROMPT))
    later = kvpress.DecodingPress(kvpress.KnormPress(), compression_interval=2, target_size=8)
    press = kvpress.PrefillDecodingPress(kvpress.AdaKVPress(kvpress.SnapKVPress(0.6, window_size=4)), later)
    with pytest.raises(ValueError, match="press: expected heads of one length, as a press that acts while decoding"):
        logits_with(press, model, ids)


def every_press():
    """One of each class of the package that a compression ratio alone makes."""
    for name in sorted(dir(kvpress)):
        kind = getattr(kvpress, name)
        if not isinstance(kind, type) or not issubclass(kind, kvpress.BasePress):
            continue
        for options in ({"compression_ratio": 0.5}, {"press": kvpress.KnormPress(0.5)}, {}):
            try:
                kind(**options)
            except Exception:
                continue
            yield pytest.param(lambda kind=kind, options=options: kind(**options), id=name)
            break


@pytest.mark.parametrize("make_press", list(every_press()))
@torch.no_grad()
def test_every_press_of_the_package_selects_or_is_refused(make_press):
    """What stays is what the press leaves in a run of transformers alone; no press is taken for one that selects."""
    model, ids = make_model("Llama"), torch.randint(1, 61, (2, PROMPT))
    try:
        press = make_press()
        torch.manual_seed(0)  # some project keys at random
        with evicting(model, press) as compression:
            cache = KVOpsCache(model.config, max_tokens=64, block_size=BLOCK, compression=compression)
            model(ids, past_key_values=cache)
    except (AssertionError, KeyError, OSError) as error:
        pytest.skip(f"needs a model of the hub: {error}")
    except ValueError as error:
        pytest.skip(f"refused: {error}")
    if "Random" in type(press).__name__:
        return
    torch.manual_seed(0)
    expected = left_by(make_press(), model, ids)
    for layer, row, head in product(range(2), range(2), range(2)):
        assert set(cache.paged.gather(layer, row, head)[2].tolist()) == expected[layer, row, head]
