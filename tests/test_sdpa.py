"""torch's attention signature on kvops, and kvops in the place of torch's flash attention."""

import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_accurate
from rounding import rounded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import kvops
from kvops.integrations import sdpa

SHAPES = [((2, 4, 7, 8), (2, 4, 7, 8)), ((1, 6, 5, 8), (1, 2, 9, 8)), ((2, 3, 9, 5), (2, 1, 4, 5))]


def inputs(shape_q, shape_k, device, dtype=torch.float32):
    return tuple(torch.randn(shape, device=device, dtype=dtype) for shape in (shape_q, shape_k, shape_k))


def assert_like_torch(q, k, v, **options):
    gqa = q.dim() == 4 and q.shape[1] != k.shape[1]
    ours = kvops.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **options)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=gqa, **options)
    with sdpa_kernel(SDPBackend.MATH):
        same = rounded(q.dtype, F.scaled_dot_product_attention, q, k, v, enable_gqa=gqa, **options)
    assert_accurate(ours, exact, same)


@pytest.mark.parametrize(("shape_q", "shape_k"), SHAPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_it_computes_what_torch_computes_causal_from_the_top_left(shape_q, shape_k, options, backend, device):
    assert_like_torch(*inputs(shape_q, shape_k, device), **options)


def test_one_head_may_have_no_dimension(device):
    assert_like_torch(*inputs((2, 5, 8), (2, 6, 8), device), is_causal=True)


def test_padding_of_keys(backend, device):
    q, k, v = inputs((3, 4, 5, 8), (3, 2, 6, 8), device)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]], device=device).bool()
    k[~mask[:, None].expand(3, 2, 6)] = float("nan")
    ours = kvops.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], enable_gqa=True)
    clean = k.nan_to_num()
    torch.testing.assert_close(
        ours, F.scaled_dot_product_attention(q, clean, v, attn_mask=mask[:, None, None], enable_gqa=True)
    )
    assert_like_torch(q, clean, v, attn_mask=mask[:1, None, None])
    nobody = kvops.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(3, 1, 1, 6).bool(), enable_gqa=True)
    assert not nobody.any()


def test_the_dimensions_of_a_mask_are_counted_from_the_last_as_torch_broadcasts_them(device):
    """A matrix of queries and keys was taken for padding of rows where there were as many queries as rows, and padding
    of heads for padding of rows where there were as many heads."""
    q, k, v = inputs((3, 3, 3, 8), (3, 3, 4, 8), device)
    mask = torch.ones(3, 4, device=device).tril().bool()
    for own in (mask, mask[:, None], mask[1:2], mask[1:2, None], mask[:, None, None]):
        assert_like_torch(q, k, v, attn_mask=own)
    for own in (mask, mask[:, None]):
        assert_like_torch(q[:, 0], k[:, 0], v[:, 0], attn_mask=own)
    with pytest.raises(ValueError, match=r"attn_mask: .* \[3, 3, 3, 4\], got \[3, 3\]: .* mask\[:, None, None\]"):
        kvops.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :3])


# Shapes of query and key; value is like key, with another head size.
BROADCAST = [
    ((3, 8), (4, 8)),
    ((2, 3, 8), (1, 4, 8)),
    ((1, 3, 8), (2, 4, 8)),
    ((1, 4, 3, 8), (2, 4, 4, 8)),
    ((2, 4, 3, 8), (2, 1, 4, 8)),
    ((2, 1, 3, 8), (2, 4, 4, 8)),
    ((2, 3, 4, 3, 8), (2, 1, 4, 5, 8)),
    ((2, 4, 3, 8), (4, 4, 8)),
]


