"""Dropout of attention: the documented random numbers on every backend, results and gradients against float64."""

import attention_cases
import numpy as np
import pytest
import torch
from attention_cases import Case
from oracle import assert_accurate, attention, attention_backward
from rounding import rounded
from torch.utils.checkpoint import checkpoint

import kvops

P = 0.3
# Halves of the seed that differ, and a sign.
SEEDS = [0, 5, -7, 2**33 + 1]
CASES = [
    *(
        case
        for case in attention_cases.CASES
        if case.name in ("full with odd head sizes", "causal with three heads to a group", "a window on both sides")
        or case.name in ("softcap", "sinks with rows that see nothing", "alibi", "one query of nine heads")
        or case.name in ("everything at once", "head size 128", "head size 256")
    )
]
NAMES = ("dq", "dk", "dv", "dsinks", "dbias")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """``torch.empty`` comes filled with NaN: what nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def philox(counter, seed):
    """Philox4x32-10 as Salmon et al. (2011) print it, over arrays that broadcast."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0), second & low,
            (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1), first & low,
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def kept(seed, p, batch, heads, num_queries, num_keys):
    """bool [batch, heads, queries, keys]: one after the other, as the manual numbers them."""
    keys = np.arange(num_keys)
    counter = (
        keys // 4,
        np.arange(num_queries)[:, None],
        np.arange(batch * heads).reshape(batch, heads, 1, 1),
        0x44524F50,
    )
    words = np.choose(keys % 4, philox(counter, seed))
    return torch.from_numpy(words >= np.uint64(round(p * 2**32)))


def weights_of(case, p=P, seed=5):
    shape = case.batch, case.heads[0], case.num_queries, case.num_keys
    return kept(seed, p, *shape).double() / (1 - p)


def dropout(p=P, seed=5):
    return {"dropout_p": p, "dropout_seed": torch.tensor([seed])}


def check_forward(case, dtype, **scoring):
    q, k, v = case.inputs(dtype)
    scoring = case.scoring() | scoring
    weights = {"weights": weights_of(case)}
    actual = kvops.flash_attention(q, k, v, **case.window, **scoring, **dropout())
    exact = attention(q, k, v, mask=case.mask, **scoring, **weights)
    same = rounded(dtype, attention, q, k, v, mask=case.mask, **scoring, **weights)
    for name, *values in zip(("out", "lse"), actual, exact, same):  # noqa: B905 - the oracle returns P as well
        assert_accurate(*values, name)


