"""flash-attn's functions, from its documentation: layouts, defaults, alignment, caches written in place."""

import subprocess
import sys

import oracle
import pytest
import torch

import kvops
from kvops.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def test_causal_is_aligned_to_the_bottom_right():
    # The documentation's own example: 2 queries and 5 keys.
    q, k, v = randn(1, 2, 1, 8), randn(1, 5, 1, 8), randn(1, 5, 1, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    torch.testing.assert_close(flash_attn_func(q, k, v, causal=True), oracle.attention(q, k, v, mask=mask)[0].float())
    # 5 queries and 2 keys: a row that sees nothing gives 0.
    q, k, v = randn(1, 5, 1, 8), randn(1, 2, 1, 8), randn(1, 2, 1, 8)
    mask = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]).bool()
    out = flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(out, oracle.attention(q, k, v, mask=mask)[0].float())
    assert not out[:, :3].any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"softmax_scale": 0.2},
        {"window_size": (2, 1)},
        {"window_size": (3, -1), "causal": True},
        {"softcap": 1.5},
        {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
        {"alibi_slopes": torch.rand(2, 4), "causal": True},
    ],
)
def test_dense_packed_and_ragged_forms_agree(options):
    q, k, v = randn(2, 6, 4, 8), randn(2, 6, 4, 8), randn(2, 6, 4, 8)
    window = options.get("window_size", (-1, -1))
    mask = oracle.attention_mask(
        6, 6, causal=options.get("causal", False), window_left=window[0], window_right=window[1]
    )
    exact, exact_lse, _ = oracle.attention(
        q,
        k,
        v,
        mask=mask,
        scale=options.get("softmax_scale"),
        softcap=options.get("softcap", 0.0),
        alibi_slopes=options.get("alibi_slopes"),
    )
    out, lse, probabilities = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    torch.testing.assert_close(out, exact.float())
    torch.testing.assert_close(lse, exact_lse.float())
    assert probabilities is None
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    kv, qkv = torch.stack([k, v], 2), torch.stack([q, k, v], 2)
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    assert torch.equal(flash_attn_func(q, k, v, **options), out)
    assert torch.equal(flash_attn_kvpacked_func(q, kv, **options), out)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, **options), out)
    ragged = [
        flash_attn_varlen_func(flat_q, flat_k, flat_v, cu, cu, 6, 6, **options),
        flash_attn_varlen_kvpacked_func(flat_q, kv.flatten(0, 1), cu, cu, 6, 6, **options),
        flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), cu, 6, **options),
    ]
    for other in ragged:
        torch.testing.assert_close(other, out.flatten(0, 1))
    _, lse, _ = flash_attn_varlen_func(flat_q, flat_k, flat_v, cu, cu, 6, 6, **options, return_attn_probs=True)
    torch.testing.assert_close(lse, exact_lse.float().transpose(0, 1).flatten(1))


def test_packed_forms_give_gradients():
    qkv = randn(1, 5, 3, 2, 8).requires_grad_()
    flash_attn_qkvpacked_func(qkv, causal=True).square().sum().backward()
    whole = qkv.grad.clone()
    qkv.grad = None
    flash_attn_func(*qkv.unbind(2), causal=True).square().sum().backward()
    assert torch.equal(whole, qkv.grad)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, first: int, interleaved: bool) -> torch.Tensor:
    """One row [T, H, D], element by element."""
    out, half = x.clone(), cos.shape[1]
    for t in range(len(x)):
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
            c, s = cos[first + t, i], sin[first + t, i]
            out[t, :, a] = x[t, :, a] * c - x[t, :, b] * s
            out[t, :, b] = x[t, :, a] * s + x[t, :, b] * c
    return out


