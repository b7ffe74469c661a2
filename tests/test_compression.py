"""When and how far a cache is compressed: chunks with a bounded peak, budgets of any unit, judging while decoding."""

from dataclasses import replace

import pytest
import torch
from oracle import attention
from test_generate import prompts_of, reference_logits, tiny_model

import kvops
from kvops.generation.generate import generate, stream
from kvops.generation.passes import new_cache, read_prompt
from kvops.models.llama import rope_frequencies
from kvops.policies import POLICIES, Cached, Compression, KVCompress, Policy, Prefill, RecentQueries, SnapKV

HEADS, GROUP, D, SIZE = 2, 3, 16, 4


def filled_cache(tokens: int, device="cpu", batch: int = 1):
    """A cache of one layer with ``tokens`` random tokens in each row, and their q, k and v."""
    cache = kvops.PagedKVCache(
        num_layers=1,
        num_kv_heads=HEADS,
        head_dim=D,
        num_blocks=batch * HEADS * (tokens + SIZE),
        max_batch=batch,
        max_tokens=tokens + 40,
        block_size=SIZE,
        device=device,
    )
    torch.manual_seed(3)
    q, k, v = (torch.randn(batch, tokens, heads, D, device=device) for heads in (HEADS * GROUP, HEADS, HEADS))
    cache.append(0, k, v, cache.extend(tokens))
    return cache, q, k, v


