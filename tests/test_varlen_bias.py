"""flash_attention_varlen with a bias or a mask: each sequence is a dense call with its own rows, and its gradient."""

import pytest
import torch
from oracle import assert_accurate, attention, attention_backward, attention_mask
from rounding import rounded

import kvops

LENGTHS = [(33, 40), (0, 5), (1, 1), (4, 0), (40, 33)]
LONGEST = 40, 40
# Shapes [heads, queries, keys] of a bias, 0 for the whole size.
SHAPES = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)]
OPTIONS = {
    "full": {},
    "causal window": {"causal": True, "window_left": 20},
    "everything": {"causal": True, "softcap": 2.0, "scale": 0.3, "sinks": 0, "alibi_slopes": 0},
}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` comes filled with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Packed:
    """Random packed inputs, with tokens behind the last sequence."""

    def __init__(self, shape, kind="full", dtype=torch.float32, bias_dtype=torch.float32):
        self.cu_q, self.cu_k = (torch.tensor([0, *side]).cumsum(0).int() for side in zip(*LENGTHS, strict=True))
        self.q, self.k, self.v = (torch.randn(*size).to(dtype) for size in ((81, 4, 16), (82, 2, 16), (82, 2, 24)))
        sizes = 4, 81, 40
        shape = [own or whole for own, whole in zip(shape, sizes, strict=True)]
        keep = torch.rand(shape) > 0.3
        self.bias = keep
        if bias_dtype != torch.bool:
            self.bias = torch.randn(shape).masked_fill(~keep, -torch.inf).to(bias_dtype)
        self.options = dict(OPTIONS[kind])
        if "sinks" in self.options:
            self.options |= {"sinks": torch.randn(4), "alibi_slopes": torch.rand(5, 4)}
        self.lengths = self.cu_q, self.cu_k, *LONGEST
        self.dout, self.dlse = torch.randn(81, 4, 24).to(dtype), torch.randn(4, 81)

    def sequences(self, bias):
        """Places, and the oracle's options, of each sequence."""
        window = {name: x for name, x in self.options.items() if name in ("causal", "window_left")}
        for i, (num_queries, num_keys) in enumerate(LENGTHS):
            rows, keys = slice(self.cu_q[i], self.cu_q[i + 1]), slice(self.cu_k[i], self.cu_k[i + 1])
            scoring = {name: x for name, x in self.options.items() if name not in window}
            if "alibi_slopes" in scoring:
                scoring["alibi_slopes"] = scoring["alibi_slopes"][i]
            own = bias[:, rows] if bias.shape[1] > 1 else bias
            own = own[..., :num_keys] if bias.shape[2] > 1 else own
            yield rows, keys, {"mask": attention_mask(num_queries, num_keys, **window), "bias": own, **scoring}

    def forward(self, q=None, k=None, v=None, bias=None, sinks=None):
        q, k, v = (own if x is None else x for x, own in zip((q, k, v), (self.q, self.k, self.v), strict=True))
        out, lse = [], []
        for rows, keys, scoring in self.sequences(self.bias if bias is None else bias):
            if sinks is not None:
                scoring["sinks"] = sinks
            part = attention(q[None, rows], k[None, keys], v[None, keys], **scoring)
            out.append(part[0][0])
            lse.append(part[1][0])
        tail = len(q) - sum(map(len, out))
        out.append(out[0].new_zeros(tail, *out[0].shape[1:]))
        lse.append(lse[0].new_full((lse[0].shape[0], tail), -torch.inf))
        return torch.cat(out), torch.cat(lse, 1)

    def exact_gradients(self):
        leaves = [x.double().requires_grad_() for x in (self.q, self.k, self.v)]
        if self.bias.is_floating_point():
            leaves.append(self.bias.double().requires_grad_())
        if "sinks" in self.options:
            leaves.append(self.options["sinks"].double().requires_grad_())
        bias = leaves[3] if self.bias.is_floating_point() else None
        out, lse = self.forward(*leaves[:3], bias, leaves[-1] if "sinks" in self.options else None)
        results = out, lse.masked_fill(lse == -torch.inf, 0.0)
        return torch.autograd.grad(results, leaves, (self.dout.double(), self.dlse.double()))

    def flash_gradients(self, out, lse):
        results = [torch.zeros_like(x, dtype=torch.float64) for x in (self.q, self.k, self.v, self.bias)]
        for rows, keys, scoring in self.sequences(self.bias):
            part = attention_backward(
                *(x[None, rows] for x in (self.dout, self.q)), *(x[None, keys] for x in (self.k, self.v)),
                out[None, rows], lse[None, :, rows], dlse=self.dlse[None, :, rows], **scoring,
            )  # fmt: skip
            for result, place, x in zip(results, (rows, keys, keys), part[:3], strict=False):
                result[place] += x[0]
            if part[4] is not None:
                own = results[3][:, rows] if self.bias.shape[1] > 1 else results[3]
                own = own[..., : keys.stop - keys.start] if self.bias.shape[2] > 1 else own
                own += part[4]
        return results


def check(x: Packed):
    actual = kvops.flash_attention_varlen(x.q, x.k, x.v, *x.lengths, **x.options, bias=x.bias)
    for name, *values in zip(("out", "lse"), actual, x.forward(), rounded(x.q.dtype, x.forward), strict=True):
        assert_accurate(*values, name)
    out, lse = (y.to(z.dtype) for y, z in zip(x.forward(), actual, strict=True))
    given = x.dout, x.q, x.k, x.v, out, lse
    gradients = kvops.flash_attention_varlen_backward(*given, *x.lengths, **x.options, dlse=x.dlse, bias=x.bias)[:3]
    if x.bias.is_floating_point():
        options = {name: value for name, value in x.options.items() if name != "sinks"}
        dbias = kvops.flash_attention_varlen_bias_backward(*given, x.bias, *x.lengths, **options, dlse=x.dlse)
        assert dbias.dtype == x.bias.dtype
        gradients = *gradients, dbias
    same = rounded(x.q.dtype, x.flash_gradients, out, lse)
    for name, *values in zip(("dq", "dk", "dv", "dbias"), gradients, x.exact_gradients(), same):  # noqa: B905
        assert_accurate(*values, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
def test_agrees_with_float64(backend, kind, shape):
    check(Packed(shape, kind))


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_a_mask_agrees_with_float64(backend, shape):
    check(Packed(shape, "everything", bias_dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(backend, dtype):
    check(Packed((0, 0, 0), "everything", dtype, dtype))


def test_autograd_with_dropout_is_that_of_a_dense_batch(backend):
    q, k, v = (torch.randn(3, 20, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    bias = torch.randn(3, 4, 20, 20, requires_grad=True)
    options = {"causal": True, "dropout_p": 0.3, "dropout_seed": torch.tensor([5])}
    out, lse = kvops.flash_attention(q, k, v, bias=bias, **options)
    weights = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), (q, k, v, bias), weights)
    ends = torch.tensor([0, 20, 40, 60]).int()
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    packed_out, packed_lse = kvops.flash_attention_varlen(
        *packed, ends, ends, 20, 20, bias=bias.transpose(0, 1).flatten(1, 2), **options
    )
    packed_weights = weights[0].flatten(0, 1), weights[1].transpose(0, 1).flatten(1)
    actual = torch.autograd.grad((packed_out, packed_lse), (q, k, v, bias), packed_weights)
    torch.testing.assert_close(packed_out, out.flatten(0, 1))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_any_strides_are_read_in_place(backend):
    x = Packed((0, 0, 0))
    expected = kvops.flash_attention_varlen(x.q, x.k, x.v, *x.lengths, bias=x.bias)
    for order in ((2, 1, 0), (1, 0, 2), (0, 2, 1)):
        view = x.bias.permute(order).contiguous().permute([order.index(d) for d in range(3)])
        for one, other in zip(
            kvops.flash_attention_varlen(x.q, x.k, x.v, *x.lengths, bias=view), expected, strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sinks", [None, 0.5])
def test_rows_that_a_mask_hides_from_all_keys_are_empty(backend, sinks):
    q, k = torch.randn(9, 2, 16), torch.randn(40, 1, 16)
    ends_q, ends_k = torch.tensor([0, 4, 9]).int(), torch.tensor([0, 7, 40]).int()
    mask = torch.ones(9, 33, dtype=torch.bool)
    mask[2] = False
    mask[5] = False
    mask[3, :7] = False  # columns past the keys of its sequence mean nothing
    options = {"bias": mask, "sinks": None if sinks is None else torch.full((2,), sinks)}
    out, lse = kvops.flash_attention_varlen(q, k, k, ends_q, ends_k, 5, 33, **options)
    for row in (2, 3, 5):
        assert not out[row].any()
        assert (lse[:, row] == -torch.inf).all()
    assert lse[:, [0, 1, 4, 6, 7, 8]].isfinite().all()
    given = torch.ones_like(out), q, k, k, out, lse, ends_q, ends_k, 5, 33
    assert all(x.isfinite().all() for x in kvops.flash_attention_varlen_backward(*given, **options))


def test_are_well_formed_operators(backend):
    q, k, v = (torch.randn(5, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    bias, ends = torch.randn(2, 5, 3, requires_grad=True), torch.tensor([0, 2, 5]).int()
    ops, lengths = torch.ops.kvops, (ends, ends, 3, 3)
    torch.library.opcheck(ops.flash_attention_varlen.default, (q, k, v, *lengths), {"bias": bias})
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))
    given = q, q, k, v, *kvops.flash_attention_varlen(q, k, v, *lengths, bias=bias)
    torch.library.opcheck(ops.flash_attention_varlen_backward.default, (*given, *lengths), {"bias": bias})
    torch.library.opcheck(ops.flash_attention_varlen_bias_backward.default, (*given, bias, *lengths), {})


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.zeros(2, 5, 2), ValueError, r"bias: expected .* \[heads, total_q, max_seqlen_k\] = \[2, 5, 3\], got"),
        (torch.zeros(1, 2, 5, 3), ValueError, r"bias: expected .* got \[1, 2, 5, 3\]"),
        (torch.zeros(5, 3).double(), TypeError, r"bias: expected dtype bool or .*, got float64"),
        (torch.zeros(5, 3, device="meta"), ValueError, r"bias: expected the device of q"),
    ],
)
def test_bad_input_is_refused(bias, error, message):
    q, k = torch.zeros(5, 2, 16), torch.zeros(5, 1, 16)
    ends = torch.tensor([0, 2, 5]).int()
    with pytest.raises(error, match=message):
        kvops.flash_attention_varlen(q, k, k, ends, ends, 3, 3, bias=bias)


def test_a_mask_has_no_gradient():
    q, ends = torch.zeros(5, 1, 16), torch.tensor([0, 5]).int()
    with pytest.raises(TypeError, match="bias: expected a float dtype, got bool: a mask has no gradient"):
        kvops.flash_attention_varlen_bias_backward(
            q, q, q, q, q, torch.zeros(1, 5), torch.ones(5, 5).bool(), ends, ends, 5, 5
        )
