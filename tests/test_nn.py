"""kvops.nn.Attention against attention written out in float64 and torch's module."""

import copy

import pytest
import torch
from oracle import assert_accurate, attention_mask
from oracle import attention as exact_attention
from rounding import rounded

import kvops
from kvops.nn import Attention
from kvops.policies import SnapKV

HIDDEN, HEADS, KV_HEADS = 24, 6, 2
VARIANTS = {
    "causal": {},
    "bidirectional window": {"causal": False, "window": 3, "bias": True, "rope": None},
    "window, softcap, sinks": {"window": 4, "softcap": 2.0, "sinks": True, "out_bias": True},
    "norms, wide heads": {"qk_norm_eps": 1e-6, "head_dim": 10, "scale": 0.3},
}


def make(device="cpu", **options) -> Attention:
    module = Attention(HIDDEN, HEADS, **{"num_kv_heads": KV_HEADS, "rope": 100.0, **options})
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.to(device)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Written out once more: a rotation that turned backwards was noticed by nobody."""
    half = x.shape[-1] // 2
    turned = torch.empty_like(x)
    turned[..., :half] = x[..., :half] * cos - x[..., half:] * sin
    turned[..., half:] = x[..., :half] * sin + x[..., half:] * cos
    return turned


def written_out(module: Attention, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and the gradients of its sum of squares, in float64."""
    weights = {name: p.detach().cpu().double().requires_grad_() for name, p in module.named_parameters()}
    x = x.detach().cpu().double()

    def project(name, source):
        bias = weights.get(f"{name}_proj.bias")
        return torch.nn.functional.linear(source, weights[f"{name}_proj.weight"], bias)

    q, k, v = (project(name, x).unflatten(-1, (-1, module.head_dim)) for name in "qkv")
    if module.q_norm is not None:
        q, k = (
            torch.nn.functional.rms_norm(y, y.shape[-1:], weights[f"{name}_norm.weight"], 1e-6)
            for name, y in (("q", q), ("k", k))
        )
    if module.rope is not None:
        angles = torch.arange(x.shape[1])[:, None] * module.rope.cpu().double()
        cos, sin = (turn[:, None] for turn in (angles.cos(), angles.sin()))
        q, k = (turned(y, cos, sin) for y in (q, k))
    left = -1 if module.window is None else module.window - 1
    right = -1 if module.causal else left
    mask = attention_mask(x.shape[1], x.shape[1], causal=module.causal, window_left=left, window_right=right)
    out, _, _ = exact_attention(
        q, k, v, mask=mask, scale=module.scale, softcap=module.softcap, sinks=weights.get("sinks")
    )
    out = project("o", out.flatten(2))
    return out.detach(), list(torch.autograd.grad(out.square().sum(), list(weights.values())))


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_attention_written_out(variant, backend, device):
    module, x = make(device, **VARIANTS[variant]), torch.randn(2, 7, HIDDEN, device=device)
    out = module(x)
    gradients = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    (exact, exact_gradients), (same, same_gradients) = written_out(module, x), rounded(x.dtype, written_out, module, x)
    assert_accurate(out, exact, same)
    names = [name for name, _ in module.named_parameters()]
    for name, *values in zip(names, gradients, exact_gradients, same_gradients, strict=True):
        assert_accurate(*values, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_that_is_cast_keeps_its_rotary_frequencies(dtype, device):
    """They were rounded with the parameters: in bfloat16 tokens a thousand positions apart turned to wrong places."""
    module = make(device)
    frequencies = module.rope.clone()
    for cast in (copy.deepcopy(module).to(dtype), copy.deepcopy(module).to(device, dtype).float()):
        assert cast.rope.dtype == torch.float32
        assert torch.equal(cast.rope, frequencies)
        assert cast.rope.device == cast.q_proj.weight.device


def test_a_module_made_on_the_meta_device_has_its_rotary_frequencies(device):
    """They became whatever was in memory: ``to_empty`` empties buffers, and no state dict brings them back."""
    module, x = make(device), torch.randn(2, 5, HIDDEN, device=device)
    with torch.device("meta"):
        inside, assigned = Attention(HIDDEN, HEADS, num_kv_heads=KV_HEADS, rope=100.0), make("meta")
        assert inside(x.to("meta")).shape == x.shape
    inside, outside = inside.to_empty(device=device), make("meta").to_empty(device=device)
    for loaded, assign in ((inside, False), (outside, False), (assigned, True)):
        loaded.load_state_dict(module.state_dict(), assign=assign)
        assert torch.equal(loaded(x), module(x))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_projections_of_torchs_module_are_taken_over(causal, bias):
    theirs = torch.nn.MultiheadAttention(HIDDEN, HEADS, bias=bias, batch_first=True).eval()
    x = torch.randn(2, 5, HIDDEN)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(Attention.from_torch(theirs, causal=causal)(x), expected)
    if not causal:
        context = torch.randn(2, 3, HIDDEN)
        expected, _ = theirs(x, context, context, need_weights=False)
        torch.testing.assert_close(Attention.from_torch(theirs)(x, context=context), expected)


def test_a_mask_and_a_bias_are_those_of_torchs_module():
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    ours, x = Attention.from_torch(theirs, causal=False), torch.randn(3, 5, 16)
    hidden = torch.rand(5, 5) < 0.4
    hidden.fill_diagonal_(False)
    added = torch.randn(5, 5)
    for mask, bias in ((hidden, ~hidden), (added, added)):  # in torch's module True hides
        torch.testing.assert_close(ours(x, bias=bias), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])
        packed = {
            "cu_seqlens": torch.tensor([0, 5, 10, 15], dtype=torch.int32),
            "max_seqlen": 5,
            "bias": bias.repeat(3, 1),
        }
        torch.testing.assert_close(ours(x.flatten(0, 1), **packed).view_as(x), ours(x, bias=bias))


