"""A NaN that goes in comes out: attention never makes zeros of it, nor an empty row."""

import pytest
import torch
from paged_lists import make_lists, queries

import kvops

NUMBA = True  # see conftest.py
NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")  # of Triton's interpreter


def with_tensors(options, device):
    return {
        name: torch.full((4,), value, device=device) if name == "sinks" else value for name, value in options.items()
    }


@pytest.mark.parametrize("options", [{}, {"sinks": 0.0}, {"softcap": 5.0}, {"window_left": 2}], ids=str)
@pytest.mark.parametrize("where", ["queries", "keys", "values"])
@pytest.mark.parametrize(("lengths", "num_tokens"), [([[5, 40]], 1), ([[600, 9]], 1), ([[40, 3]], 3), ([[70, 50]], 40)])
def test_paged_attention_shows_a_nan(backend, device, lengths, num_tokens, where, options):
    """Rows whose scores were all NaN became zeros on the CPU, and their lse -inf in the kernels."""
    lists = make_lists(lengths, block_size=16, head_dim=16, device=device)
    q = queries(lists, 2, num_tokens)
    options = with_tensors(options, device)
    clean, clean_lse = kvops.paged_attention(q, *lists.arguments, **options)
    blocks = lists.block_tables[0, 0, : -(-lengths[0][0] // 16)].long()
    if where == "queries":
        q[:, :, :2, 3] = NAN
    else:
        (lists.k_cache if where == "keys" else lists.v_cache)[blocks] = NAN
    out, lse = kvops.paged_attention(q, *lists.arguments, **options)
    assert out[:, :, :2].isnan().all()
    assert where == "values" or lse[:, :2].isnan().all()
    assert torch.equal(out[:, :, 2:], clean[:, :, 2:])
    assert torch.equal(lse[:, 2:], clean_lse[:, 2:])


@pytest.mark.parametrize("reduce", ["sum", "sumsq", "max"])
@pytest.mark.parametrize("lengths", [[[5, 40]], [[600, 9]]])
def test_scores_of_a_list_show_a_nan(backend, device, lengths, reduce):
    """A maximum left it out. The instructions of GPUs do that, so that the kernels give +inf in place of NaN."""
    lists = make_lists(lengths, block_size=16, head_dim=16, device=device)
    q = queries(lists, 3)
    q[:, :, 1, 3] = NAN
    kvops.paged_attention(q, *lists.arguments, scores=lists.scores, score_reduce=reduce)
    for head, is_spoilt in enumerate((True, False)):
        slots = torch.arange(lengths[0][head], device=device)
        scores = lists.scores[lists.block_tables[0, head, slots // 16].long(), slots % 16]
        assert (scores.isfinite() != is_spoilt).all()


@pytest.mark.parametrize("where", ["queries", "keys"])
@pytest.mark.parametrize("length", [3, 300])
def test_paged_latent_attention_shows_a_nan(backend, device, length, where):
    lists = make_lists([[length]], block_size=16, head_dim=48, device=device)
    q = queries(lists, 4, 3)
    (q if where == "queries" else lists.k_cache)[..., 40] = NAN
    lists_of_latents = lists.k_cache, lists.block_tables, lists.seq_lens
    out, lse = kvops.paged_latent_attention(q, *lists_of_latents, value_dim=32, scale=0.1)
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_left": 0}, {"softcap": 5.0}, {"sinks": 0.0}], ids=str
)
@pytest.mark.parametrize("where", ["queries", "keys", "values"])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 7), (5, 5), (1, 40), (33, 33)])
def test_flash_attention_shows_a_nan_and_so_do_its_gradients(backend, device, num_queries, num_keys, where, options):
    """torch's CPU kernel makes zeros of it where the keys do not fill a vector."""
    options = with_tensors(options, device)
    q = torch.randn(1, num_queries, 4, 16, device=device)
    k, v = (torch.randn(1, num_keys, 2, 16, device=device) for _ in range(2))
    {"queries": q[:, :, :2, 3], "keys": k[:, :, 0, 3], "values": v[:, :, 0]}[where].fill_(NAN)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = kvops.flash_attention(*inputs, **options)
    assert out[:, :, :2].isnan().all()
    assert where == "values" or lse[:, :2].isnan().all()
    assert out[:, :, 2:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum(), inputs)
    assert dq[:, :, :2].isnan().all()
    assert dk[:, :, 0].isnan().any()
    assert where == "values" or dv[:, :, 0].isnan().any()
    assert all(x.isfinite().all() for x in (dq[:, :, 2:], dk[:, :, 1], dv[:, :, 1]))


@pytest.mark.parametrize("lengths", [[1, 5, 9], [3, 40, 2]])
def test_packed_attention_shows_a_nan_in_its_own_sequence(backend, device, lengths):
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    q, k, v = (torch.randn(sum(lengths), 2, 16, device=device) for _ in range(3))
    q[: lengths[0], 0] = NAN
    longest = max(lengths)
    out, lse = kvops.flash_attention_varlen(q, k, v, starts, starts, longest, longest, causal=True)
    assert out[: lengths[0], 0].isnan().all()
    assert lse[..., 0, : lengths[0]].isnan().all()
    assert out[lengths[0] :].isfinite().all()
    assert out[:, 1].isfinite().all()


@pytest.mark.parametrize("group", ["sum", "mean", "max"])
@pytest.mark.parametrize("reduce", ["sum", "sumsq", "max"])
@pytest.mark.parametrize("where", ["queries", "keys", "lse"])
def test_attention_scores_show_a_nan(backend, device, where, reduce, group):
    q, k = torch.randn(1, 5, 4, 16, device=device), torch.randn(1, 5, 2, 16, device=device)
    _, lse = kvops.flash_attention(q, k, k)
    {"queries": q[0, 2, 1, 0], "keys": k[0, 2, 0, 0], "lse": lse[0, 1, 2]}[where].fill_(NAN)
    scores = kvops.attention_scores(q, k, lse, reduce=reduce, group=group)
    assert not (scores[0, 0, 2:3] if where == "keys" else scores[0, 0]).isfinite().any()
    assert scores[0, 1].isfinite().all()