@pytest.mark.parametrize("interleaved", [True, False, None])
@pytest.mark.parametrize("paged", [True, False])
def test_a_cache_takes_in_new_tokens_and_is_attended_to(paged, interleaved, backend, device):
    lens, new = [3, 9], 2
    q, k, v = (torch.randn(2, new, heads, 8, device=device) for heads in (4, 2, 2))
    rows = torch.randn(2, 2, 16, 2, 8, device=device)  # keys and values of two rows
    options = {"causal": True, "window_size": (4, -1), "softcap": 3.0, "softmax_scale": 0.4}
    if paged:
        table = torch.tensor([[5, 0, 2, 7], [1, 6, 3, 4]], dtype=torch.int32, device=device)
        caches = [torch.full((8, 4, 2, 8), torch.nan, device=device) for _ in range(2)]
        for cache, content in zip(caches, rows, strict=True):
            cache[table.long()] = content.unflatten(1, (4, 4))
        options["block_table"] = table
    else:
        caches = [torch.cat([content, torch.randn_like(content[:1])]).clone() for content in rows]
        options["cache_batch_idx"] = torch.tensor([1, 0], device=device)
        rows = rows.flip(1)
    if interleaved is not None:
        angles = torch.rand(16, 3, device=device)  # of the first 6 of 8 dimensions
        options |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}
    cache_seqlens = torch.tensor(lens, dtype=torch.int32, device=device)
    out, lse = flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=cache_seqlens, return_softmax_lse=True, **options
    )
    assert cache_seqlens.tolist() == lens  # not updated
    for row, length in enumerate(lens):
        own_q, own_k, own_v = q[row], k[row], v[row]
        if interleaved is not None:
            turn = options["rotary_cos"], options["rotary_sin"], length, interleaved
            own_q, own_k = rotated(own_q, *turn), rotated(own_k, *turn)
        keys, values = (torch.cat([old[row, :length], fresh]) for old, fresh in zip(rows, (own_k, own_v), strict=True))
        mask = oracle.attention_mask(new, length + new, causal=True, window_left=4)
        exact, exact_lse, _ = oracle.attention(
            *(x[None].cpu() for x in (own_q, keys, values)), mask=mask, scale=0.4, softcap=3.0
        )
        torch.testing.assert_close(out[row].cpu(), exact[0].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[row].cpu(), exact_lse[0].float(), rtol=1e-5, atol=1e-5)
        for cache, whole in zip(caches, (keys, values), strict=True):
            kept = cache[options["block_table"][row].long()].flatten(0, 1) if paged else cache[1 - row]
            torch.testing.assert_close(kept[: length + new], whole)


def test_a_cache_without_new_tokens_and_without_causality():
    q, k_cache, v_cache = randn(2, 3, 4, 8), randn(2, 7, 4, 8), randn(2, 7, 4, 8)
    torch.testing.assert_close(flash_attn_with_kvcache(q, k_cache, v_cache), flash_attn_func(q, k_cache, v_cache))
    torch.testing.assert_close(
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5),
        flash_attn_func(q, k_cache[:, :5], v_cache[:, :5]),
    )
    # Neither causal nor in a window: all queries are rotated by the same position.
    angles, k, v = torch.rand(16, 4), randn(2, 3, 4, 8), randn(2, 3, 4, 8)
    cos, sin = angles.cos(), angles.sin()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=4)
    own_q = torch.stack([torch.cat([rotated(token[None], cos, sin, 4, True) for token in row]) for row in q])
    own_k = torch.stack([rotated(row, cos, sin, 4, True) for row in k])
    torch.testing.assert_close(k_cache[:, 4:], own_k)
    torch.testing.assert_close(out, flash_attn_func(own_q, k_cache, v_cache))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tables", [torch.float32, None])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_computed_in_float32_and_rounded_once(dtype, tables, interleaved):
    """In half precision throughout, a third of the stored keys differed from flash-attn's."""
    lens = [3, 9]
    q, k, v = (torch.randn(2, 2, heads, 64, dtype=dtype) for heads in (4, 2, 2))
    caches = [torch.zeros(2, 16, 2, 64, dtype=dtype) for _ in range(2)]
    angles = torch.rand(16, 24) * 6
    cos, sin = (x.to(tables or dtype) for x in (angles.cos(), angles.sin()))
    out = flash_attn_with_kvcache(
        q, *caches, k, v, cos, sin, torch.tensor(lens, dtype=torch.int32), causal=True, rotary_interleaved=interleaved
    )
    turned_q = torch.empty_like(q)
    for row, length in enumerate(lens):
        turned = (rotated(x[row].float(), cos.float(), sin.float(), length, interleaved).to(dtype) for x in (q, k))
        turned_q[row], keys = turned
        assert torch.equal(caches[0][row, length : length + 2], keys)
    plain = flash_attn_with_kvcache(
        turned_q, *caches, cache_seqlens=torch.tensor([5, 11], dtype=torch.int32), causal=True
    )
    assert torch.equal(out, plain)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, the last dimension strided."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def test_inputs_whose_last_dimension_is_strided_are_copied():
    """flash-attn does; they were refused."""
    q, k, v = randn(2, 6, 4, 8), randn(2, 6, 4, 8), randn(2, 6, 4, 8)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    kv, qkv = torch.stack([k, v], 2), torch.stack([q, k, v], 2)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    pages = {"block_table": torch.tensor([[0], [1]], dtype=torch.int32)}
    for function, tensors, rest, options in (
        (flash_attn_func, (q, k, v), (), {}),
        (flash_attn_kvpacked_func, (q, kv), (), {}),
        (flash_attn_qkvpacked_func, (qkv,), (), {}),
        (flash_attn_varlen_func, flat, (cu, cu, 6, 6), {}),
        (flash_attn_varlen_kvpacked_func, (flat[0], kv.flatten(0, 1)), (cu, cu, 6, 6), {}),
        (flash_attn_varlen_qkvpacked_func, (qkv.flatten(0, 1),), (cu, 6), {}),
    ):
        expected = function(*tensors, *rest, causal=True, **options)
        assert torch.equal(function(*map(strided, tensors), *rest, causal=True, **options), expected)
    expected = flash_attn_varlen_func(flat[0], k, v, cu, cu, 6, 6, **pages)
    assert torch.equal(flash_attn_varlen_func(strided(flat[0]), k, v, cu, cu, 6, 6, **pages), expected)
    results = []
    for change in (lambda x: x, strided):
        caches = [torch.zeros(2, 9, 4, 8) for _ in range(2)]
        results.append((flash_attn_with_kvcache(change(q), *caches, change(k), change(v), cache_seqlens=3), *caches))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"k_cache: expected the last dimension contiguous"):  # written in place
        flash_attn_with_kvcache(q, strided(k), v)