def check_backward(case, dtype, **scoring):
    """Against autograd through the oracle, given its forward."""
    q, k, v = case.inputs(dtype)
    scoring = case.scoring() | scoring
    weights = {"weights": weights_of(case)}
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wide = {name: scoring[name].double().requires_grad_() for name in ("sinks", "bias") if name in scoring}
    out, lse, _ = attention(*leaves, mask=case.mask, **scoring | wide, **weights)
    dout, dlse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)
    outputs = out, lse.masked_fill(lse == float("-inf"), 0.0)
    exact = torch.autograd.grad(outputs, [*leaves, *wide.values()], (dout.double(), dlse.double()))
    exact = dict(zip(["dq", "dk", "dv", *(f"d{name}" for name in wide)], exact, strict=True))
    given = dout, q, k, v, out.detach().to(dtype), lse.detach().float()
    same = rounded(dtype, attention_backward, *given, mask=case.mask, dlse=dlse, **scoring, **weights)
    actual = kvops.flash_attention_backward(*given, dlse=dlse, **case.window, **scoring, **dropout())
    if "bias" in wide:
        scoring.pop("sinks", None)
        bias = scoring.pop("bias")
        dbias = kvops.flash_attention_bias_backward(*given, bias, dlse=dlse, **case.window, **scoring, **dropout())
        actual = *actual, dbias
    for name, one, low in zip(NAMES, actual, same):  # noqa: B905 - there may be no bias
        if name in exact:
            assert_accurate(one, exact[name], low, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_agrees_with_float64(backend, case):
    check_forward(case, torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_agrees_with_float64(backend, case):
    check_backward(case, torch.float32)


@pytest.mark.parametrize("shape", [(4, 40, 50), (4, 1, 50), (1, 40, 50), (1, 1, 1)], ids=str)
def test_a_bias_and_its_gradient_agree_with_float64(backend, shape):
    case = Case("", 2, 40, 50, (4, 2), (24, 16), True, 30, -1, 0.2, 2.0, True, "batch")
    check_forward(case, torch.float32, bias=torch.randn(shape))
    check_backward(case, torch.float32, bias=torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(backend, dtype):
    case = next(case for case in CASES if case.name == "everything at once")
    check_forward(case, dtype, bias=torch.randn(70, 90).to(dtype))
    check_backward(case, dtype, bias=torch.randn(70, 90).to(dtype))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [1e-3, 0.5, 1 - 1e-3])
def test_what_is_dropped_is_what_the_manual_says(backend, p, seed):
    """Equal scores and values of one key each show every probability on its own; its gradient is the same again."""
    q, k = torch.zeros(2, 37, 4, 16), torch.zeros(2, 50, 2, 16)
    v = torch.eye(50)[:, None].expand(2, 50, 2, 50).clone().requires_grad_()
    out, lse = kvops.flash_attention(q, k, v, **dropout(p, seed))
    keeps = kept(seed, p, 2, 4, 37, 50)
    assert torch.equal(out.transpose(1, 2) > 0, keeps)
    torch.testing.assert_close(out.transpose(1, 2), keeps / (50 * (1 - p)))
    torch.testing.assert_close(lse, torch.full_like(lse, 50.0).log())
    dout = torch.eye(37)[:, None].expand(2, 37, 4, 37).contiguous()  # each query has a column of its own in dV
    out = kvops.flash_attention(q, k, torch.zeros(2, 50, 2, 37), **dropout(p, seed))[0]
    dv = kvops.flash_attention_backward(dout, q, k, torch.zeros(2, 50, 2, 37), out, lse.detach(), **dropout(p, seed))[2]
    torch.testing.assert_close(dv.permute(0, 2, 3, 1), keeps.float().unflatten(1, (2, 2)).sum(2) / (50 * (1 - p)))


def test_packed_sequences_drop_what_the_entries_of_a_batch_do(backend):
    """Sequences without queries or keys count as well."""
    lengths = [(9, 20), (0, 5), (37, 40), (4, 0), (1, 33)]
    cu_q, cu_k = (torch.tensor([0, *side]).cumsum(0).int() for side in zip(*lengths, strict=True))
    q, k, v = (torch.randn(tokens, heads, 16) for tokens, heads in ((51, 4), (98, 2), (98, 2)))
    options = {"causal": True, "softcap": 3.0, "sinks": torch.randn(4)}
    given = cu_q, cu_k, 37, 40
    out, lse = kvops.flash_attention_varlen(q, k, v, *given, **options, **dropout())
    weights = kept(5, P, 5, 4, 37, 40).double() / (1 - P)
    dout = torch.randn_like(out)
    gradients = kvops.flash_attention_varlen_backward(dout, q, k, v, out, lse, *given, **options, **dropout())
    expected = [torch.zeros_like(x, dtype=torch.float64) for x in (out, q, k, v)]
    for i, (num_queries, num_keys) in enumerate(lengths):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        leaves = [x[None, place].double().requires_grad_() for x, place in ((q, rows), (k, keys), (v, keys))]
        mask = attention_cases.attention_mask(num_queries, num_keys, causal=True)
        own = weights[i, :, :num_queries, :num_keys]
        whole = attention(*leaves, mask=mask, softcap=3.0, sinks=options["sinks"], weights=own)[0]
        parts = torch.autograd.grad(whole, leaves, dout[None, rows].double())
        for total, place, part in zip(expected, (rows, rows, keys, keys), (whole, *parts), strict=True):
            total[place] = part[0].detach()
    for one, other in zip((out, *gradients[:3]), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_kept(p):
    count = 4 * 64 * 64
    share = kept(11, p, 1, 4, 64, 64).double().mean()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5


def test_seeds_and_positions_drop_differently():
    masks = torch.stack([kept(seed, 0.5, 2, 3, 16, 16) for seed in SEEDS]).flatten(0, 2)
    same = (masks[:, None] == masks[None]).double().mean((2, 3))
    same.fill_diagonal_(0.5)
    assert (same - 0.5).abs().max() < 5 * 0.5 / 16


def random_inputs(requires_grad=False):
    return [torch.randn(2, 20, heads, 16, requires_grad=requires_grad) for heads in (4, 2, 2)]


def test_without_a_seed_one_is_drawn_from_torchs_generator(backend):
    q, k, v = random_inputs()
    lengths = torch.tensor([0, 20, 40]).int()
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    for call in (
        lambda p: kvops.flash_attention(q, k, v, dropout_p=p)[0],
        lambda p: kvops.flash_attention_varlen(*packed, lengths, lengths, 20, 20, dropout_p=p)[0],
    ):
        torch.manual_seed(3)
        first, second = call(P), call(P)
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        assert torch.equal(call(P), first)
        torch.manual_seed(3)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        assert torch.equal(kvops.flash_attention(q, k, v, dropout_p=P, dropout_seed=seed)[0].flatten(), first.flatten())
        torch.manual_seed(3)
        call(0.0)  # draws none
        assert torch.equal(call(P), first)


def test_a_probability_of_0_is_no_dropout(backend):
    q, k, v = random_inputs()
    expected = kvops.flash_attention(q, k, v)
    for one, other in zip(kvops.flash_attention(q, k, v, **dropout(0.0)), expected, strict=True):
        assert torch.equal(one, other)
    given = torch.randn_like(expected[0]), q, k, v, *expected
    for one, other in zip(
        kvops.flash_attention_backward(*given, **dropout(0.0)), kvops.flash_attention_backward(*given), strict=True
    ):
        assert torch.equal(one, other)


def test_the_largest_probability_leaves_numbers(backend):
    q, k, v = random_inputs()
    p = 1 - 2**-53
    out, lse = kvops.flash_attention(q, k, v, **dropout(p))
    assert torch.equal(out, torch.zeros_like(out))
    gradients = kvops.flash_attention_backward(torch.ones_like(out), q, k, v, out, lse, **dropout(p))
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_nothing_to_attend_to(backend, empty):
    sizes = {"batch": 2, "queries": 3, "keys": 3} | {empty: 0}
    q = torch.randn(sizes["batch"], sizes["queries"], 2, 16, requires_grad=True)
    k = torch.randn(sizes["batch"], sizes["keys"], 1, 16, requires_grad=True)
    out, lse = kvops.flash_attention(q, k, k, **dropout())
    assert not out.any()
    assert (lse == float("-inf")).all()
    assert all(not x.any() for x in torch.autograd.grad(out.sum(), (q, k)))


def test_a_checkpoint_drops_the_same_again(backend):
    q, k, v = random_inputs(requires_grad=True)

    def loss(q, k, v):
        return kvops.flash_attention(q, k, v, dropout_p=P)[0].square().sum()

    results = []
    for call in (loss, lambda *x: checkpoint(loss, *x, use_reentrant=False)):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(call(q, k, v), (q, k, v)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_are_well_formed_operators(backend):
    q, k, v = (torch.randn(1, 3, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    bias, ends = torch.randn(2, 3, 3, requires_grad=True), torch.tensor([0, 1, 3]).int()
    ops = torch.ops.kvops
    torch.library.opcheck(ops.flash_attention.default, (q, k, v), {"bias": bias, **dropout()})
    packed = *(x.detach()[0].requires_grad_() for x in (q, k, v)), ends, ends, 2, 2
    torch.library.opcheck(ops.flash_attention_varlen.default, packed, dropout())
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))
    given = q, q, k, v, *kvops.flash_attention(q, k, v, bias=bias, **dropout())
    torch.library.opcheck(ops.flash_attention_backward.default, given, {"bias": bias, **dropout()})
    torch.library.opcheck(ops.flash_attention_bias_backward.default, (*given, bias), dropout())


def test_a_compiled_training_step_has_the_same_loss_and_gradients():
    """The seed is drawn in the graph."""

    def step(weight, x):
        q, k, v = (x @ weight).unflatten(-1, (3, 2, 16)).unbind(2)
        out, lse = kvops.flash_attention(q, k, v, causal=True, dropout_p=P)
        return out.square().mean() + 0.1 * lse.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 21):
        x, weight = torch.randn(2, length, 24), torch.randn(24, 96)
        results = []
        for function in (step, compiled):
            torch.manual_seed(3)
            leaf = weight.clone().requires_grad_()
            loss = function(leaf, x)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results)


def test_a_second_derivative_is_refused():
    q, k, v = random_inputs(requires_grad=True)
    out, _ = kvops.flash_attention(q, k, v, **dropout())
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"kvops.flash_attention has no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability from 0 to below 1, got 1\.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p: expected a probability .*, got -0\.1"),
        ({"dropout_p": float("nan")}, ValueError, r"dropout_p: expected a probability .*, got nan"),
        ({"dropout_p": 0.1}, ValueError, r"dropout_seed: expected an int64 tensor \[1\] along with dropout_p = 0\.1"),
        ({"dropout_p": 0.1, "dropout_seed": torch.ones(1)}, TypeError, "dropout_seed: expected dtype int64"),
        ({"dropout_p": 0.1, "dropout_seed": torch.ones(2).long()}, ValueError, r"dropout_seed: expected shape \[1\]"),
        (
            {"dropout_p": 0.1, "dropout_seed": torch.ones(1, device="meta").long()},
            ValueError,
            "dropout_seed: expected the device of q",
        ),
    ],
)
def test_bad_input_is_refused(options, error, message):
    q, k, v = random_inputs()
    lengths = torch.tensor([0, 20]).int()
    ops, packed = torch.ops.kvops, (*(x[0] for x in (q, k, v)), lengths, lengths, 20, 20)
    lse = torch.zeros(2, 4, 20)
    for call in (
        lambda: ops.flash_attention(q, k, v, **options),
        lambda: ops.flash_attention_varlen(*packed, **options),
        lambda: kvops.flash_attention_backward(q, q, k, v, q, lse, **options),
        lambda: kvops.flash_attention_bias_backward(q, q, k, v, q, lse, torch.zeros(1), **options),
        lambda: kvops.flash_attention_varlen_backward(q[0], *packed[:3], q[0], lse[0], *packed[3:], **options),
    ):
        with pytest.raises(error, match=message):
            call()
