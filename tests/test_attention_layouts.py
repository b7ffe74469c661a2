"""Rows as they lie in memory: whatever strides the checks allow, every row that an operator reads is the tensor's."""

import pytest
import torch

import kvops
from kvops.eager import attention as eager_attention


def windows_of_heads(B, S, H, D):
    """Head h begins one number behind head h - 1: heads and the last dimension both have a stride of 1."""
    return torch.randn(B, S, D + H - 1).unfold(2, D, 1)


def windows_of_tokens(B, S, H, D):
    return torch.randn(B, H, D + S - 1).unfold(2, D, 1).transpose(1, 2)


def windows_of_batches(B, S, H, D):
    return torch.randn(S, H, D + B - 1).unfold(2, D, 1).movedim(2, 0)


def one_head_expanded(B, S, H, D):
    return torch.randn(B, S, 1, D).expand(B, S, H, D)


def one_token_expanded(B, S, H, D):
    return torch.randn(B, 1, H, D).expand(B, S, H, D)


def heads_before_tokens(B, S, H, D):
    return torch.randn(B, H, S, D).transpose(1, 2)


def channels_last(B, S, H, D):
    """For head size 1, whose last stride the checks do not look at."""
    assert D == 1
    return torch.randn(B, H, D, S).permute(0, 3, 1, 2)


VIEWS = (
    windows_of_heads,
    windows_of_tokens,
    windows_of_batches,
    one_head_expanded,
    one_token_expanded,
    heads_before_tokens,
)
# A layout, the head sizes of K and V.
LAYOUTS = [*((view, (16, 16)) for view in VIEWS), (windows_of_tokens, (16, 24)), (windows_of_tokens, (24, 16))]
LAYOUTS += [(view, dims) for view in (channels_last, heads_before_tokens) for dims in ((1, 1), (1, 5), (5, 1))]
OPTIONS = [{}, {"scale": -0.3}, {"causal": True, "window_left": 3}, {"softcap": 2.0}]


def compact(x):
    """The same numbers in rows of consecutive numbers: ``contiguous()`` leaves the stride of a dimension of size 1."""
    return torch.empty(x.shape, dtype=x.dtype).copy_(x)


def arranged(view, tokens, heads, head_dim, dtype):
    view = view if head_dim == 1 or view is not channels_last else heads_before_tokens
    x = view(2, tokens, heads, head_dim)
    # Cast with its very strides.
    numbers = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(dtype)
    return numbers.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.fixture
def _watched(monkeypatch):
    """torch's CPU kernels take it for granted that rows are consecutive numbers, and read what lies there if not."""

    def watched(function):
        def call(*args, **kwargs):
            for x in args:
                if isinstance(x, torch.Tensor) and x.dim() == 4:
                    assert x.shape[3] == 1 or x.stride(3) == 1, f"rows are strided: {list(x.shape)} {list(x.stride())}"
            return function(*args, **kwargs)

        return call

    for name in ("_forward", "_backward"):
        monkeypatch.setattr(eager_attention, name, watched(getattr(eager_attention, name)))


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("view", "dims"), LAYOUTS)
def test_dense_attention_reads_and_differentiates_every_layout(view, dims, options, dtype, monkeypatch):
    """``F.pad`` keeps a channels-last format, ``to`` and ``mul`` the strides of overlapping windows: memory that is not
    the tensor's was read (1e35) for head size 1 beside a wider V."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q = arranged(view, 6, 4, dims[0], dtype)
    k = arranged(view, 9, 2, dims[0], dtype)
    v = arranged(view, 9, 2, dims[1], dtype)
    dout = arranged(view, 6, 4, dims[1], dtype)
    results = []
    for inputs in ((q, k, v, dout), tuple(map(compact, (q, k, v, dout)))):
        out, lse = kvops.flash_attention(*inputs[:3], **options)
        gradients = kvops.flash_attention_backward(inputs[3], *inputs[:3], out, lse, **options)
        results.append((out, lse, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("view", "dims"), [*LAYOUTS[:2], *LAYOUTS[-6:]])
def test_kernels_read_every_layout(view, dims, backend):
    inputs = [arranged(view, tokens, 2, d, torch.float32) for tokens, d in ((6, dims[0]), (9, dims[0]), (9, dims[1]))]
    actual = kvops.flash_attention(*inputs, causal=True)
    torch.testing.assert_close(actual, kvops.flash_attention(*map(compact, inputs), causal=True))


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("view", VIEWS)
def test_eager_paged_attention_reads_every_layout(view, dtype, tokens, heads, monkeypatch):
    """Three drafts of overlapping windows attended to as if they were others."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("KVOPS_CPU", "eager")
    cache = torch.randn(40, 4, 16).to(dtype)
    tables = torch.randperm(40).int().view(2, 2, 10)
    lens = torch.full((2, 2), 37, dtype=torch.int32)
    q = arranged(view, tokens, heads, 16, dtype)
    actual = kvops.paged_attention(q, cache, cache, tables, lens)
    torch.testing.assert_close(actual, kvops.paged_attention(compact(q), cache, cache, tables, lens))


@pytest.mark.parametrize("view", VIEWS)
def test_autocast_keeps_rows_together(view):
    x = view(2, 6, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = kvops.flash_attention(x, x, x)
        expected = kvops.flash_attention(*(compact(x) for _ in range(3)))
    torch.testing.assert_close(actual, expected)


def test_an_empty_tensor_may_have_any_strides(backend):
    """It was refused, and ``contiguous()``, which leaves an empty tensor as it is, did not help."""
    q, empty = torch.randn(1, 3, 2, 8), torch.empty(1, 8, 2, 0).transpose(1, 3)
    assert empty.stride(-1) != 1
    out, lse = kvops.flash_attention(q, empty, empty)
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == float("-inf")).all()
    none, _ = kvops.flash_attention(empty, q, q)
    assert none.shape == empty.shape
    gradients = kvops.flash_attention_backward(q, q, empty, empty, out, lse)
    assert [list(x.shape) for x in gradients[:3]] == [list(x.shape) for x in (q, empty, empty)]
    scores = kvops.attention_scores(q, empty, lse)
    assert scores.shape == (1, 2, 0)
    packed, lengths = empty[0], torch.zeros(2, dtype=torch.int32)
    assert kvops.flash_attention_varlen(packed, packed, packed, lengths, lengths, 0, 0)[0].shape == (0, 2, 8)
    merged, _ = kvops.merge_attention(empty, lse[..., :0], empty, lse[..., :0])
    assert merged.shape == empty.shape
