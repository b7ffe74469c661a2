"""Attention over a paged cache of latents: the values are the first columns of the keys."""

import dataclasses
import itertools
from functools import partial

import paged_lists
import pytest
import torch
from paged_lists import Lists, make_lists, queries

import kvops

NUMBA = True
SCALE = 192**-0.5  # of DeepSeek-V3


def make_latents(lengths, value_dim, rotary=16, *, block_size=16, dtype=torch.float32, device="cpu") -> Lists:
    """Lists in a shuffled pool whose other slots are NaN; ``v_cache`` is a view of ``k_cache``."""
    lists = make_lists(lengths, block_size=block_size, head_dim=value_dim + rotary, dtype=dtype, device=device)
    return dataclasses.replace(lists, v_cache=lists.k_cache[..., :value_dim])


def attend(q, lists: Lists, **options):
    tensors = lists.k_cache, lists.block_tables, lists.seq_lens
    return kvops.paged_latent_attention(q, *tensors, value_dim=lists.v_cache.shape[-1], scale=SCALE, **options)


def latents(q, cache, values, block_tables, seq_lens, **options):
    """The operator with the arguments of paged attention."""
    given = {name: value for name, value in options.items() if value is not None}
    return kvops.paged_latent_attention(q, cache, block_tables, seq_lens, value_dim=values.shape[-1], **given)


def check(q, lists: Lists, *, cache_scale=None, **options) -> None:
    """Hold out and lse to attention in float64 over the same keys and values."""
    operator = partial(latents, cache_scale=cache_scale)
    paged_lists.check(q, lists, operator=operator, scale=SCALE, **options)


@pytest.mark.parametrize(
    ("value_dim", "rotary", "block_size", "group", "dtype"),
    [
        (512, 64, 16, 16, torch.bfloat16),
        (512, 64, 64, 128, torch.float16),
        (256, 32, 8, 3, torch.float32),
        (128, 64, 1, 1, torch.float16),
        (64, 16, 32, 20, torch.bfloat16),
        (96, 40, 24, 5, torch.float32),  # not powers of two
        (17, 1, 16, 2, torch.float32),
    ],
)
def test_decoding_reads_each_slot_as_key_and_value(backend, device, value_dim, rotary, block_size, group, dtype):
    lengths = [[0], [1], [block_size], [block_size + 1], [90]]
    lists = make_latents(lengths, value_dim, rotary, block_size=block_size, dtype=dtype, device=device)
    check(queries(lists, group, dtype=dtype), lists)


@pytest.mark.parametrize(("num_tokens", "group"), [(2, 5), (4, 16), (3, 40)])
@pytest.mark.parametrize("causal", [True, False])
def test_drafts_sit_at_the_end_of_the_lists(backend, device, num_tokens, group, causal):
    lists = make_latents([[70], [9], [num_tokens], [0]], 64, device=device)
    q_lens = torch.tensor([num_tokens, 1, num_tokens, 0], dtype=torch.int32, device=device)
    check(queries(lists, group, num_tokens), lists, causal=causal)
    check(queries(lists, group, num_tokens), lists, q_lens=q_lens, causal=causal)


def test_one_long_list_among_short_ones_and_several_heads(backend, device):
    lists = make_latents([[3, 700, 1], [0, 0, 17]], 32, device=device)
    check(queries(lists, 3, 2), lists)


def test_lists_that_fill_the_gpu_with_row_tiles_are_not_cut(backend, device):
    lists = make_latents([[n] for n in (5, 0, 40, 33, 1, 70)], 32, device=device)
    check(queries(lists, 128), lists)


def test_row_tiles_of_few_lists_are_cut_into_shares(backend, device):
    lists = make_latents([[700], [90]], 32, device=device)
    check(queries(lists, 40), lists)
    check(queries(lists, 10, 4), lists, schedule=kvops.paged_schedule(lists.seq_lens, 16, num_programs=23))


@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize(("value_dim", "group", "dtype"), [(32, 20, torch.float32), (64, 3, torch.float16)])
def test_packed_tokens_of_decoding_and_prefill(backend, device, value_dim, group, dtype, given_out):
    lists = make_latents([[70], [9], [0], [45], [300], [2]], value_dim, dtype=dtype, device=device)
    q_lens = torch.tensor([1, 5, 0, 12, 1, 4], dtype=torch.int32, device=device)  # the last: more tokens than slots
    for causal in (True, False):
        check(queries(lists, group, 12, dtype), lists, q_lens=q_lens, packed=True, given_out=given_out, causal=causal)
    one = torch.tensor([1, 1, 0, 1, 1, 1], dtype=torch.int32, device=device)
    check(queries(lists, group, 1, dtype), lists, q_lens=one, packed=True, given_out=given_out)


