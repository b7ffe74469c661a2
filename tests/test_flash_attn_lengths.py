"""flash-attn's options of length: padding on the left, used lengths, chunks, ALiBi and windows over a cache, padding
tools and rotary layers. The oracle writes down which keys a query sees, sequence by sequence, in float64."""

import random
import subprocess
import sys

import oracle
import pytest
import torch

from kvops.integrations.flash_attn import (
    bert_padding,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    rotary,
)


def seen(num_queries: int, num_keys: int, *, causal=False, window=(-1, -1), chunk=0) -> torch.Tensor:
    """bool ``[Sq, Sk]``, written from flash-attn's documentation: the last query is at the place of the last key."""
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for i in range(num_queries):
        place = i + num_keys - num_queries
        for j in range(num_keys):
            near = (window[0] < 0 or j >= place - window[0]) and (window[1] < 0 or j <= place + window[1])
            mask[i, j] = near and (not causal or j <= place) and (not chunk or j // chunk == place // chunk)
    return mask


def exact(q, k, v, mask, options) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: q ``[Sq, Hq, D]``, k and v ``[Sk, Hkv, ·]`` -> out and lse ``[Hq, Sq]``, float64."""
    scales = {"scale": options.get("softmax_scale"), "softcap": options.get("softcap", 0.0)}
    slopes = options.get("alibi_slopes")
    out, lse, _ = oracle.attention(q[None], k[None], v[None], mask=mask, alibi_slopes=slopes, **scales)
    return out[0], lse[0]


def draw(rng: random.Random, heads: int, *, batch: int, alibi: bool) -> dict:
    """Options of one call."""
    options = {
        "causal": rng.random() < 0.5,
        "softcap": rng.choice([0.0, 2.0]),
        "softmax_scale": rng.choice([None, 0.3]),
    }
    options["window_size"] = rng.choice([(-1, -1), (3, -1), (2, 1), (-1, 2), (0, 0)])
    options["attention_chunk"] = rng.choice([0, 0, 3, 5])
    if alibi:
        options["alibi_slopes"] = torch.rand(*rng.choice([(heads,), (batch, heads)])) / 4
    return options


def mask_of(num_queries: int, num_keys: int, options: dict) -> torch.Tensor:
    return seen(
        num_queries,
        num_keys,
        causal=options["causal"],
        window=options["window_size"],
        chunk=options["attention_chunk"],
    )


def of_row(options: dict, row: int) -> dict:
    slopes = options.get("alibi_slopes")
    return options | {"alibi_slopes": slopes[row : row + 1] if slopes is not None and slopes.dim() == 2 else slopes}


CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # of sums of about 20 products in float32


@pytest.mark.parametrize("seed", range(12))
def test_packed_sequences_of_which_parts_are_used(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lens_q, lens_k = [rng.randint(0, 9) for _ in range(3)], [rng.randint(0, 14) for _ in range(3)]
    used_q, used_k = ([rng.randint(0, length) for length in lens] for lens in (lens_q, lens_k))
    pads = [rng.randint(0, length) for length in used_k]
    options = draw(rng, 4, batch=3, alibi=rng.random() < 0.5)
    given = {"seqused_q": used_q, "seqused_k": used_k, "leftpad_k": pads}
    given = {name: torch.tensor(lens, dtype=torch.int32) for name, lens in given.items() if rng.random() < 0.7}
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).to(torch.int32) for lens in (lens_q, lens_k))
    q, k, v = torch.randn(sum(lens_q), 4, 8), torch.randn(sum(lens_k), 2, 8), torch.randn(sum(lens_k), 2, 8)
    for x in (q, k, v):
        x.requires_grad_()
    args = cu_q, cu_k, max(lens_q), max(lens_k)
    out, lse, _ = flash_attn_varlen_func(q, k, v, *args, **given, **options, return_attn_probs=True)
    expected, expected_lse = torch.zeros_like(out).double(), torch.full_like(lse, -torch.inf).double()
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    for row in range(3):
        num_q = used_q[row] if "seqused_q" in given else lens_q[row]
        end = used_k[row] if "seqused_k" in given else lens_k[row]
        first = min(pads[row], end) if "leftpad_k" in given else 0
        own_q = doubles[0][cu_q[row] : cu_q[row] + num_q]
        own_k, own_v = (x[cu_k[row] + first : cu_k[row] + end] for x in doubles[1:])
        mask = mask_of(num_q, end - first, options)
        part, part_lse = exact(own_q, own_k, own_v, mask, of_row(options, row))
        places = torch.arange(cu_q[row], cu_q[row] + num_q)
        expected = expected.index_put((places,), part)
        expected_lse[:, places] = part_lse.detach()
    torch.testing.assert_close(out, expected.float(), **CLOSE)
    torch.testing.assert_close(lse, expected_lse.float(), **CLOSE)
    direction = torch.randn_like(out)
    out.backward(direction)
    if expected.requires_grad:
        expected.backward(direction.double())
        for ours, theirs in zip((q, k, v), doubles, strict=True):
            theirs = torch.zeros_like(ours).double() if theirs.grad is None else theirs.grad
            torch.testing.assert_close(ours.grad, theirs.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_a_cache_with_padding_chunks_windows_and_alibi(seed, paged):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    new, num_q = rng.choice([1, 1, 4]), rng.choice([1, 3, 4])
    num_q = num_q if rng.random() < 0.5 else new
    lens = [rng.randint(0, 12) for _ in range(3)]
    options = draw(rng, 4, batch=3, alibi=rng.random() < 0.4)
    q, k, v = torch.randn(3, num_q, 4, 8), torch.randn(3, new, 2, 8), torch.randn(3, new, 2, 8)
    rows = torch.randn(2, 3, 16, 2, 8)
    pads = [0, 0, 0]
    given = {}
    if paged:
        table = torch.tensor([[5, 0, 2, 7], [1, 6, 3, 4], [8, 9, 10, 11]], dtype=torch.int32)
        caches = [torch.full((12, 4, 2, 8), torch.nan) for _ in range(2)]
        for cache, content in zip(caches, rows, strict=True):
            cache[table.long()] = content.unflatten(1, (4, 4))
        given["block_table"] = table
    else:
        caches = [content.clone() for content in rows]
        if rng.random() < 0.5:
            order = torch.tensor([2, 0, 1])
            caches = [cache[order.argsort()] for cache in caches]
            given["cache_batch_idx"] = order
        if rng.random() < 0.7:
            pads = [rng.randint(0, length) for length in lens]
            given["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32)
    lengths = torch.tensor(lens, dtype=torch.int32)
    out, lse = flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lengths, return_softmax_lse=True, **given, **options
    )
    for row, length in enumerate(lens):
        keys, values = (
            torch.cat([old[row, pads[row] : length], fresh[row]]) for old, fresh in zip(rows, (k, v), strict=True)
        )
        expected, expected_lse = exact(q[row], keys, values, mask_of(num_q, len(keys), options), of_row(options, row))
        torch.testing.assert_close(out[row], expected.float(), **CLOSE)
        torch.testing.assert_close(lse[row], expected_lse.float(), **CLOSE)


@pytest.mark.parametrize("options", [{"attention_chunk": 3}, {"window_size": (2, 1)}, {"cache_leftpad": (1, 4)}])
def test_bounds_over_a_cache_on_every_backend(options, backend, device):
    lens = torch.tensor([5, 9], dtype=torch.int32, device=device)
    q, rows = torch.randn(2, 3, 4, 8, device=device), torch.randn(2, 2, 16, 2, 8, device=device)
    pads = options.get("cache_leftpad", (0, 0))
    if "cache_leftpad" in options:
        options = {"cache_leftpad": torch.tensor(pads, dtype=torch.int32, device=device)}
    out = flash_attn_with_kvcache(q, *rows, cache_seqlens=lens, **options).cpu()
    for row, length in enumerate(lens.tolist()):
        keys, values = (x[row, pads[row] : length].cpu() for x in rows)
        mask = seen(3, len(keys), window=options.get("window_size", (-1, -1)), chunk=options.get("attention_chunk", 0))
        expected, _ = exact(q[row].cpu(), keys, values, mask, {})
        torch.testing.assert_close(out[row], expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "attention_chunk": 4}])
def test_packed_queries_over_pages_have_gradients(options):
    """With pages, gradients were refused."""
    lens_q, lens_k, table = [2, 0, 3], [6, 2, 5], torch.tensor([[3, 1], [0, 0], [2, 1]], dtype=torch.int32)
    cu_q = torch.tensor([0, *lens_q]).cumsum(0).to(torch.int32)
    used = torch.tensor(lens_k, dtype=torch.int32)
    q, pages = torch.randn(5, 4, 8, requires_grad=True), torch.randn(2, 5, 4, 2, 8)
    pages.requires_grad_()
    args = cu_q, torch.zeros(4, dtype=torch.int32), 3, 6
    options = options | {"causal": True, "block_table": table, "seqused_k": used}
    out = flash_attn_varlen_func(q, *pages, *args, **options)
    with torch.no_grad():
        torch.testing.assert_close(flash_attn_varlen_func(q, *pages, *args, **options), out.detach())
    doubles = [x.detach().double().requires_grad_() for x in (q, pages)]
    rows = doubles[1][:, table.long()].flatten(2, 3)  # [2, B, S, Hkv, D]
    parts = []
    for row in range(3):
        own = (side[row, : lens_k[row]] for side in rows)
        mask = seen(lens_q[row], lens_k[row], causal=True, chunk=options.get("attention_chunk", 0))
        parts.append(exact(doubles[0][cu_q[row] : cu_q[row + 1]], *own, mask, options)[0])
    torch.testing.assert_close(out, torch.cat(parts).float(), **CLOSE)
    direction = torch.randn_like(out)
    out.backward(direction)
    torch.cat(parts).backward(direction.double())
    for ours, theirs in zip((q, pages), doubles, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-5)


def test_used_queries_over_pages():
    q, pages = torch.randn(5, 4, 8), torch.randn(2, 5, 4, 2, 8)
    cu_q, used_q = (torch.tensor(lens, dtype=torch.int32) for lens in ([0, 3, 5], [2, 1]))
    table, used_k = (torch.tensor(rows, dtype=torch.int32) for rows in ([[3, 1], [0, 2]], [6, 3]))
    cu_k = torch.zeros(3, dtype=torch.int32)
    out = flash_attn_varlen_func(
        q, *pages, cu_q, cu_k, 3, 6, causal=True, block_table=table, seqused_q=used_q, seqused_k=used_k
    )
    rows = pages[:, table.long()].flatten(2, 3)
    for row, first in enumerate((0, 3)):
        num_q, num_k = int(used_q[row]), int(used_k[row])
        own = (side[row, :num_k] for side in rows)
        expected, _ = exact(q[first : first + num_q], *own, seen(num_q, num_k, causal=True), {})
        torch.testing.assert_close(out[first : first + num_q], expected.float(), **CLOSE)
    assert not out[2].any()
    assert not out[4].any()


def test_dense_attention_in_chunks():
    q, k, v = (torch.randn(2, length, heads, 8, requires_grad=True) for length, heads in ((5, 4), (12, 2), (12, 2)))
    out = flash_attn_func(q, k, v, causal=True, attention_chunk=4)
    for row in range(2):
        expected, _ = exact(q[row], k[row], v[row], seen(5, 12, causal=True, chunk=4), {})
        torch.testing.assert_close(out[row], expected.float(), **CLOSE)
    out.sum().backward()
    assert not k.grad[:, :4].any()  # the first query is at position 7
    assert k.grad[:, 4:].any()


def test_lengths_that_do_not_fit_are_named():
    q, ends = torch.randn(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    for error, message, options in (
        (ValueError, "seqused_k: expected numbers up to the lengths of cu_seqlens_k", {"seqused_k": [5]}),
        (ValueError, "seqused_q: expected numbers from 0 on", {"seqused_q": [-1]}),
        (ValueError, "leftpad_k: expected numbers up to the keys that are used", {"leftpad_k": [3], "seqused_k": [2]}),
        (ValueError, r"leftpad_k: expected shape \[batch\]", {"leftpad_k": [1, 2]}),
    ):
        given = {name: torch.tensor(value, dtype=torch.int32) for name, value in options.items()}
        with pytest.raises(error, match=message):
            flash_attn_varlen_func(q, q, q, ends, ends, 4, 4, **given)
    with pytest.raises(TypeError, match="seqused_k: expected dtype int32"):
        flash_attn_varlen_func(q, q, q, ends, ends, 4, 4, seqused_k=torch.tensor([2]))
    shared = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    pages = torch.randn(3, 2, 2, 8)
    with pytest.raises(ValueError, match="block_table: expected pages that sequences share at the same place in each"):
        flash_attn_with_kvcache(
            pages[:2, :1], pages, pages, cache_seqlens=4, block_table=shared, causal=True, attention_chunk=2
        )
    pad = torch.full((3,), 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="cache_leftpad: expected numbers from 0 to the tokens of each row"):
        flash_attn_with_kvcache(pages[:, :1], pages, pages, cache_seqlens=2, cache_leftpad=pad)


def test_padding_is_taken_out_and_put_back():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]])
    x = torch.randn(3, 4, 2, requires_grad=True)
    tokens, indices, cu, longest, used = bert_padding.unpad_input(x, mask)
    assert indices.tolist() == [1, 2, 4, 5, 7]
    assert (cu.tolist(), longest, used.tolist()) == ([0, 2, 5, 5], 3, [2, 3, 0])
    assert (cu.dtype, used.dtype) == (torch.int32, torch.int32)
    assert torch.equal(tokens, x[mask.bool()])
    back = bert_padding.pad_input(tokens, indices, 3, 4)
    assert torch.equal(back, x * mask[..., None])
    back.sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand(3, 4, 2).float())
    unused = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    tokens, _, cu, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert (len(tokens), cu.tolist(), longest, used.tolist()) == (6, [0, 3, 6, 6], 3, [2, 3, 0])
    lengths = torch.tensor([[2, 1, 0, 0], [3, 0, 0, 0], [1, 1, 1, 1]])
    tokens, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert (indices.tolist(), cu.tolist(), longest) == ([0, 1, 2, 4, 5, 6, 8, 9, 10, 11], [0, 2, 3, 6, 7, 8, 9, 10], 3)
    assert torch.equal(bert_padding.index_put_first_axis(tokens, indices, 12)[indices], tokens)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[batch, seqlen\]"):
        bert_padding.unpad_input(x, mask[:, :3])


def turned(x: torch.Tensor, angle: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x ``[H, D]`` as complex numbers times exp(i angle), in float64."""
    half = len(angle)
    part = x[:, : 2 * half].double()
    pairs = part.unflatten(1, (half, 2)) if interleaved else part.unflatten(1, (2, half)).mT
    product = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)
    product = torch.view_as_real(product)
    product = product if interleaved else product.mT
    return torch.cat([product.flatten(1), x[:, 2 * half :].double()], 1)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_layers(interleaved):
    angles = torch.rand(20, 3, dtype=torch.float64) * 6
    cos, sin = angles.cos().float(), angles.sin().float()
    x, offsets = torch.randn(2, 5, 2, 8), torch.tensor([0, 7])
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    for row in range(2):
        for t in range(5):
            expected = turned(x[row, t], angles[offsets[row] + t], interleaved)
            torch.testing.assert_close(out[row, t], expected.float(), **CLOSE)
    cu = torch.tensor([0, 4, 4, 10], dtype=torch.int32)
    packed = x.flatten(0, 1).clone()
    result = rotary.apply_rotary_emb(
        packed, cos, sin, interleaved, inplace=True, seqlen_offsets=torch.tensor([1, 0, 2]), cu_seqlens=cu
    )
    assert result is packed
    for place, position in enumerate([1, 2, 3, 4, 2, 3, 4, 5, 6, 7]):
        expected = turned(x.flatten(0, 1)[place], angles[position], interleaved)
        torch.testing.assert_close(packed[place], expected.float(), **CLOSE)
    qkv = torch.stack([x, x + 1, x + 2], 2)
    other = torch.cat([x, x + 1, x + 2], 2)
    q, k = (rotary.apply_rotary_emb(part, cos, sin, interleaved, seqlen_offsets=3) for part in (x, x + 1))
    rotary.apply_rotary_emb_qkv_(qkv, cos, sin, interleaved=interleaved, seqlen_offsets=3)
    assert torch.equal(qkv, torch.stack([q, k, x + 2], 2))
    rotary.apply_rotary_emb_qkv_(other, cos, sin, interleaved=interleaved, seqlen_offsets=3, num_heads_q=2)
    assert torch.equal(other, torch.cat([q, k, x + 2], 2))
    kv = torch.stack([x, x + 1], 2)
    q = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=3)
    assert torch.equal(rotary.apply_rotary_emb_kv_(kv, cos, sin, interleaved, 3), torch.stack([q, x + 1], 2))
    with pytest.raises(ValueError, match="seqlen_offsets: expected positions among the 20 of cos"):
        rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=16)


