"""Packed sequences: each agrees with float64 on its own, whatever stands beside it."""

from functools import partial

import pytest
import torch
from oracle import assert_accurate, attention, attention_backward, attention_mask
from rounding import rounded

import kvops

NUMBA = True


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` comes filled with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Queries and keys of each sequence: more keys, no queries, one of each, no keys, more queries (rows that see nothing).
LENGTHS = [(33, 40), (0, 5), (1, 1), (4, 0), (40, 33)]
OPTIONS = [
    {"causal": True},
    {"window_left": 9, "window_right": 4},
    {"causal": True, "window_left": 20, "softcap": 2.0, "scale": 0.3, "sinks": "heads", "alibi_slopes": "batch"},
]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


class Packed:
    """Random packed inputs with ``tail`` tokens that belong to no sequence, NaN in every one of them."""

    def __init__(self, options, dtype=torch.float32, lengths=LENGTHS, heads=(2, 1), dims=(16, 24), tail=3):
        self.cu_q, self.cu_k = (cumulative(side) for side in zip(*lengths, strict=True))
        self.lengths = (self.cu_q, self.cu_k, max(q for q, _ in lengths), max(k for _, k in lengths))
        tokens_q, tokens_k = int(self.cu_q[-1]), int(self.cu_k[-1])
        self.q = torch.randn(tokens_q + tail, heads[0], dims[0]).to(dtype)
        self.k = torch.randn(tokens_k + tail, heads[1], dims[0]).to(dtype)
        self.v = torch.randn(tokens_k + tail, heads[1], dims[1]).to(dtype)
        self.dout = torch.randn(tokens_q + tail, heads[0], dims[1]).to(dtype)
        for x, tokens in ((self.q, tokens_q), (self.k, tokens_k), (self.v, tokens_k)):
            x[tokens:] = float("nan")
        self.dout[tokens_q:] = 0.0
        self.tail = tail
        self.options = dict(options)
        if options.get("sinks"):
            self.options["sinks"] = torch.randn(heads[0])
        if options.get("alibi_slopes"):
            self.options["alibi_slopes"] = torch.rand(len(lengths), heads[0])

    def sequences(self):
        """Slices of queries and keys, the mask and the oracle's options of each sequence."""
        window = {name: x for name, x in self.options.items() if name in ("causal", "window_left", "window_right")}
        for i in range(len(self.cu_q) - 1):
            rows, keys = slice(self.cu_q[i], self.cu_q[i + 1]), slice(self.cu_k[i], self.cu_k[i + 1])
            scoring = {name: x for name, x in self.options.items() if name not in window}
            if "alibi_slopes" in scoring:
                scoring["alibi_slopes"] = scoring["alibi_slopes"][i]
            mask = attention_mask(rows.stop - rows.start, keys.stop - keys.start, **window)
            yield rows, keys, mask, scoring

    def forward(self):
        out = torch.zeros(*self.q.shape[:2], self.v.shape[2], dtype=torch.float64)
        lse = torch.full((self.q.shape[1], self.q.shape[0]), float("-inf"), dtype=torch.float64)
        for rows, keys, mask, scoring in self.sequences():
            part = attention(self.q[None, rows], self.k[None, keys], self.v[None, keys], mask=mask, **scoring)
            out[rows], lse[:, rows] = part[0][0], part[1][0]
        return out, lse

    def exact_gradients(self):
        inputs = [x.double().requires_grad_() for x in (self.q, self.k, self.v)]
        if "sinks" in self.options:
            inputs.append(self.options["sinks"].double().requires_grad_())
        total = torch.zeros((), dtype=torch.float64)
        for rows, keys, mask, scoring in self.sequences():
            if "sinks" in scoring:
                scoring["sinks"] = inputs[3]
            q, k, v = inputs[0][None, rows], inputs[1][None, keys], inputs[2][None, keys]
            total = total + (attention(q, k, v, mask=mask, **scoring)[0][0] * self.dout[rows].double()).sum()
        return torch.autograd.grad(total, inputs)

    def flash_gradients(self, out, lse):
        results = [torch.zeros_like(x, dtype=torch.float64) for x in (self.q, self.k, self.v)]
        dsinks = torch.zeros(self.q.shape[1], dtype=torch.float64)
        for rows, keys, mask, scoring in self.sequences():
            part = attention_backward(
                self.dout[None, rows],
                self.q[None, rows],
                self.k[None, keys],
                self.v[None, keys],
                out[None, rows],
                lse[None, :, rows],
                mask=mask,
                **scoring,
            )
            for result, where, x in zip(results, (rows, keys, keys), part[:3], strict=True):
                result[where] = x[0]
            if part[3] is not None:
                dsinks += part[3]
        return (*results, dsinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=["causal", "window", "everything"])
def test_forward_agrees_with_float64(backend, options, dtype):
    x = Packed(options, dtype)
    actual = kvops.flash_attention_varlen(x.q, x.k, x.v, *x.lengths, **x.options)
    for name, *values in zip(("out", "lse"), actual, x.forward(), rounded(dtype, x.forward), strict=True):
        assert_accurate(*values, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=["causal", "window", "everything"])
def test_backward_agrees_with_float64(backend, options, dtype):
    x = Packed(options, dtype)
    out, lse = (y.to(z) for y, z in zip(x.forward(), (dtype, torch.float32), strict=True))
    actual = kvops.flash_attention_varlen_backward(x.dout, x.q, x.k, x.v, out, lse, *x.lengths, **x.options)
    same = rounded(dtype, x.flash_gradients, out, lse)
    for name, *values in zip(("dq", "dk", "dv", "dsinks"), actual, x.exact_gradients(), same):  # noqa: B905
        assert_accurate(*values, name)


def test_is_the_dense_operator_for_equal_lengths(backend):
    """Gradients through lse included, in the same bits."""
    q, k, v = (torch.randn(2, 20, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    sinks = torch.randn(2, requires_grad=True)
    inputs = q, k, v, sinks
    out, lse = kvops.flash_attention(q, k, v, causal=True, sinks=sinks)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    lengths = cumulative([20, 20])
    packed, packed_lse = kvops.flash_attention_varlen(
        *(x.flatten(0, 1) for x in (q, k, v)), lengths, lengths, 20, 20, causal=True, sinks=sinks
    )
    assert torch.equal(packed, out.flatten(0, 1))
    assert torch.equal(packed_lse, lse.transpose(0, 1).flatten(1))
    packed_dlse = dlse.transpose(0, 1).flatten(1)
    actual = torch.autograd.grad((packed, packed_lse), inputs, (dout.flatten(0, 1), packed_dlse))
    for one, other in zip(actual[:3], expected[:3], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(actual[3], expected[3])


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("which", [{}, {"query_start": -3}, {"query_start": 35, "skip_recent": 2}])
def test_scores_agree_with_the_dense_operator(backend, reduce, which):
    x = Packed({"causal": True}, tail=0)
    _, lse = kvops.flash_attention_varlen(x.q, x.k, x.v, *x.lengths, causal=True)
    scores = kvops.attention_scores_varlen(x.q, x.k, lse, *x.lengths, causal=True, reduce=reduce, **which)
    assert scores.shape == (1, x.k.shape[0])
    for rows, keys, _, _ in x.sequences():
        expected = kvops.attention_scores(
            x.q[None, rows], x.k[None, keys], lse[None, :, rows].contiguous(), causal=True, reduce=reduce, **which
        )
        torch.testing.assert_close(scores[:, keys], expected[0])


def test_no_sequences(backend):
    lengths = torch.zeros(1, dtype=torch.int32)
    q, k = torch.randn(3, 2, 16, requires_grad=True), torch.randn(2, 1, 16)
    out, lse = kvops.flash_attention_varlen(q, k, k, lengths, lengths, 0, 0)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert (dq == 0).all()
    assert (kvops.attention_scores_varlen(q.detach(), k, lse.detach(), lengths, lengths, 0, 0) == 0).all()


def test_are_well_formed_operators(backend):
    x = Packed({"causal": True, "sinks": "heads"}, lengths=[(3, 4), (2, 2)])
    x.q, x.k, x.v = (y.nan_to_num(0.0) for y in (x.q, x.k, x.v))
    ops = torch.ops.kvops
    out, lse = kvops.flash_attention_varlen(x.q, x.k, x.v, *x.lengths, **x.options)
    backward = (x.dout, x.q, x.k, x.v, out, lse, *x.lengths)
    torch.library.opcheck(ops.flash_attention_varlen_backward.default, backward, x.options)
    torch.library.opcheck(ops.attention_scores_varlen.default, (x.q, x.k, lse, *x.lengths), {"causal": True})
    forward = (x.q.requires_grad_(), x.k.requires_grad_(), x.v, *x.lengths)
    torch.library.opcheck(ops.flash_attention_varlen.default, forward, x.options)


def test_compiles_into_one_graph_with_dynamic_shapes():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(q, k, v, cu_q, cu_k, max_q, max_k):
        return kvops.flash_attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)

    for lengths in ([(3, 4), (2, 2)], [(5, 9), (7, 7)]):
        x = Packed({}, lengths=lengths, tail=0)
        actual = compiled(x.q, x.k, x.v, *x.lengths)
        expected = kvops.flash_attention_varlen(x.q, x.k, x.v, *x.lengths, causal=True)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 5, 4, 16)}, ValueError, r"q: expected 3 dimensions .*got shape \[1, 5, 4, 16\]"),
        ({"k": torch.zeros(7, 2, 8)}, ValueError, r"k: expected shape .*\[any, any, 16\], got \[7, 2, 8\]"),
        ({"v": torch.zeros(6, 2, 16)}, ValueError, r"v: expected shape .*\[7, 2, any\], got \[6, 2, 16\]"),
        ({"cu_seqlens_q": torch.zeros(3).long()}, TypeError, r"cu_seqlens_q: expected dtype int32, got int64"),
        ({"cu_seqlens_q": torch.zeros(3, 1).int()}, ValueError, r"cu_seqlens_q: expected 1 dimensions"),
        ({"cu_seqlens_q": torch.zeros(0).int()}, ValueError, r"cu_seqlens_q.shape\[0\].*: expected at least 1, got 0"),
        ({"cu_seqlens_k": torch.zeros(4).int()}, ValueError, r"cu_seqlens_k: expected shape .*\[3\], got \[4\]"),
        ({"max_seqlen_q": -1}, ValueError, r"max_seqlen_q: expected at least 0, got -1"),
        ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, r"alibi_slopes: expected shape .*\[2, 4\], got \[3, 4\]"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    arguments = {"q": torch.zeros(5, 4, 16), "k": torch.zeros(7, 2, 16), "v": torch.zeros(7, 2, 16)}
    arguments |= {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "max_seqlen_q": 3, "max_seqlen_k": 3} | change
    with pytest.raises(error, match=message):
        kvops.flash_attention_varlen(**arguments)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize(
    ("lengths", "longest", "message"),
    [
        ([1, 2, 5], 3, "expected a leading 0, got 1"),
        ([0, 3, 2], 3, "expected lengths from 0 to max_seqlen_{} = 3, got -1 of sequence 1"),
        ([0, 2, 5], 2, "expected lengths from 0 to max_seqlen_{} = 2, got 3 of sequence 1"),
        ([0, 2, 6], 4, "expected ends within the 5 tokens of {}, got 6"),
        ([0, -1, 5], 9, "expected lengths from 0 to max_seqlen_{} = 9, got -1 of sequence 0"),
        ([0, 2, 2**31 - 1], 2**31 - 1, "expected ends within the 5 tokens"),
    ],
)
def test_lengths_that_make_no_sense_are_named_where_looking_costs_nothing(
    backend, monkeypatch, side, lengths, longest, message
):
    """At every call: the first with such shapes was right. On a GPU it would synchronise, so only when debugging."""
    good, wrong = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    q = torch.zeros(5, 1, 16)
    if q.device.type != "cpu":
        monkeypatch.setenv("KVOPS_DEBUG", "1")

    lse = torch.zeros(1, 5)
    for call in (
        partial(kvops.flash_attention_varlen, q, q, q),
        partial(kvops.flash_attention_varlen_backward, q, q, q, q, q, lse),
        partial(kvops.attention_scores_varlen, q, q, lse),
    ):
        for lengths in ((good, good, longest, 3), (good, good, 3, longest)) if longest >= 3 else ():
            call(*lengths)
        with pytest.raises(ValueError, match=f"^cu_seqlens_{side}: {message.format(side)}"):
            call(*((wrong, good, longest, 3) if side == "q" else (good, wrong, 3, longest)))