@pytest.mark.parametrize(("shape_q", "shape_k"), BROADCAST, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_inputs_of_any_rank_broadcast_as_in_torch(shape_q, shape_k, masked, device):
    q, k, v = inputs(shape_q, shape_k, device)
    lead = torch.broadcast_shapes(shape_q[:-2], shape_k[:-2])
    mask = torch.rand(*lead, shape_q[-2], shape_k[-2], device=device) < 0.7 if masked else None
    out = kvops.scaled_dot_product_attention(q, k, v[..., :5], attn_mask=mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v[..., :5], attn_mask=mask))
    out = kvops.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 2, 1), (4, 1, 4)])
def test_keys_and_values_may_have_different_groups(heads, device):
    q, k, v = (torch.randn(2, own, length, 8, device=device) for own, length in zip(heads, (3, 5, 5), strict=True))
    out = kvops.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    out = kvops.scaled_dot_product_attention(q[0], k[0], v[0], enable_gqa=True)  # three dimensions: the first is heads
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q[0], k[0], v[0], enable_gqa=True))


@pytest.mark.parametrize("shape", [(5, 6), (2, 1, 5, 6), (1, 4, 5, 6), (2, 1, 1, 6), (4, 5, 1), (6,)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_shape(shape, kind, backend, device):
    mask = torch.randn(shape, device=device)
    mask = mask > -0.5 if kind == "bool" else mask.requires_grad_()
    q, k, v = (x.requires_grad_() for x in inputs((2, 4, 5, 8), (2, 4, 6, 8), device))
    leaves = (q, k, v, mask) if kind == "float" else (q, k, v)
    weight = torch.randn_like(q)
    with sdpa_kernel(SDPBackend.MATH):
        results = [
            call(q, k, v, attn_mask=mask)
            for call in (kvops.scaled_dot_product_attention, F.scaled_dot_product_attention)
        ]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad((out * weight).sum(), leaves) for out in results))


def draw_call(r: random.Random) -> tuple[tuple[torch.Tensor, ...], dict]:
    """Inputs of two to five dimensions that broadcast, and options."""
    rank = r.randint(2, 5)
    gqa = rank > 3 and r.random() < 0.3
    whole = [r.randint(1, 3) for _ in range(rank - 2)]
    queries, keys, head_dim, value_dim = r.randint(1, 9), r.randint(1, 9), r.choice((1, 4, 8)), r.choice((4, 8))

    def lead(size):
        return [own if r.random() < 0.7 else 1 for own in size]

    leads = [lead(whole) for _ in range(3)]
    if gqa:
        for own, heads in zip(leads, (whole[-1] * 2, whole[-1], whole[-1]), strict=True):
            own[-1] = heads
    sizes = (queries, head_dim), (keys, head_dim), (keys, value_dim)
    tensors = [torch.randn(*own, *size) for own, size in zip(leads, sizes, strict=True)]
    scored = leads[:2]  # torch adds a mask to the scores before it knows the shape of the values
    shape = (*torch.broadcast_shapes(*(own[:-1] for own in scored)), leads[0][-1]) if gqa else ()
    shape = shape or torch.broadcast_shapes(*scored)
    options: dict = {"enable_gqa": gqa, "scale": r.choice((None, None, 0.3, -0.5))}
    kind = r.choice(("", "causal", "bool", "bool", "float", "float"))
    if kind == "causal":
        options["is_causal"] = True
    elif kind:
        full = [*shape, queries, keys]
        own = lead(full)[r.randint(0, max(0, rank - 2)) :]
        mask = torch.randn(own)
        options["attn_mask"] = mask > -0.5 if kind == "bool" else mask.masked_fill(mask < -1, -torch.inf)
    return (*tensors,), options


