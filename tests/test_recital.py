"""Reciting a prompt: the attention of the recital gives scores, and nothing of it stays in the cache."""

from itertools import pairwise

import pytest
import torch
from oracle import attention, attention_mask
from test_generate import prompts_of, tiny_model

import kvops
from kvops.generation.generate import generate, stream
from kvops.generation.passes import new_cache, prefill, read_prompt, recite
from kvops.policies import ByHeart, Compression, KVzip, Recital, SnapKV

LENGTH = 45
RECITAL = Recital(chunk=16, lead=3, ask=(5, 6))


def read(model, prompt, **sizes):
    cache = new_cache(model, max_batch=sizes.pop("max_batch", 1), max_tokens=64, block_size=4, **sizes)
    with torch.no_grad():
        prefill(model, cache, torch.tensor([prompt]), 0)
    return cache


def recited_by(model, prompt, recital):
    """By definition, float64: prompt and recital as one text, once for each chunk; per layer most and total."""
    model, length = model.double(), len(prompt)
    found = [torch.zeros(2, 1, 2, length, dtype=torch.float64) for _ in range(model.config.num_layers)]
    for first in range(0, length, recital.chunk):
        stop = min(first + recital.chunk, length)
        text = [*prompt, *recital.ask, *prompt[max(0, first - recital.lead) : stop]]

        def attend(layer, q, k, v, first=first, stop=stop):
            out, _, p = attention(q, k, v, mask=attention_mask(q.shape[1], q.shape[1], causal=True))
            paid = p.unflatten(1, (2, 3))[:, :, :, length:, first:stop]
            found[layer][..., first:stop] = torch.stack((paid.amax((2, 3)), paid.sum((2, 3))))
            return out

        with torch.no_grad():
            model(torch.tensor([text]), torch.arange(len(text))[None], attend)
    model.float()
    return found


def scores_of(cache, layer, width, row=0):
    return cache.scores[cache.block_tables[layer, row].long()].flatten(1)[:, :width]


@pytest.mark.parametrize("recital", [RECITAL, Recital(chunk=15), Recital(lead=0)], ids=["asked", "bare", "at once"])
def test_a_key_is_worth_the_most_attention_that_its_chunk_s_recital_paid(recital):
    model = tiny_model()
    (prompt,) = prompts_of(LENGTH)
    exact = recited_by(model, prompt, recital)
    with torch.no_grad():
        found = recite(model, read(model, prompt), torch.tensor([prompt]), 0, recital)
        cache = new_cache(model, max_batch=1, max_tokens=64)
        prefill(model, cache, torch.tensor([prompt]), 0, KVzip(recital=recital))
    for layer, one in enumerate(exact):
        torch.testing.assert_close(torch.stack(found[layer]), one.float(), rtol=1e-3, atol=1e-5)
        assert scores_of(cache, layer, LENGTH).equal(found[layer].most[0])