def test_ragged_queries_over_pages():
    lens_q, lens_k = [1, 0, 3], [6, 2, 5]
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).to(torch.int32) for lens in (lens_q, lens_k))
    q, k, v = randn(4, 4, 8), randn(13, 2, 8), randn(13, 2, 8)
    table = torch.tensor([[3, 1], [0, 0], [2, 4]], dtype=torch.int32)
    pages = [torch.full((5, 4, 2, 8), torch.nan) for _ in range(2)]
    for cache, content in zip(pages, (k, v), strict=True):
        for row, length in enumerate(lens_k):
            for t in range(length):
                cache[table[row, t // 4], t % 4] = content[cu_k[row] + t]
    options = {"causal": True, "return_attn_probs": True}
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 6, **options)
    out = flash_attn_varlen_func(q, *pages, cu_q, cu_k, 3, 6, block_table=table, **options)
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[1], expected[1])


def test_every_form_drops_with_torchs_generator():
    q, k, v = randn(2, 6, 4, 8), randn(2, 6, 4, 8), randn(2, 6, 4, 8)
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    lengths, both = (ends, ends, 6, 6), torch.stack([k, v], 2)
    table = torch.arange(2, dtype=torch.int32)[:, None]
    torch.manual_seed(5)
    expected = kvops.flash_attention(q, k, v, causal=True, dropout_p=0.4)[0]
    for call in (
        lambda **x: flash_attn_func(q, k, v, **x),
        lambda **x: flash_attn_kvpacked_func(q, both, **x),
        lambda **x: flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), **x),
        lambda **x: flash_attn_varlen_func(*packed, *lengths, **x),
        lambda **x: flash_attn_varlen_kvpacked_func(packed[0], both.flatten(0, 1), *lengths, **x),
        lambda **x: flash_attn_varlen_qkvpacked_func(torch.stack(packed, 1), ends, 6, **x),
    ):
        torch.manual_seed(5)
        torch.testing.assert_close(call(dropout_p=0.4, causal=True).view_as(expected), expected)
    for call in (  # as more sequences, which are numbered on
        lambda **x: flash_attn_varlen_func(packed[0], k, v, *lengths, block_table=table, **x),
        lambda **x: flash_attn_func(q, k, v, attention_chunk=4, **x),
    ):
        results = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            results.append(call(dropout_p=0.4, causal=True))
        assert torch.equal(results[0], results[1])
        assert not torch.allclose(results[0], results[2])
        many = torch.stack([call(dropout_p=0.1, causal=True) for _ in range(400)])
        torch.testing.assert_close(many.mean(0), call(causal=True), rtol=0, atol=6 * 2.0 * (0.1 / 0.9 / 400) ** 0.5)


def test_what_is_not_there_is_said():
    q = randn(1, 2, 2, 8)
    with pytest.raises(ValueError, match=r"dropout_p: expected a probability from 0 to below 1, got 1\.0"):
        flash_attn_func(q, q, q, dropout_p=1.0)
    pad, table = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="cache_leftpad: expected None along with a block_table"):
        flash_attn_with_kvcache(q, q, q, cache_seqlens=2, cache_leftpad=pad, block_table=table)
    ends = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="leftpad_k: expected None along with a block_table"):
        flash_attn_varlen_func(q[0], q, q, ends, ends, 2, 2, leftpad_k=pad, block_table=table)
    with pytest.raises(ValueError, match="cache_seqlens: expected a number"):
        flash_attn_with_kvcache(q, q, q, q, q)
    with pytest.raises(ValueError, match="v: expected along with k, got only k"):
        flash_attn_with_kvcache(q, q, q, q)
    with pytest.raises(ValueError, match="rotary_cos: expected None without new keys"):
        flash_attn_with_kvcache(q, q, q, rotary_cos=torch.ones(4, 2), rotary_sin=torch.ones(4, 2))