def test_random_calls_give_what_torch_gives():
    """Ranks, broadcasting, grouped heads and masks of every shape: results and gradients, those of masks included."""
    for seed in range(150):
        torch.manual_seed(seed)
        tensors, options = draw_call(random.Random(seed))
        leaves = [x.requires_grad_() for x in tensors]
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            leaves.append(mask.requires_grad_())
        with sdpa_kernel(SDPBackend.MATH):
            expected = F.scaled_dot_product_attention(*tensors, **options)
        out = kvops.scaled_dot_product_attention(*tensors, **options)
        weight = torch.randn_like(out)
        for one, other in zip(
            (out, *torch.autograd.grad((out * weight).sum(), leaves)),
            (expected, *(x.nan_to_num() for x in torch.autograd.grad((expected * weight).sum(), leaves))),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, seed=seed: f"{seed}: {text}")


def test_a_mask_with_holes_and_one_of_padding_agree_whether_it_is_looked_at(backend, device):
    """On the CPU padding becomes lengths; an expanded mask is known by its strides."""
    q, k, v = inputs((2, 4, 5, 8), (2, 2, 7, 8), device)
    padding = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0]], device=device).bool()
    holes = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0]], device=device).bool()
    for rows in (padding, holes, padding[:1], torch.ones_like(padding)):
        mask = rows[:, None, None]
        assert_like_torch(q, k, v, attn_mask=mask)
        assert_like_torch(q, k, v, attn_mask=mask.expand(-1, 4, 5, -1))


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_the_biases_of_torch_say_where_causality_begins(bias, device):
    q, k, v = inputs((1, 2, 4, 8), (1, 2, 7, 8), device)
    ours = kvops.scaled_dot_product_attention(q, k, v, attn_mask=bias(4, 7))
    mask = torch.ones(4, 7, dtype=torch.bool, device=device).tril(0 if bias is causal_upper_left else 3)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    with pytest.raises(ValueError, match="attn_mask: expected a bias of 4 queries and 7 keys, got one of 4 and 6"):
        kvops.scaled_dot_product_attention(q, k, v, attn_mask=bias(4, 6))


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize("keys", [4, 7])
def test_the_biases_of_torch_without_heads(bias, keys, device):
    """They were taken for padding."""
    q, k, v = inputs((3, 4, 8), (3, keys, 8), device)
    ours = kvops.scaled_dot_product_attention(q, k, v, attn_mask=bias(4, keys))
    mask = torch.ones(4, keys, dtype=torch.bool, device=device).tril(0 if bias is causal_upper_left else keys - 4)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize(("batch", "queries", "keys"), [(2, 3, 0), (0, 3, 4), (2, 0, 4), (0, 0, 0)])
def test_a_mask_of_nothing(batch, queries, keys, device):
    q, k, v = inputs((batch, 4, queries, 8), (batch, 4, keys, 8), device)
    for rows in {1, batch}:
        mask = torch.ones(rows, 1, 1, keys, dtype=torch.bool, device=device)
        out = kvops.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert out.shape == q.shape
        assert keys or not out.any()
    assert kvops.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], attn_mask=mask[:, 0]).shape == q[:, 0].shape


def test_the_result_can_be_changed_in_place(device):
    q, k, v = (x.requires_grad_() for x in inputs((2, 4, 5, 8), (2, 4, 6, 8), device))
    out = kvops.scaled_dot_product_attention(q, k, v)
    expected = 2 * out.detach()
    assert torch.equal(out.mul_(2.0), expected)


def test_gradients(device):
    q, k, v = (x.requires_grad_() for x in inputs((1, 4, 5, 8), (1, 2, 3, 8), device))
    weight = torch.randn(1, 4, 5, 8, device=device)
    gradients = [
        torch.autograd.grad((call(q, k, v, is_causal=True, enable_gqa=True) * weight).sum(), (q, k, v))
        for call in (kvops.scaled_dot_product_attention, F.scaled_dot_product_attention)
    ]
    torch.testing.assert_close(*gradients)