def test_rotary_layers_have_gradients():
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    layer = rotary.RotaryEmbedding(6, interleaved=True)
    cos, sin = layer.tables(3, x.float())
    rotary.apply_rotary_emb(x.float(), cos, sin, True).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())  # a rotation keeps the norm


@pytest.mark.parametrize("offset", [0, 4, torch.tensor([2, 5])])
def test_a_rotary_module_rotates_queries_and_keys(offset):
    layer = rotary.RotaryEmbedding(8, base=100.0)
    qkv = torch.randn(2, 3, 3, 2, 8)
    cos, sin = layer.tables(16, qkv)
    expected = rotary.apply_rotary_emb_qkv_(qkv.clone(), cos, sin, seqlen_offsets=offset)
    q, kv = qkv[:, :, 0].clone(), qkv[:, :, 1:].clone()
    assert torch.equal(layer(qkv, seqlen_offset=offset), expected)
    q, kv = layer(q, kv, seqlen_offset=offset)
    assert torch.equal(torch.cat([q[:, :, None], kv], 2), expected)
    angle = 5 * 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    torch.testing.assert_close(cos[5], angle.cos().float())
    with pytest.raises(ValueError, match="scale_base: expected None, as xPos is not supported, got 512"):
        rotary.RotaryEmbedding(8, scale_base=512)


def test_the_modules_are_found_after_install():
    code = """
from kvops.integrations.flash_attn import bert_padding, install, rotary
assert install()
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
import flash_attn.layers.rotary, flash_attn.bert_padding
assert flash_attn.bert_padding.unpad_input is bert_padding.unpad_input
assert flash_attn.layers.rotary.apply_rotary_emb is rotary.apply_rotary_emb is apply_rotary_emb
import importlib.util
assert importlib.util.find_spec("flash_attn.layers.rotary") is not None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