def test_kernels_find_what_the_eager_path_finds(monkeypatch):
    model = tiny_model(num_layers=1)
    prompt = prompts_of(LENGTH)[0][:19]
    cache, tokens = read(model, prompt), torch.tensor([prompt])
    with torch.no_grad():
        eager = recite(model, cache, tokens, 0, Recital(chunk=12, lead=2))
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        kernels = recite(model, cache, tokens, 0, Recital(chunk=12, lead=2))
    for one, other in zip(eager[0], kernels[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_recital_leaves_no_trace(compressed):
    """Lengths, positions, blocks in use, every byte of keys, values and scores of every row."""
    model = tiny_model()
    (prompt,) = prompts_of(LENGTH)
    cache = read(model, prompt, max_batch=3)
    if compressed:
        for layer in range(2):
            cache.set_scores(layer, torch.rand(1, 2, LENGTH), rows=0)
        cache.evict(20, rows=0, protect_last=16)
    cache.fork(0, into=1)
    cache.unshare(1)
    names = ("k_cache", "v_cache", "positions", "scores", "block_tables", "seq_lens", "next_positions")
    held = [getattr(cache, name).view(torch.uint8).clone() for name in names]
    in_use = cache.stats().blocks_in_use
    with torch.no_grad():
        found = recite(model, cache, torch.tensor([prompt]), 1, RECITAL, start=29 if compressed else 0)
    assert all(one.isfinite().all() and one.any() for layer in found for one in layer)
    for name, old in zip(names, held, strict=True):
        assert getattr(cache, name).view(torch.uint8).equal(old), name
    assert cache.stats().blocks_in_use == in_use


def test_what_compressed_heads_lack_is_not_attended_to():
    """Heads of several lengths against dense attention with the lost keys masked."""
    model = tiny_model()
    (prompt,) = prompts_of(LENGTH)
    cache = read(model, prompt)
    for layer in range(2):
        cache.set_scores(layer, torch.rand(1, 2, LENGTH))
    cache.evict(30, protect_last=16)
    width = int(cache.seq_lens.max())
    assert cache.seq_lens.unique().numel() > 1
    with torch.no_grad():
        found = recite(model, cache, torch.tensor([prompt]), 0, Recital(chunk=16, lead=3), start=29)
    text = torch.tensor([prompt[26:]])
    mask = attention_mask(19, LENGTH + 19, causal=True)

    def attend(layer, q, k, v):
        seen, keys, values = [], torch.zeros(1, LENGTH, 2, 8), torch.zeros(1, LENGTH, 2, 8)
        for head in range(2):
            kept = cache.gather(layer, 0, head)
            keys[0, kept[2].long(), head], values[0, kept[2].long(), head] = kept[0], kept[1]
            seen.append(mask & torch.zeros(LENGTH + 19, dtype=torch.bool).index_fill(0, kept[2].long(), True))
            seen[-1][:, LENGTH:] = mask[:, LENGTH:]
        whole = torch.stack(seen).repeat_interleave(3, 0)[None]
        out, _, p = attention(q, torch.cat((keys, k), 1), torch.cat((values, v), 1), mask=whole)
        exact = p.unflatten(1, (2, 3))[..., 29:LENGTH].amax((2, 3))
        torch.testing.assert_close(found[layer].most[..., width - 16 :], exact.float(), rtol=1e-3, atol=1e-5)
        assert not torch.stack(found[layer])[..., : width - 16].any()
        return out.float()

    with torch.no_grad():
        model(text, LENGTH + torch.arange(19)[None], attend)


def test_a_prompt_in_chunks_is_recited_chunk_by_chunk():
    """With nothing evicted: each key keeps what the recital right behind its own chunk found."""
    model = tiny_model()
    (prompt,) = prompts_of(LENGTH)
    cache = new_cache(model, max_batch=1, max_tokens=64)
    edges = [0, 20, 40, LENGTH]
    with torch.no_grad():
        read_prompt(
            model, cache, torch.tensor([prompt]), 0, Compression(ratio=1, chunk=20, policy=KVzip(recital=RECITAL))
        )
        for start, stop in pairwise(edges):
            part = recite(model, read(model, prompt[:stop]), torch.tensor([prompt[:stop]]), 0, RECITAL, start=start)
            for layer, one in enumerate(part):
                ours = scores_of(cache, layer, LENGTH)[:, start:stop]
                torch.testing.assert_close(ours, one.most[0, :, start:], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [KVzip, ByHeart])
@pytest.mark.parametrize("options", [{}, {"chunk": 25}, {"chunk": 25, "every": 6}], ids=str)
def test_a_batch_is_generated_as_each_prompt_alone_with_and_without_drafts(options, kind):
    model = tiny_model()
    prompts = [prompts_of(80)[0], prompts_of(12)[0] * 4, prompts_of(9)[0]]
    policy = kind(recital=Recital(chunk=32))
    compression = Compression(ratio=3, policy=policy, protect_first=2, protect_last=6, **options)
    cache = new_cache(model, max_batch=3, max_tokens=120)
    together = generate(model, prompts, max_new_tokens=14, compression=compression, cache=cache).tokens
    assert together == [
        generate(model, [prompt], max_new_tokens=14, compression=compression).tokens[0] for prompt in prompts
    ]
    drafted = generate(model, prompts, max_new_tokens=14, compression=compression, draft="prompt_lookup", min_ngram=1)
    assert drafted.tokens == together
    assert cache.stats().blocks_in_use == 0


def test_positions_and_budget_are_those_without_a_recital():
    model = tiny_model()
    held = {}
    for policy in (SnapKV(), KVzip(recital=RECITAL)):
        cache = new_cache(model, max_batch=1, max_tokens=120)
        steps = stream(model, prompts_of(90), cache=cache, compression=Compression(ratio=3, policy=policy))
        for _ in range(4):
            next(steps)
        held[type(policy)] = cache.next_positions.tolist(), cache.stats().blocks_in_use
    assert held[SnapKV] == held[KVzip]
    assert held[KVzip][0] == [93]


def test_a_forked_row_is_recited_and_judged_without_harm_to_the_other():
    model = tiny_model()
    (prompt,) = prompts_of(LENGTH)
    cache = read(model, prompt[:20], max_batch=2)
    cache.fork(0, into=1)
    before = scores_of(cache, 0, 20).clone()
    compression = Compression(ratio=1, policy=KVzip(recital=RECITAL))
    rest = torch.tensor([prompt])
    with torch.no_grad():
        kvops.generation.passes._read_chunk(model, cache, rest, 20, 1, compression.policy, None)
        alone = recite(model, read(model, prompt), rest, 0, RECITAL, start=20)
    assert scores_of(cache, 0, 20).equal(before)
    torch.testing.assert_close(scores_of(cache, 0, LENGTH, 1)[:, 20:], alone[0].most[0, :, 20:], rtol=1e-3, atol=1e-5)
    assert cache.seq_lens[:, 0].unique().tolist() == [20]


def test_near_the_last_position_chunks_become_shorter_and_behind_it_there_are_none():
    model = tiny_model(max_positions=64)
    prompt = prompts_of(56)[0]
    recital = Recital(chunk=32, lead=3)
    passes = list(recital.passes(torch.tensor([prompt]), 8))
    assert [(tokens.shape[1], part.start, part.stop) for tokens, part in passes][:3] == [
        (5, 0, 5),
        (8, 5, 10),
        (8, 10, 15),
    ]
    compression = Compression(policy=KVzip(recital=recital), protect_last=4)
    assert len(generate(model, [prompt], max_new_tokens=8, compression=compression).tokens[0]) == 8
    with pytest.raises(ValueError, match=r"^tokens: expected 4 positions behind them .* a prompt of 61"):
        generate(model, [prompts_of(61)[0]], max_new_tokens=3, compression=compression)


def test_windows_are_refused_unless_everything_is_within_them():
    policy = KVzip(recital=RECITAL)
    compression = Compression(policy=policy)
    with pytest.raises(ValueError, match=r"^policy: expected one without recital, as the model's window of 30 tokens"):
        generate(tiny_model(sliding_window=30), prompts_of(LENGTH), max_new_tokens=2, compression=compression)
    narrow, wide = tiny_model(), tiny_model(sliding_window=LENGTH + 21)
    tokens = [generate(m, prompts_of(LENGTH), max_new_tokens=4, compression=compression).tokens for m in (narrow, wide)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"chunk": 0}, "chunk: expected at least 1, got 0"), ({"lead": -1}, "lead: expected at least 0, got -1")],
)
def test_a_recital_refuses_bad_arguments_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Recital(**arguments)
