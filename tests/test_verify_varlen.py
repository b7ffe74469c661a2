"""Packed verification: the tokens of one request at a time, int32 tokens, and lengths that do not fit."""

import pytest
import torch
from test_verify import request_batch
from test_verify_tree import SHAPES

import kvops

NUMBA = True


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def sampling(seeds, steps, device):
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.0, 2.0, 0.0])[: len(seeds)]
    return {"temperature": temperature.to(device), "seed": seeds.to(device), "step": steps.to(device)}


def one(keywords, b):
    return {name: value[b : b + 1] for name, value in keywords.items()}


@pytest.mark.parametrize("method", ["token", "block"])
@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_packed_drafts_give_the_tokens_of_one_request_at_a_time(backend, device, method, with_probs, dtype):
    lens, longest, V = [3, 0, 1, 4, 2, 0], 5, 70
    logits, drafts, probs, seeds, steps = (x.to(device) for x in request_batch(len(lens), 4, V))
    ends = int32(0, *torch.tensor(lens).cumsum(0).tolist()).to(device)
    keywords = sampling(seeds, steps, device)

    def pack(x, more=0):
        """The rows of all requests, and two that belong to none."""
        return torch.cat([*(x[b, : n + more] for b, n in enumerate(lens)), x[0, :2]])

    tokens, accepted = kvops.verify_draft_varlen(
        pack(logits, 1), pack(drafts).to(dtype), ends, longest,
        draft_probs=pack(probs) if with_probs else None, method=method, **keywords,
    )  # fmt: skip
    assert (tokens.shape, tokens.dtype, accepted.dtype) == ((6, longest + 1), dtype, torch.int32)
    for b, n in enumerate(lens):
        want, count = kvops.verify_draft(
            logits[b : b + 1, : n + 1], drafts[b : b + 1, :n],
            draft_probs=probs[b : b + 1, :n] if with_probs else None, method=method, **one(keywords, b),
        )  # fmt: skip
        assert tokens[b].tolist() == want[0].tolist() + [-1] * (longest - n)
        assert int(accepted[b]) == int(count)


@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's 0 / 0 where nothing is left
def test_packed_trees_give_the_tokens_of_one_request_at_a_time(backend, device, with_probs, dtype):
    lens, longest, V = [7, 5, 0, 1, 6], 8, 40
    logits, drafts, probs, seeds, steps = (x.to(device) for x in request_batch(len(lens), 7, V))
    parents = torch.tensor(SHAPES[: len(lens)], dtype=torch.int32, device=device)
    ends = int32(0, *torch.tensor(lens).cumsum(0).tolist()).to(device)
    keywords = sampling(seeds, steps, device)

    def pack(x):
        return torch.cat([*(x[b, :n] for b, n in enumerate(lens)), x[0, :2]])

    path, tokens, accepted = kvops.verify_tree_varlen(
        pack(logits[:, :7]), pack(drafts).to(dtype), pack(parents), ends, longest,
        draft_probs=pack(probs) if with_probs else None, **keywords,
    )  # fmt: skip
    assert (path.dtype, tokens.dtype, accepted.dtype) == (torch.int32, dtype, torch.int32)
    for b, n in enumerate(lens):
        if n == 0:
            assert path[b].tolist() == tokens[b].tolist() == [-1] * longest
            assert int(accepted[b]) == 0
            continue
        want = kvops.verify_tree(
            logits[b : b + 1, :n], drafts[b : b + 1, :n], parents[b : b + 1, :n],
            draft_probs=probs[b : b + 1, :n] if with_probs else None, **one(keywords, b),
        )  # fmt: skip
        assert path[b].tolist() == want[0][0].tolist() + [-1] * (longest - n)
        assert tokens[b].tolist() == want[1][0].tolist() + [-1] * (longest - n)
        assert int(accepted[b]) == int(want[2])