def test_packed_sequences_attend_to_themselves(backend, device):
    module, lengths = make(device, window=4), (5, 0, 1, 3)
    x = torch.randn(sum(lengths), HIDDEN, device=device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    packed = module(x, cu_seqlens=cu_seqlens, max_seqlen=5)
    alone = [module(part[None])[0] for part in x.split(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone))


def make_cache(layers=1, **options) -> kvops.PagedKVCache:
    head_dim = HIDDEN // HEADS
    options = {"num_blocks": 64, "max_batch": 2, "max_tokens": 32, "block_size": 2, **options}
    return kvops.PagedKVCache(num_layers=layers, num_kv_heads=KV_HEADS, head_dim=head_dim, **options)


@torch.no_grad()
def test_prompts_and_steps_through_a_cache_are_the_dense_pass(backend, device):
    module, x = make(device, window=6, softcap=3.0, sinks=True), torch.randn(2, 9, HIDDEN, device=device)
    whole, cache = module(x), make_cache(device=device)
    outs = [module(x[:, :5], cache.extend(5), cache=cache, prefill=True)]
    q_lens = torch.tensor([2, 1], dtype=torch.int32, device=device)
    outs.append(module(x[:, 5:7], cache.extend(2, q_lens=q_lens), cache=cache, q_lens=q_lens))
    torch.testing.assert_close(torch.cat(outs, 1)[0], whole[0, :7])
    torch.testing.assert_close(torch.cat(outs, 1)[1, :6], whole[1, :6])
    last = module(x[1:, 6:7], cache.extend(1, rows=[1]), cache=cache, rows=[1])
    torch.testing.assert_close(last, whole[1:, 6:7])


@torch.no_grad()
def test_a_policy_scores_prompts_and_what_decoding_sees():
    policy, x = SnapKV(observe=3, pool=1), torch.randn(2, 12, HIDDEN)
    module, cache = make(policy=policy, layer=1), make_cache(layers=2)
    module(x[:, :11], cache.extend(11), cache=cache, prefill=True)
    slots = cache.scores[cache.block_tables[1].long()].flatten(2)[..., :12]
    q, k, _ = module.project(x[:, :11], x[:, :11], *module._angles(torch.arange(11)))
    _, lse = kvops.flash_attention(q, k, k, causal=True)
    prompt = kvops.attention_scores(q, k, lse, causal=True, query_start=8)
    torch.testing.assert_close(slots[..., :11], prompt)
    module(x[:, 11:], cache.extend(1), cache=cache)
    slots = cache.scores[cache.block_tables[1].long()].flatten(2)[..., :12]
    added = slots - torch.nn.functional.pad(prompt, (0, 1))
    torch.testing.assert_close(added.sum(-1), torch.full((2, KV_HEADS), HEADS / KV_HEADS))  # probabilities of a group


def test_misuse_is_told_apart():
    module, x = make(), torch.randn(1, 4, HIDDEN)
    cache = make_cache()
    positions = cache.extend(4)
    cases = [
        (lambda: Attention(10, 3), r"hidden_size: expected a multiple of num_heads 3, got 10"),
        (lambda: Attention(12, 3, num_kv_heads=2), r"num_kv_heads: expected a divisor of num_heads 3, got 2"),
        (lambda: Attention(9, 3, rope=10.0), r"head_dim: expected an even size"),
        (lambda: Attention(8, 2, rope=torch.ones(3)), r"rope: expected shape \[head_dim / 2\] = \[2\], got \[3\]"),
        (lambda: make(rope=-10.0), r"rope: expected a finite base above 0, or the frequencies, got -10.0"),
        (lambda: make(head_dim=0), r"head_dim: expected at least 1, got 0"),
        (
            lambda: module(x, positions[0, :-1]),
            r"positions: .* each token of x, \[1, 4\], got shape \[3\]",
        ),
        (lambda: module(x[0]), r"x: expected 3 dimensions"),
        (lambda: module(x, prefill=True), r"cache: expected a PagedKVCache along with prefill"),
        (lambda: module(x, max_seqlen=4), r"cu_seqlens: expected together with max_seqlen"),
        (lambda: module(x, context=x), r"context: expected None in a module with rotary embedding"),
        (lambda: module(x, cache=cache), r"positions: expected what cache.extend\(\) returned"),
        (lambda: make(causal=False)(x, positions, cache=cache), r"cache: expected None for attention that is not"),
        (lambda: module(x, positions, cache=cache, bias=torch.zeros(4)), "bias: expected None along with a cache"),
        (lambda: make(dropout=1.0), r"dropout: expected a probability from 0 to below 1, got 1.0"),
        (
            lambda: make(dropout=0.1)(x, positions, cache=cache),
            r"cache: expected None in training with dropout 0.1, got a cache: call eval\(\)",
        ),
        (
            lambda: Attention.from_torch(torch.nn.MultiheadAttention(8, 2, kdim=4)),
            r"module: expected keys and values of width 8 .* kdim 4",
        ),
        (lambda: Attention.from_torch(torch.nn.MultiheadAttention(8, 2, add_zero_attn=True)), r"add_zero_attn off"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: make(window=2.5), r"window: expected an int, got 2.5"),
        (lambda: make(policy="snapkv"), r"policy: expected a kvops.policies.Policy, such as SnapKV\(\), got 'snapkv'"),
        (lambda: Attention.from_torch(torch.nn.Linear(1, 1)), r"module: expected a torch.nn.MultiheadAttention, got L"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with torch.no_grad(), pytest.raises(ValueError, match=r"positions: expected prompts from position 0 on"):
        module(x.repeat(2, 1, 1), positions + 1, cache=cache, prefill=True)
    with torch.no_grad(), pytest.raises(ValueError, match=r"q_lens: expected None along with prefill"):
        module(x.repeat(2, 1, 1), positions, cache=cache, prefill=True, q_lens=torch.ones(2, dtype=torch.int32))


def test_attention_drops_in_training_mode():
    module = Attention.from_torch(torch.nn.MultiheadAttention(HIDDEN, HEADS, dropout=0.5))
    x, ends = torch.randn(2, 7, HIDDEN), torch.tensor([0, 7, 14], dtype=torch.int32)
    torch.manual_seed(5)
    dropped = module(x)
    torch.manual_seed(5)
    torch.testing.assert_close(module(x.flatten(0, 1), cu_seqlens=ends, max_seqlen=7).view_as(x), dropped)
    assert not torch.allclose(module(x), dropped)
    whole = module.eval()(x)
    assert torch.equal(module(x), whole)
    module.dropout = 0.0
    assert torch.equal(module.train()(x), whole)
