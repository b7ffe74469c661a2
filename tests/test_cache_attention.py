"""Attention over PagedKVCache: the slots that eviction and marks keep, scores, float8 and int8."""

import pytest
import torch
from cache_helpers import HEADS, LAYERS, ROWS, SIZE, blocks, feed, make_cache, slots_of
from oracle import assert_accurate, attention
from paged_lists import QUANTISED
from rounding import rounded


@pytest.mark.parametrize(("window", "chunk", "ragged"), [(-1, 0, False), (9, 0, True), (-1, 13, True)])
def test_decoding_after_eviction_attends_to_exactly_the_kept_slots(backend, device, window, chunk, ragged):
    """Two sequences, two layers, per-head lengths: against all tokens with the evicted ones masked out."""
    heads, group, tokens, dim = 2, 3, 25, 24
    sizes = {"num_kv_heads": heads, "head_dim": dim, "v_head_dim": dim, "max_batch": 2, "max_tokens": 48}
    cache = make_cache(device, num_blocks=96, **sizes)
    k, v = torch.randn(2, LAYERS, 2, tokens + 3, heads, dim).half().float()
    prompt = cache.extend(tokens)
    for layer in range(LAYERS):
        cache.append(layer, k[layer, :, :tokens].to(device), v[layer, :, :tokens].to(device), prompt)
        cache.set_scores(layer, torch.rand(2, heads, tokens, device=device))
    cache.evict([14, 9], protect_first=2, protect_last=4)
    assert cache.seq_lens.unique().numel() > 1  # the heads differ, else this shows little
    assert ((cache.seq_lens + SIZE - 1) // SIZE).sum((0, 2)).tolist() == [14, 9]
    kept = {key: cache.gather(*key)[2].tolist() for key in [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]}

    counts = [3, 2] if ragged else [3, 3]
    q_lens = torch.tensor(counts, dtype=torch.int32, device=device) if ragged else None
    new = cache.extend(3, q_lens=q_lens)
    assert new.tolist() == [[25, 26, 27]] * 2
    for layer in range(LAYERS):
        cache.append(layer, k[layer, :, tokens:].to(device), v[layer, :, tokens:].to(device), new, q_lens=q_lens)
        q = torch.randn(2, 3, heads * group, dim)
        cache.scores.zero_()
        reach = {"window_left": window, "chunk": chunk}
        out = cache.attend(layer, q.to(device), q_lens=q_lens, **reach, accumulate="sum").cpu()
        allowed = torch.zeros(2, heads, 3, tokens + 3, dtype=torch.bool)
        for b in range(2):
            for h in range(heads):
                allowed[b, h, :, kept[layer, b, h]] = True
        allowed[..., tokens:] = torch.ones(3, 3, dtype=torch.bool).tril()
        if window >= 0:
            allowed &= torch.arange(tokens, tokens + 3)[:, None] - torch.arange(tokens + 3) <= window
        if chunk:  # the first of the new tokens is the last of the second chunk
            places = torch.arange(tokens + 3) // chunk
            allowed &= places[tokens:, None] == places
        mask = allowed.repeat_interleave(group, 1)
        exact = attention(q, k[layer], v[layer], mask=mask)[0]
        same = rounded(q.dtype, lambda *inputs, mask=mask: attention(*inputs, mask=mask)[0], q, k[layer], v[layer])
        for b, count in enumerate(counts):
            assert_accurate(out[b, :count], exact[b, :count], same[:, b, :count])
            assert not out[b, count:].any()
            for h in range(heads):
                # Every query of the group spends a probability of one.
                given = sum(slots_of(cache, cache.scores, layer, b, h))
                assert given == pytest.approx(count * group, rel=1e-5)


def test_scores_are_set_in_list_order_and_not_past_the_end(device):
    cache = make_cache(device)
    feed(cache, 6, rows=[0, 1], q_lens=[6, 3])
    cache.set_scores(1, torch.arange(24.0, device=device).view(2, HEADS, 6) + 1, rows=slice(0, 2))
    assert slots_of(cache, cache.scores, 1, 0, 1) == [7, 8, 9, 10, 11, 12]
    assert slots_of(cache, cache.scores, 1, 1, 0) == [13, 14, 15]
    assert cache.scores.count_nonzero() == 2 * 6 + 2 * 3
    cache.set_scores(0, torch.ones(1, HEADS, 2, device=device), rows=0)
    assert slots_of(cache, cache.scores, 0, 0, 0) == [1, 1, 0, 0, 0, 0]


def test_marked_slots_of_a_layer_are_kept_and_the_others_blocks_are_free(backend, device):
    cache = make_cache(device)
    feed(cache, 11)
    kept = torch.rand(2, HEADS, 9, device=device) < 0.4
    kept[0, 0] = False
    before = [[slots_of(cache, cache.k_cache, 1, row, head) for head in range(HEADS)] for row in (0, 2)]
    cache.keep(1, kept, rows=[0, 2])
    for i, row in enumerate((0, 2)):
        for head in range(HEADS):
            marks = [*kept[i, head].tolist(), True, True]  # what lies behind the marks stays
            expected = [key for key, stays in zip(before[i][head], marks, strict=True) if stays]
            assert slots_of(cache, cache.k_cache, 1, row, head) == expected
    assert cache.seq_lens[0].unique().tolist() == [11] == cache.seq_lens[1, 1].unique().tolist()
    lens = cache.seq_lens.cpu().clone()
    assert cache.stats().blocks_in_use == sum(blocks(int(n)) for n in lens.flatten())
    assert cache.next_positions.tolist() == [11] * ROWS
    cache.fork(2, 1)
    cache.keep(1, torch.zeros(1, HEADS, 9, dtype=torch.bool, device=device), rows=2)
    assert torch.equal(cache.seq_lens[:, 1].cpu(), lens[:, 2]), "a row that shares blocks keeps its own"
    with pytest.raises(ValueError, match=r"kept: expected shape .* got \[1, 2, 9\]"):
        cache.keep(0, kept[:1])
    with pytest.raises(ValueError, match="kept: expected at most 40 slots"):
        cache.keep(0, torch.ones(1, HEADS, 41, dtype=torch.bool, device=device), rows=0)


@pytest.mark.parametrize(
    ("k_dtype", "v_dtype"),
    [*((dtype, None) for dtype in QUANTISED), (torch.int8, torch.float32), (torch.float32, torch.int8)],
)
def test_a_float8_or_int8_cache_scales_every_head_of_every_layer(backend, device, k_dtype, v_dtype):
    """What is read back is what was stored, times the scale: powers of two, so that nothing else is lost."""
    k_scale = torch.tensor([[0.5, 2.0], [4.0, 0.25]], device=device)
    scales = {"k_scale": k_scale} if k_dtype in QUANTISED else {}
    scales |= {"v_scale": 2.0} if (v_dtype or k_dtype) in QUANTISED else {}
    cache = make_cache(device, dtype=k_dtype, v_dtype=v_dtype, v_head_dim=3, **scales)
    assert str(v_dtype or k_dtype) in repr(cache)
    positions = cache.extend(5, rows=[0])
    k, v = torch.randint(-3, 4, (2, LAYERS, 1, 5, HEADS, 3), device=device).float()
    v *= 2
    if "k_scale" not in scales:
        k_scale = torch.ones_like(k_scale)
    for layer in range(LAYERS):
        scale = k_scale[layer][:, None]
        cache.append(layer, k[layer] * scale, v[layer], positions, rows=[0])
        q = torch.randn(1, 1, HEADS, 3, device=device)
        out = cache.attend(layer, q, rows=[0])
        for head in range(HEADS):
            stored = cache.gather(layer, 0, head)
            assert torch.equal(stored[0].float(), k[layer, 0, :, head])
            assert torch.equal(stored[1].float() * scales.get("v_scale", 1.0), v[layer, 0, :, head])
            p = (q[0, :, head] @ (k[layer, 0, :, head] * scale[head]).T * 3**-0.5).softmax(-1)
            torch.testing.assert_close(out[0, :, head], p @ v[layer, 0, :, head])
