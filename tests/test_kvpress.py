"""kvpress (NVIDIA) and kvops choose the same keys, for the policies that both have. Skipped where kvpress is absent."""

import pytest
import torch

import kvops
from kvops.policies import TOVA, AdaKV, Compression, ExpectedAttention, KeyDiff, Knorm, Prefill, SnapKV, Streaming

kvpress = pytest.importorskip("kvpress")
modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
transformers = pytest.importorskip("transformers")

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