def test_what_cannot_be_done_is_refused(device):
    q, k, v = inputs((1, 2, 3, 8), (1, 2, 4, 8), device)

    def call(**options):
        return kvops.scaled_dot_product_attention(q, k, v, **options)

    with pytest.raises(ValueError, match=r"dropout_p: expected a probability from 0 to below 1, got 1\.0"):
        call(dropout_p=1.0)
    with pytest.raises(TypeError, match=r"attn_mask: expected dtype bool or float32, got float16"):
        call(attn_mask=torch.ones(1, 1, 1, 4, device=device).half())
    with pytest.raises(ValueError, match=r"attn_mask: expected a shape that broadcasts .* got \[2, 2, 3, 4\]"):
        call(attn_mask=torch.ones(2, 2, 3, 4, device=device).bool())
    with pytest.raises(ValueError, match=r"attn_mask: expected a shape that broadcasts .* got \[1, 1, 1, 1, 4\]"):
        call(attn_mask=torch.ones(1, 1, 1, 1, 4, device=device).bool())
    with pytest.raises(ValueError, match="attn_mask: expected None along with is_causal=True"):
        call(attn_mask=torch.ones(1, 1, 1, 4, device=device).bool(), is_causal=True)
    with pytest.raises(ValueError, match="key: expected 4 heads as query has, got 2: set enable_gqa=True"):
        kvops.scaled_dot_product_attention(torch.cat([q, q], 1), k, v)
    with pytest.raises(ValueError, match=r"key: expected batch dimensions that broadcast with \[1\]|\[3\]"):
        kvops.scaled_dot_product_attention(q.expand(3, -1, -1, -1), k.expand(2, -1, -1, -1), v)
    with pytest.raises(ValueError, match=r"value: expected at least 2 dimensions"):
        kvops.scaled_dot_product_attention(q, k, v[0, 0, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(1, 2, 3, 8).double()}, TypeError, "query: expected dtype float16 or .*got float64"),
        ({"key": torch.zeros(1, 2, 4, 8).half()}, TypeError, "key: expected the dtype of query, float32, got float16"),
        ({"value": torch.zeros(1, 2, 4, 8, device="meta")}, ValueError, "value: expected the device of query"),
        (
            {"key": torch.zeros(1, 2, 4, 9)},
            ValueError,
            r"key: expected head_dim 8 as query has, got shape \[1, 2, 4, 9\]",
        ),
        (
            {"value": torch.zeros(1, 2, 5, 8)},
            ValueError,
            r"value: expected seqlen 4 as key has, got shape \[1, 2, 5, 8\]",
        ),
        ({"value": torch.zeros(1, 2, 4, 0)}, ValueError, r"value.shape\[-1\] \(head_dim\): expected at least 1, got 0"),
        ({"query": torch.zeros(1, 3, 3, 8), "enable_gqa": True}, ValueError, "query: expected a number of query heads"),
    ],
)
def test_refusals_use_the_names_that_the_caller_used(change, error, message):
    arguments = {"query": torch.zeros(1, 2, 3, 8), "key": torch.zeros(1, 2, 4, 8), "value": torch.zeros(1, 2, 4, 8)}
    with pytest.raises(error, match=message):
        kvops.scaled_dot_product_attention(**arguments | change)


@pytest.fixture
def registered(device):
    """On the CPU torch chooses another flash attention: the operators are registered there and called by name."""
    registration = sdpa.Registration("CUDA" if device.type == "cuda" else "CPU")
    yield
    registration.remove()


def test_the_operators_of_torch_run_kvops_forward_and_backward(registered, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (x.requires_grad_() for x in inputs((2, 4, 6, 8), (2, 4, 6, 8), device, dtype))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    assert out.stride() == torch.empty_like(q).stride()
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))
    own = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    expected, expected_lse = kvops.flash_attention(*own, causal=True)
    own_gradients = torch.autograd.grad((expected * weight.transpose(1, 2)).sum(), own)
    assert torch.equal(out, expected.transpose(1, 2))
    assert torch.equal(lse, expected_lse)
    for gradient, own_gradient in zip(gradients, own_gradients, strict=True):
        assert torch.equal(gradient, own_gradient.transpose(1, 2))
    again = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    for gradient, other in zip(
        torch.autograd.grad((again * weight).sum(), (q, k, v), create_graph=True), gradients, strict=True
    ):
        assert torch.equal(gradient, other)