def test_a_result_is_written_into_what_is_given(backend, device):
    lists = make_latents([[90], [0], [17]], 32, device=device)
    check(queries(lists, 5, 3), lists, given_out=True)
    check(queries(lists, 128), lists, given_out=True, batch_invariant=True)


@pytest.mark.parametrize(("group", "num_tokens"), [(3, 1), (128, 1), (257, 2)])
def test_a_sequence_has_the_same_bits_in_any_batch(backend, device, group, num_tokens):
    """In one row tile, in several that are cut, and in so many that they are not (more than 512 rows)."""
    lists = make_latents([[300], [0], [31]], 32, device=device)
    q = queries(lists, group, num_tokens)
    check(q, lists, batch_invariant=True)
    out, lse = attend(q, lists, batch_invariant=True)
    order = torch.tensor([2, 0])
    some = dataclasses.replace(
        lists, block_tables=lists.block_tables[order], seq_lens=lists.seq_lens[order].contiguous()
    )
    schedule = kvops.paged_schedule(some.seq_lens, 16, num_programs=7, batch_invariant=True)
    for options in ({}, {"schedule": schedule}):
        own_out, own_lse = attend(q[order], some, batch_invariant=True, **options)
        assert torch.equal(own_out, out[order])
        assert torch.equal(own_lse, lse[order])
    own = dataclasses.replace(lists, block_tables=lists.block_tables[:1], seq_lens=lists.seq_lens[:1])
    assert torch.equal(attend(q[:1], own, batch_invariant=True)[0], out[:1])


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize(("group", "dtype"), [(3, torch.float16), (40, torch.float32)])
def test_caches_of_8_bits(backend, device, stored, group, dtype):
    """Cut lists, whole ones (128 heads of many lists) and packed tokens, with a scale for each head or one for all."""
    for lengths, scales in (([[300, 33], [0, 17]], (0.02, 0.07)), ([[n] for n in (5, 0, 40, 33, 1, 70)], (0.05,))):
        lists = make_latents(lengths, 32, device=device)
        by_slot = torch.ones(lists.k_cache.shape[:2])  # a block belongs to one head
        for b, h in itertools.product(range(len(lengths)), range(len(scales))):
            by_slot[lists.slots(b, h)] = scales[h]
        by_slot = by_slot[..., None].to(device)
        codes = paged_lists.quantise(lists.k_cache / by_slot, stored)
        wide = dataclasses.replace(lists, k_cache=codes.float() * by_slot, v_cache=codes[..., :32].float() * by_slot)
        given = torch.tensor(scales, device=device) if len(scales) > 1 else scales[0]
        q_lens = torch.tensor([2, 1, 0, 2, 1, 2][: len(lengths)], dtype=torch.int32, device=device)
        stored_lists, q = dataclasses.replace(lists, k_cache=codes), queries(lists, group, 2, dtype)
        check(q, wide, cache=stored_lists, cache_scale=given, q_lens=q_lens, packed=len(scales) == 1)


def test_lists_that_are_all_empty_give_zero_and_minus_infinity(backend, device):
    lists = make_latents([[0, 0], [0, 0]], 32, device=device)
    out, lse = attend(queries(lists, 2, 3), lists)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_a_softcap_and_the_schedule_of_another_number_of_programs(backend, device):
    lists = make_latents([[300], [41]], 32, device=device)
    for programs in (1, 3, 11):
        check(
            queries(lists, 4, 2), lists, softcap=2.0,
            schedule=kvops.paged_schedule(lists.seq_lens, 16, num_programs=programs),
        )  # fmt: skip