@pytest.mark.parametrize("window", [-1, 11])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_policy_judges_a_cache_that_holds_all_as_it_judges_the_prompt(policy, window, backend, device):
    cache, q, k, v = filled_cache(45, device, batch=2)
    _, lse = kvops.flash_attention(q, k, v, causal=True, window_left=window)
    rope = 10000.0 ** (-torch.arange(0, D, 2, device=device) / D)
    whole = policy().score(Prefill(q, k, v, lse, window, rope=rope))
    # Seven keys of padding in front change nothing.
    cached = Cached(cache, 0, q, rows=slice(None), width=52, window_left=window, rope=rope)
    torch.testing.assert_close(policy().score(cached)[..., 7:], whole, rtol=2e-4, atol=1e-6)
    cached.judge(policy())
    stored = cache.scores[cache.block_tables[0].long()].flatten(2)[..., :45]
    torch.testing.assert_close(stored, whole, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("window", [-1, 20])
@pytest.mark.parametrize(("reduce", "group"), [("sum", "sum"), ("sum", "mean"), ("sumsq", "sum"), ("max", "max")])
def test_attention_over_heads_of_different_lengths_is_the_oracle_s(reduce, group, window, backend, device):
    """Heads that keep different keys, twelve new queries of which the last five are looked at."""
    cache, *_ = filled_cache(40, device)
    cache.set_scores(0, torch.rand(1, HEADS, 40, device=device))
    cache.evict(9)
    k, v = torch.randn(1, 12, HEADS, D, device=device), torch.randn(1, 12, HEADS, D, device=device)
    q = torch.randn(1, 12, HEADS * GROUP, D, device=device)
    cache.append(0, k, v, cache.extend(12))
    width = int(cache.seq_lens.max())
    assert int(cache.seq_lens.min()) < width
    seen = Cached(cache, 0, q, rows=slice(None), width=width, window_left=window)
    received = seen.attention(last=5, reduce=reduce, group=group)
    reduction = {"sum": lambda p: p.sum((0, 1)), "sumsq": lambda p: (p**2).sum((0, 1)), "max": lambda p: p.amax((0, 1))}
    for head in range(HEADS):
        keys, values, positions = cache.gather(0, 0, head)
        assert torch.equal(seen.positions[0, head, width - len(positions) :], positions)
        own = q[:, -5:, head * GROUP : (head + 1) * GROUP]
        at = torch.arange(47, 52)[:, None]
        mask = (positions.cpu() <= at) & (positions.cpu() >= (at - window if window >= 0 else 0))
        _, _, p = attention(own, keys[None, :, None], values[None, :, None], mask=mask)
        exact = reduction[reduce](p[0]) / (GROUP if group == "mean" else 1)
        actual = received[0, head].cpu()
        torch.testing.assert_close(actual[width - len(positions) :], exact.float().cpu(), rtol=1e-5, atol=1e-6)
        assert not actual[: width - len(positions)].any()


@pytest.mark.parametrize(
    ("dtype", "scales", "error"),
    [
        (torch.float8_e4m3fn, None, (1 / 16, 0.01)),
        (torch.float8_e4m3fn, torch.tensor([[0.5, 2.0]]), (1 / 16, 0.01)),
        (torch.int8, torch.tensor([[0.04, 0.05]]), (0, 0.026)),
        (torch.int8, "slots", (0, 0.02)),
    ],
)
def test_keys_and_values_of_a_float8_or_int8_cache_are_seen_at_their_size(dtype, scales, error):
    cache = kvops.PagedKVCache(
        num_layers=1,
        num_kv_heads=HEADS,
        head_dim=D,
        num_blocks=20,
        max_batch=1,
        max_tokens=40,
        dtype=dtype,
        **({"slot_scales": True} if scales == "slots" else {"k_scale": scales, "v_scale": scales}),
    )
    k, v = torch.randn(1, 20, HEADS, D), torch.randn(1, 20, HEADS, D)
    cache.append(0, k, v, cache.extend(20))
    seen = Cached(cache, 0, torch.randn(1, 1, HEADS * GROUP, D), rows=slice(None), width=20)
    for seen_side, side in ((seen.k, k), (seen.v, v)):
        torch.testing.assert_close(seen_side, side, rtol=error[0], atol=error[1])


def test_a_forked_row_is_judged_without_harm_to_the_other():
    cache, q, *_ = filled_cache(24, batch=2)
    cache.free(1)
    cache.fork(0, into=1)
    before = cache.scores[cache.block_tables[0, 0].long()].clone()
    Cached(cache, 0, q[:1], rows=slice(1, 2), width=24).judge(SnapKV())
    assert torch.equal(cache.scores[cache.block_tables[0, 0].long()], before)
    assert cache.scores[cache.block_tables[0, 1].long()].any()


def test_a_reduction_that_decoding_does_not_have_is_refused():
    cache, q, *_ = filled_cache(5)
    with pytest.raises(ValueError, match=r"^group: over a cache expected 'max' with reduce='max'"):
        Cached(cache, 0, q, rows=slice(None), width=5).attention(reduce="max", group="sum")


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_read_in_chunks_that_all_fit_is_the_prompt_read_whole(chunk, window):
    model = tiny_model(sliding_window=window)
    (prompt,) = prompts_of(45)
    cache = new_cache(model, max_batch=1, max_tokens=64)
    with torch.no_grad():
        hidden = read_prompt(model, cache, torch.tensor([prompt]), 0, Compression(ratio=1, chunk=chunk))
        logits = model.logits(hidden[0, 0])
    torch.testing.assert_close(logits, reference_logits(model, prompt)[-1], rtol=1e-4, atol=1e-4)
    assert cache.seq_lens.unique().tolist() == [45]


@pytest.mark.parametrize(
    ("policy", "length"), [("snapkv", 8192), *((name, 2048) for name in ("h2o", "knorm", "expected-attention"))]
)
def test_the_peak_of_a_long_prompt_is_the_budget_and_a_chunk(policy, length):
    """A pool of 1.2 times the budget is enough: not one block more exists."""
    model = tiny_model(num_layers=2, num_heads=2, num_kv_heads=2, hidden_size=16, max_positions=9000)
    (prompt,) = prompts_of(length)
    compression = Compression(ratio=8, policy=POLICIES[policy](), chunk=length // 8 * 3 // 16)
    budget = length // 8 // 16 * 4
    cache = new_cache(model, max_batch=1, max_tokens=length, num_blocks=int(1.2 * budget))
    with torch.no_grad():
        read_prompt(model, cache, torch.tensor([prompt]), 0, compression)
    stats = cache.stats()
    assert stats.blocks_in_use == budget
    assert int(cache.next_positions[0]) == length
    if policy in ("snapkv", "expected-attention"):
        assert stats.lengths.unique().numel() > 1


def test_h2o_in_chunks_adds_up_all_attention():
    """With nothing evicted on the way: the sum over the chunks is the sum over the prompt."""
    model = tiny_model()
    (prompt,) = prompts_of(40)
    scores = []
    for chunk in (0, 11):
        cache = new_cache(model, max_batch=1, max_tokens=40, block_size=8)
        compression = Compression(ratio=1, policy=POLICIES["h2o"](), chunk=chunk)
        with torch.no_grad():
            read_prompt(model, cache, torch.tensor([prompt]), 0, compression)
        scores.append(cache.scores[cache.block_tables.long()])
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("budget", "blocks"),
    [
        ({}, 100 // 4),
        ({"ratio": 5}, 20),
        ({"blocks": 30}, 30),
        ({"tokens": 20}, 4 * 3),
        ({"mib": 17 * 8 * 64 / 2**20}, 17),
        ({"mib": 18.9 * 8 * 64 / 2**20, "blocks": 60}, 18),
        ({"ratio": 2, "blocks": 60, "tokens": 96}, 48),
        ({"blocks": 1000}, 100),
        ({"blocks": 0}, 4 * 2),  # the protected tokens alone take two blocks of each list
    ],
)
def test_a_budget_of_any_unit_is_kept(budget, blocks):
    cache = kvops.PagedKVCache(
        num_layers=2, num_kv_heads=2, head_dim=8, num_blocks=100, max_batch=1, max_tokens=200, block_size=8
    )
    assert cache.bytes_per_block == 8 * 16 * 4
    positions = cache.extend(200)
    for layer in range(2):
        cache.append(layer, torch.randn(1, 200, 2, 8), torch.randn(1, 200, 2, 8), positions)
        cache.set_scores(layer, torch.rand(1, 2, 200))
    compression = Compression(protect_first=4, protect_last=8, **budget)
    assert compression.budget(cache, 200) == blocks
    compression.apply(cache, [200])
    assert cache.stats().blocks_in_use <= blocks
    assert cache.stats().blocks_in_use >= blocks - 4


@pytest.mark.parametrize("draft", [None, "prompt_lookup"])
def test_every_prompt_has_its_own_compression(draft):
    model = tiny_model()
    phrase = prompts_of(12)[0]
    prompts = [phrase * 4, prompts_of(60)[0], phrase * 3]
    each = [
        Compression(ratio=4, protect_last=6, every=5),
        None,
        Compression(tokens=12, policy=POLICIES["kv-compress"](), protect_last=6, chunk=10),
    ]
    together = generate(model, prompts, max_new_tokens=13, compression=each, draft=draft).tokens
    alone = [
        generate(model, [prompt], max_new_tokens=13, compression=own, draft=draft).tokens[0]
        for prompt, own in zip(prompts, each, strict=True)
    ]
    assert together == alone
    assert together != generate(model, prompts, max_new_tokens=13).tokens


def test_compressions_that_do_not_fit_the_prompts_or_each_other_are_refused():
    model, prompts = tiny_model(), prompts_of(9, 9)
    with pytest.raises(ValueError, match=r"^compression: expected one for all prompts or 2, one for each, got 1"):
        generate(model, prompts, compression=[None])
    again = [Compression(every=3, policy=KVCompress()), Compression(every=3, policy=SnapKV())]
    with pytest.raises(ValueError, match=r"^compression: expected policies that accumulate alike"):
        generate(model, prompts, compression=again)


@pytest.mark.parametrize(
    "policy", [name for name, kind in POLICIES.items() if kind.accumulate is None and kind().recital is None]
)
def test_while_decoding_a_policy_judges_all_keys_by_the_last_queries(policy, monkeypatch):
    """What the first eviction finds in the cache is what a reading of the same text would have left there."""
    model = tiny_model()
    (prompt,) = prompts_of(30)
    policy = POLICIES[policy]()
    compression = Compression(ratio=1, policy=policy, every=6)
    cache = new_cache(model, max_batch=1, max_tokens=64)
    steps = stream(model, [prompt], max_new_tokens=20, compression=compression, cache=cache)
    new = [next(steps)[0][0] for _ in range(7)]  # the prefill gave the first: six were decoded
    rope = rope_frequencies(model.config)
    ids = torch.tensor([prompt + new[:-1]])

    def attend(layer, q, k, v):
        out, lse = kvops.flash_attention(q, k, v, causal=True)
        exact = policy.score(Prefill(q, k, v, lse, layer=layer, num_layers=2, rope=rope))
        held = cache.scores[cache.block_tables[layer, 0].long()].flatten(1)[:, :36]
        torch.testing.assert_close(held, exact[0], rtol=2e-4, atol=2e-6)
        return out

    with torch.no_grad():
        model(ids, torch.arange(36)[None], attend)


def test_recent_queries_are_the_last_of_every_row():
    recent = RecentQueries(max_batch=2, size=4)
    text = [torch.arange(20.0), 100 + torch.arange(20.0)]

    def queries(row, start, stop):
        return text[row][start:stop].view(1, -1, 1, 1)

    recent.begin(0, 0, queries(0, 0, 6))
    recent.begin(0, 1, queries(1, 0, 1))
    recent.add(0, torch.cat((queries(0, 6, 9), queries(1, 1, 4))), torch.tensor([2, 1], dtype=torch.int32))
    assert recent.of(0, 0, 8).flatten().tolist() == [4, 5, 6, 7]
    assert recent.of(0, 1, 2).flatten().tolist() == [100, 101]
    recent.begin(0, 1, queries(1, 2, 4))
    assert recent.of(0, 1, 4).flatten().tolist() == [100, 101, 102, 103]


def test_a_generation_s_own_cache_is_no_larger_than_it_must_be(monkeypatch):
    """The pool of a compressed, chunked generation holds the budgets, the new tokens and one chunk."""
    model = tiny_model()
    pools = []
    build = kvops.PagedKVCache.__init__

    def watch(self, **sizes):
        pools.append(sizes["num_blocks"])
        build(self, **sizes)

    monkeypatch.setattr(kvops.PagedKVCache, "__init__", watch)
    prompts = prompts_of(160, 80)
    for policy in ("h2o", "tova"):
        compression = Compression(ratio=8, policy=POLICIES[policy](), protect_last=8, chunk=16, every=8)
        generate(model, prompts, max_new_tokens=16, compression=compression, draft="prompt_lookup", num_draft=3)
        assert pools[-1] <= 4 * ((176 + 96) // 8 // 16 + 2 * 2 + 1)
    generate(model, prompts, max_new_tokens=16, compression=replace(compression, chunk=0, every=0))
    assert pools[-1] < 4 * (176 + 96) // 16
    generate(model, prompts, max_new_tokens=16)
    assert pools[-1] == 4 * (176 + 96) // 16


class Oldest(Policy):
    """A user's own: the oldest tokens are worth most."""

    def score(self, seen):
        return -seen.positions.float()


def test_a_policy_of_one_s_own_is_one_method():
    cache, q, *_ = filled_cache(40)
    Cached(cache, 0, q, rows=slice(None), width=40).judge(Oldest())
    cache.evict(2 * 3, scope="head")
    assert cache.gather(0, 0, 1)[2].tolist() == list(range(12))


@pytest.mark.parametrize(
    ("request_", "length", "new", "expected"),
    [
        (
            Compression(ratio=4),
            37,
            4,
            "asked for ratio=4, 3 of the 12 blocks of 37 tokens; kept 12, which",
        ),
        (Compression(), 37, 4, "asked for ratio=4, 3 of the 12 blocks"),
        (
            Compression(mib=0.001, ratio=2),
            300,
            4,
            "asked for ratio=2, mib=0.001, 1 of the 76 blocks of 300",
        ),
        (Compression(blocks=5), 37, 4, "asked for blocks=5, 5 of the 12 blocks"),
        (Compression(ratio=8, chunk=16), 100, 4, "asked for ratio=8, 3 of the 28 blocks of 100 tokens; kept 12"),
        (Compression(tokens=48), 100, 30, "asked for tokens=48, 12 blocks; holds 20 at the end, because every=0"),
        (Compression(ratio=2), 100, 30, None),
        (Compression(tokens=48, every=8), 100, 31, None),
        (Compression(ratio=8, protect_last=8), 300, 4, None),
        (Compression(ratio=1), 10, 4, None),
    ],
)
def test_a_compression_that_cannot_be_had_is_in_the_statistics(request_, length, new, expected):
    """What was asked, what came, and why; ``generate`` took it as met."""
    model = tiny_model()
    unmet = generate(model, prompts_of(length), max_new_tokens=new, compression=request_).stats.unmet
    assert len(unmet) == (expected is not None)
    if expected:
        assert unmet[0].startswith(f"compression: prompt 0: {expected}")


def test_only_the_prompts_whose_compression_cannot_be_had_are_told():
    """A later compression that meets the request takes the sentence back."""
    model, compression = tiny_model(), Compression(ratio=4, protect_last=12)
    stats = generate(model, prompts_of(400, 20), max_new_tokens=4, compression=compression).stats
    assert [sentence.partition(":")[2].partition(":")[0] for sentence in stats.unmet] == [" prompt 1"]
    again = replace(compression, every=8)
    stats = generate(model, prompts_of(20), max_new_tokens=120, compression=again).stats
    assert stats.unmet == []
    assert stats.compression == pytest.approx(stats.full_blocks / stats.final_blocks)
    assert stats.compression > 2
    assert generate(model, prompts_of(20), max_new_tokens=20).stats.compression == 1