def test_no_drafts_and_no_requests(backend, device):
    nothing, zeros = torch.empty(0, dtype=torch.int64, device=device), int32(0, 0, 0).to(device)
    logits = torch.randn(2, 9, device=device)
    probs = torch.empty(0, 9, device=device)
    tokens, accepted = kvops.verify_draft_varlen(logits, nothing, zeros, 2, draft_probs=probs)
    assert tokens.tolist() == [[best, -1, -1] for best in logits.argmax(-1).tolist()]
    assert accepted.tolist() == [0, 0]
    tokens, accepted = kvops.verify_draft_varlen(logits[:0], nothing, zeros[:1], 2)
    assert (tokens.shape, accepted.shape) == ((0, 3), (0,))
    path, tokens, accepted = kvops.verify_tree_varlen(logits[:0], nothing, nothing.int(), zeros, 2)
    assert path.tolist() == tokens.tolist() == [[-1, -1], [-1, -1]]
    assert accepted.tolist() == [0, 0]


def test_int32_tokens_give_int32_tokens(backend, device):
    logits, drafts, _, _, _ = (x.to(device) for x in request_batch(3, 2, 20))
    tokens, accepted = kvops.verify_draft(logits, drafts.int())
    assert tokens.dtype == torch.int32
    assert [tokens.tolist(), accepted.tolist()] == [x.tolist() for x in kvops.verify_draft(logits, drafts)]
    parents = int32(-1, 0, 1).to(device).expand(3, 3)
    nodes = torch.nn.functional.pad(drafts, (1, 0))
    tokens = kvops.verify_tree(logits, nodes.int(), parents)[1]
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == kvops.verify_tree(logits, nodes, parents)[1].tolist()
    text = torch.tensor([[5, 6, 7, 5, 6]], device=device)
    lens = int32(5).to(device)
    drafts, count = kvops.prompt_lookup(text.int(), lens, num_draft=2)
    assert (drafts.dtype, drafts.tolist(), count.tolist()) == (torch.int32, [[7, 5]], [2])
    with pytest.raises(TypeError, match=r"^draft_tokens: expected dtype int64 or int32, got int16"):
        kvops.verify_draft(logits, torch.zeros(3, 2, dtype=torch.int16, device=device))


def test_it_compiles_as_one_graph(device):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(logits, drafts, ends):
        return kvops.verify_draft_varlen(logits * 2, drafts, ends, 4)

    for lens in ([2, 0, 1], [4, 3]):
        ends = int32(0, *torch.tensor(lens).cumsum(0).tolist()).to(device)
        logits = torch.randn(sum(lens) + len(lens), 30, device=device)
        drafts = torch.randint(30, (sum(lens),), device=device)
        for got, want in zip(
            compiled(logits, drafts, ends), kvops.verify_draft_varlen(logits * 2, drafts, ends, 4), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_logits": torch.zeros(2, 3, 9)}, ValueError, r"target_logits: expected 2 dimensions \[rows, vocab\]"),
        ({"target_logits": torch.zeros(4, 9)}, ValueError, "target_logits: expected 5 rows, one for each of 3 drafts"),
        ({"draft_tokens": torch.zeros(3)}, TypeError, "draft_tokens: expected dtype int64 or int32"),
        ({"cu_seqlens": int32(0, 1, 3).long()}, TypeError, "cu_seqlens: expected dtype int32"),
        ({"cu_seqlens": int32(1, 2, 3)}, ValueError, "cu_seqlens: expected a leading 0, got 1"),
        ({"cu_seqlens": int32(0, 3, 3)}, ValueError, "cu_seqlens: expected lengths from 0 to max_seqlen = 2, got 3"),
        ({"cu_seqlens": int32(0, 2, 4)}, ValueError, "cu_seqlens: expected ends within the 3 tokens of draft_tokens"),
        ({"max_seqlen": -1}, ValueError, "max_seqlen: expected at least 0"),
        ({"draft_probs": torch.zeros(5, 9)}, ValueError, "draft_probs: expected shape"),
    ],
)
def test_bad_arguments_are_named(device, changes, error, message):
    arguments = {
        "target_logits": torch.zeros(5, 9),
        "draft_tokens": torch.zeros(3, dtype=torch.int64),
        "cu_seqlens": int32(0, 1, 3),
        "max_seqlen": 2,
    } | changes
    with pytest.raises(error, match=f"^{message}"):
        kvops.verify_draft_varlen(**arguments)
    if not message.startswith("target_logits: expected 5"):
        arguments = {"parents": int32(-1, -1, 0), **arguments}
        arguments["target_logits"] = arguments["target_logits"][:3]
        with pytest.raises(error, match=f"^{message}"):
            kvops.verify_tree_varlen(**arguments)