def test_dropout_is_that_of_flash_attention(device):
    q, k, v = inputs((2, 4, 5, 8), (2, 4, 5, 8), device)
    own = [x.transpose(1, 2) for x in (q, k, v)]
    gaps = torch.tensor([1, 0, 1, 1, 1], device=device).bool().expand(2, 1, 5, 5)
    ends = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]], device=device).bool()[:, None, None]
    for options, kind in (
        ({}, {}), ({"is_causal": True}, {"causal": True}), ({"attn_mask": gaps}, {"bias": gaps}),
    ):  # fmt: skip
        torch.manual_seed(5)
        expected = kvops.flash_attention(*own, dropout_p=0.4, **kind)[0].transpose(1, 2)
        torch.manual_seed(5)
        assert torch.equal(kvops.scaled_dot_product_attention(q, k, v, dropout_p=0.4, **options), expected)
    torch.manual_seed(5)
    dropped = kvops.scaled_dot_product_attention(q, k, v, ends, dropout_p=0.4)
    assert not torch.allclose(dropped, kvops.scaled_dot_product_attention(q, k, v, ends))
    torch.manual_seed(5)
    assert torch.equal(kvops.scaled_dot_product_attention(q, k, v, ends, dropout_p=0.4), dropped)


def test_the_operators_of_torch_drop_the_same_forward_and_backward(registered, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    dense = [x.requires_grad_() for x in inputs((2, 4, 6, 8), (2, 4, 6, 8), device, dtype)]
    packed = [x.requires_grad_() for x in inputs((9, 4, 8), (9, 2, 8), device, dtype)]
    for leaves, theirs, ours in (
        (
            dense,
            lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.4, True)[0],
            lambda *x: kvops.flash_attention(*(y.transpose(1, 2) for y in x), causal=True, dropout_p=0.4)[0],
        ),
        (
            packed,
            lambda q, k, v: torch.ops.aten._flash_attention_forward(q, k, v, cu, cu, 5, 5, 0.4, True, False)[0],
            lambda q, k, v: kvops.flash_attention_varlen(q, k, v, cu, cu, 5, 5, causal=True, dropout_p=0.4)[0],
        ),
    ):
        results = []
        for call in (theirs, ours):
            torch.manual_seed(5)
            out = call(*leaves)
            results.append(torch.autograd.grad(out.sum(), leaves))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_the_packed_operators_of_torch_run_kvops(registered, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (x.requires_grad_() for x in inputs((9, 4, 8), (9, 2, 8), device, dtype))
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, 5, 5, 0.0, True, False, window_size_left=2, window_size_right=0
    )
    options = {"causal": True, "window_left": 2, "window_right": 0}
    expected, expected_lse = kvops.flash_attention_varlen(q, k, v, cu, cu, 5, 5, **options)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    weight = torch.randn_like(out)
    ours, own = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))
    for gradient, own_gradient in zip(ours, own, strict=True):
        assert torch.equal(gradient, own_gradient)


def test_enabling_takes_the_place_of_torchs_flash_attention_and_gives_it_back():
    code = """
import torch, warnings
warnings.simplefilter("ignore")
import kvops.integrations.sdpa as sdpa
from torch.nn import attention
sdpa.enable()
assert attention.current_flash_attention_impl() == "kvops"
dump = torch._C._dispatch_dump("aten::_scaled_dot_product_flash_attention")
assert "integrations/sdpa.py" in dump, dump
attention.restore_flash_attention_impl()
assert attention.current_flash_attention_impl() is None
del attention.register_flash_attention_impl
try:
    sdpa.enable()
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch: expected a version with torch.nn.attention.register_flash_attention_impl" in done.stdout