def test_what_does_not_fit_the_cache_is_named():
    """New tokens beyond the end of a cache were dropped, and with only one of the rotary tables nothing was rotated."""
    q, cache = randn(2, 1, 2, 8), randn(2, 4, 2, 8)
    table = torch.ones(4, 2)
    for error, message, options in (
        (ValueError, "cache_seqlens: expected numbers that the cache has room for", {"cache_seqlens": 4}),
        (TypeError, "cache_seqlens: expected dtype int32, got int64", {"cache_seqlens": torch.tensor([1, 2])}),
        (TypeError, r"cache_seqlens: expected an int, got \[1, 2\]", {"cache_seqlens": [1, 2]}),
        (ValueError, "rotary_sin: expected along with rotary_cos", {"cache_seqlens": 1, "rotary_cos": table}),
    ):
        with pytest.raises(error, match=message):
            flash_attn_with_kvcache(q, cache, cache.clone(), q, q, **options)
    rotary = {"cache_seqlens": 1, "rotary_cos": table, "rotary_sin": table}
    for error, message, options in (
        (ValueError, r"rotary_cos.shape\[0\] .*: expected at least 4, got 3", {"rotary_cos": table[:3]}),
        (ValueError, r"rotary_cos: expected at most head_dim / 2 = 4 columns", {"rotary_cos": torch.ones(4, 5)}),
        (ValueError, r"rotary_cos: expected 2 dimensions", {"rotary_cos": torch.ones(4)}),
        (TypeError, r"rotary_cos: expected dtype", {"rotary_cos": table.long()}),
        (ValueError, r"rotary_sin: expected shape .* = \[4, 2\], got \[4, 1\]", {"rotary_sin": table[:, :1]}),
        (ValueError, r"cache_batch_idx: expected shape \[batch\]", {"cache_batch_idx": torch.tensor([0])}),
        (TypeError, r"cache_batch_idx: expected dtype int32 or int64", {"cache_batch_idx": torch.ones(2)}),
        (ValueError, r"cache_batch_idx: expected rows of k_cache", {"cache_batch_idx": torch.tensor([0, 2])}),
        (ValueError, r"cache_batch_idx: expected rows of k_cache", {"cache_batch_idx": torch.tensor([-1, 0])}),
    ):
        options = rotary | options
        if options["rotary_cos"].shape != table.shape and "rotary_sin" not in message:
            options["rotary_sin"] = options["rotary_cos"]
        with pytest.raises(error, match=message):
            flash_attn_with_kvcache(q, cache, cache.clone(), q, q, **options)
    with pytest.raises(ValueError, match="q: expected 4 dimensions"):
        flash_attn_with_kvcache(q[0], cache, cache)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected lengths from 0 to max_seqlen_q = 2, got 3"):
        flash_attn_varlen_func(
            randn(3, 2, 8), cache, cache, ends, ends, 2, 3, block_table=torch.zeros(1, 1, dtype=torch.int32)
        )
    with pytest.raises(ValueError, match=r"k_cache.shape\[0\]: expected at least 2, got 1"):
        flash_attn_with_kvcache(q, cache[:1], cache[:1])
    with pytest.raises(ValueError, match=r"qkv: expected shape \[batch, seqlen, 3, heads, head_dim\]"):
        flash_attn_qkvpacked_func(randn(1, 2, 2, 2, 8))
    cu = torch.zeros(2, dtype=torch.int32)
    paged = {"block_table": torch.zeros(1, 1, dtype=torch.int32)}
    assert flash_attn_varlen_func(randn(0, 2, 8), cache, cache, cu, cu, 3, 4, **paged).shape == (0, 2, 8)


def test_import_flash_attn_finds_it_once_asked():
    code = """
import importlib.util, sys
assert importlib.util.find_spec("flash_attn") is None
import kvops
assert "flash_attn" not in sys.modules
from kvops.integrations.flash_attn import flash_attn_func, install
assert install() and install()
import flash_attn
from flash_attn import flash_attn_varlen_func
from flash_attn.flash_attn_interface import flash_attn_with_kvcache
assert flash_attn.flash_attn_func is flash_attn_func
assert importlib.util.find_spec("flash_attn") is not None
print(flash_attn.__version__)
import types
sys.modules["flash_attn"] = types.ModuleType("flash_attn")
assert not install()  # another package stays
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(".")[0] == "2"