def test_a_uniform_cache_of_any_strides_gives_what_ragged_lists_give(backend, device):
    lens = torch.tensor([37, 0, 16], dtype=torch.int32, device=device)
    tables = torch.randperm(20, device=device)[:18].view(3, 6).int()
    wide = torch.full((20, 2, 8, 60), torch.nan, device=device)  # [blocks, heads, slots, columns and some more]
    wide[..., :48] = torch.randn(20, 2, 8, 48)
    cache = wide[..., :48].transpose(1, 2)
    q = torch.randn(3, 2, 12, 48, device=device)
    out, lse = kvops.paged_latent_attention(q, cache, tables, lens, value_dim=32, scale=SCALE)
    heads = torch.arange(2, device=device)[:, None]
    ragged = wide[..., :48].reshape(-1, 8, 48), (tables[:, None] * 2 + heads).int(), lens[:, None].expand(3, 2)
    for one, other in zip((out, lse), kvops.paged_latent_attention(q, *ragged, value_dim=32, scale=SCALE), strict=True):
        torch.testing.assert_close(one, other)


def test_it_is_paged_attention_with_a_view_of_the_keys_as_values(backend, device):
    lists = make_latents([[90], [7]], 64, dtype=torch.float16, device=device)
    q = queries(lists, 8, 2, torch.float16)
    for one, other in zip(attend(q, lists), kvops.paged_attention(q, *lists.arguments, scale=SCALE), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_absorbed_queries_give_attention_over_the_keys_and_values_that_a_latent_stands_for(backend, device):
    """DeepSeek-V2: keys are [latent @ up_keys, rotary], with one rotary part for all heads."""
    heads, nope, rotary, latent_dim, value_dim, length = 6, 24, 16, 32, 20, 45
    latent, rope = torch.randn(1, length, latent_dim, device=device), torch.randn(1, length, rotary, device=device)
    up_keys = torch.randn(heads, latent_dim, nope, device=device) / 5
    up_values = torch.randn(heads, latent_dim, value_dim, device=device) / 5
    q = torch.randn(1, 2, heads, nope + rotary, device=device)
    k = torch.cat([torch.einsum("bsl,hln->bshn", latent, up_keys), rope[:, :, None].expand(-1, -1, heads, -1)], -1)
    v = torch.einsum("bsl,hlv->bshv", latent, up_values)
    wanted, wanted_lse = kvops.flash_attention(q, k, v, causal=True)

    cache = torch.full((4, 16, latent_dim + rotary), torch.nan, device=device)
    tables = torch.tensor([[[2, 0, 3]]], dtype=torch.int32, device=device)
    lens = torch.tensor([[length]], dtype=torch.int32, device=device)
    kvops.paged_append(
        latent[:, :, None], rope[:, :, None], cache[..., :latent_dim], cache[..., latent_dim:], tables, lens
    )
    absorbed = torch.cat([torch.einsum("bthn,hln->bthl", q[..., :nope], up_keys), q[..., nope:]], -1)
    scale = (nope + rotary) ** -0.5
    out, lse = kvops.paged_latent_attention(absorbed, cache, tables, lens, value_dim=latent_dim, scale=scale)
    torch.testing.assert_close(torch.einsum("bthl,hlv->bthv", out, up_values), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-4)


def test_a_key_that_is_nan_spoils_only_the_tokens_that_see_it(backend, device):
    lists = make_latents([[40], [300]], 32, device=device)
    q = queries(lists, 4, 3)
    clean = attend(q, lists)
    last = (lists.seq_lens[:, 0] - 1).long()
    lists.k_cache[lists.block_tables[:, 0].gather(1, last[:, None] // 16)[:, 0].long(), last % 16, 40] = torch.nan
    out, lse = attend(q, lists)
    assert out[:, -1].isnan().all()
    assert torch.equal(out[:, :-1], clean[0][:, :-1])
    assert torch.equal(lse[..., :-1], clean[1][..., :-1])


def test_the_same_call_gives_the_same_bits(backend, device):
    lists = make_latents([[300], [41], [7]], 64, dtype=torch.bfloat16, device=device)
    q = queries(lists, 20, dtype=torch.bfloat16)
    for one, other in zip(attend(q, lists), attend(q, lists), strict=True):
        assert torch.equal(one, other)


def test_strided_queries_tables_and_lengths(backend, device):
    lists = make_latents([[40, 6], [7, 33]], 32, device=device)
    q = queries(lists, 2, 2)
    spread = dataclasses.replace(
        lists,
        block_tables=lists.block_tables.repeat_interleave(2, -1)[..., ::2],
        seq_lens=lists.seq_lens.t().contiguous().t(),
    )
    spread_q = q.transpose(1, 2).contiguous().transpose(1, 2)
    for one, other in zip(attend(q, lists), attend(spread_q, spread), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 1, 6), (2, 0, 6)])
def test_no_sequences_and_no_tokens(backend, device, shape):
    batch, tokens, heads = shape
    cache = torch.randn(4, 8, 48, device=device)
    tables, lens = torch.zeros(batch, 1, 2, device=device).int(), torch.zeros(batch, 1, device=device).int()
    q = torch.randn(batch, tokens, heads, 48, device=device)
    out, lse = kvops.paged_latent_attention(q, cache, tables, lens, value_dim=32, scale=1.0)
    assert out.shape == (batch, tokens, heads, 32)
    assert lse.shape == (batch, heads, tokens)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 4, 48)}, ValueError, r"^q: expected 4 dimensions"),
        ({"q": torch.ones(2, 1, 4, 40)}, ValueError, r"^cache: expected shape"),
        ({"q": torch.ones(2, 1, 4, 48).double()}, TypeError, r"^q: expected dtype"),
        ({"q": torch.ones(2, 1, 4, 48).half()}, TypeError, r"^q: expected the dtype of cache"),
        ({"q": torch.ones(2, 1, 48, 4).mT}, ValueError, r"^q: expected the last dimension contiguous"),
        ({"cache": torch.ones(3, 8, 48).to(torch.int16)}, TypeError, r"^cache: expected dtype"),
        ({"cache_scale": 2.0}, ValueError, r"^cache_scale: expected only with a float8 or int8 cache"),
        (
            {"cache": torch.ones(3, 8, 48).to(torch.int8), "cache_scale": torch.ones(2)},
            ValueError,
            r"^cache_scale: expected shape",
        ),
        ({"cache": torch.ones(3, 8, 3, 48)}, ValueError, r"^block_tables: expected shape"),
        ({"block_tables": torch.ones(2, 1, 3).long()}, TypeError, r"^block_tables: expected dtype"),
        ({"block_tables": torch.ones(2, 3, 3).int()}, ValueError, r"^seq_lens: expected shape"),
        ({"value_dim": 48}, ValueError, r"^value_dim: expected 1 to 64 columns .* got 48 of 48"),
        ({"value_dim": 0}, ValueError, r"^value_dim: expected at least 1"),
        ({"scale": float("nan")}, ValueError, r"^scale: expected a finite number"),
        ({"softcap": -1.0}, ValueError, r"^softcap: expected at least 0"),
        ({"q_lens": torch.ones(3).int()}, ValueError, r"^q_lens: expected shape"),
        ({"schedule": torch.ones(2).int()}, ValueError, r"^schedule"),
        ({"out": torch.ones(2, 1, 4, 48)}, ValueError, r"^out: expected shape .* = \[2, 1, 4, 32\]"),
        ({"max_seqlen_q": 2}, ValueError, r"^cu_seqlens_q: expected along with max_seqlen_q"),
        (
            {"q": torch.ones(5, 4, 48), "cu_seqlens_q": torch.tensor([0, 3, 6]).int(), "max_seqlen_q": 3},
            ValueError,
            r"^cu_seqlens_q: expected ends within the 5 tokens of q, got 6",
        ),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, message):
    given = {
        "q": torch.ones(2, 1, 4, 48),
        "cache": torch.ones(3, 8, 48),
        "block_tables": torch.ones(2, 1, 3).int(),
        "seq_lens": torch.ones(2, 1).int(),
        "value_dim": 32,
        "scale": 1.0,
    } | change
    tensors = [given.pop(name) for name in ("q", "cache", "block_tables", "seq_lens")]
    with pytest.raises(error, match=message):
        kvops.paged_latent_attention(*tensors, **given)


def test_wide_slots_and_other_options_are_refused():
    cache, lists = torch.ones(3, 8, 720), (torch.zeros(2, 1, 3).int(), torch.ones(2, 1).int())
    for value_dim, message in (
        (640, "value_dim: expected a number from 1 to 512"),
        (512, "value_dim: expected 1 to 64"),
    ):
        with pytest.raises(ValueError, match=message):
            kvops.paged_latent_attention(torch.ones(2, 1, 4, 720), cache, *lists, value_dim=value_dim, scale=1.0)
    with pytest.raises(TypeError, match="window_left"):
        kvops.paged_latent_attention(torch.ones(2, 1, 4, 720), cache, *lists, value_dim=512, scale=1.0, window_left=4)
