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
        ({"temperature": 0.7}, TypeError, "temperature: expected a torch.Tensor, got float"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: expected shape \[batch\] = \[2\], got \[3\]"),
        ({"temperature": torch.ones(2), "seed": int32(1, 2)}, TypeError, "seed: expected dtype int64"),
        ({"step": int32(1, 2)}, TypeError, "step: expected dtype int64"),
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


def test_the_columns_of_logits_and_probabilities_lie_together(backend, device):
    arguments = [torch.zeros(9, 5).T, torch.zeros(3, dtype=torch.int64), int32(0, 1, 3)]
    arguments = [x.to(device) for x in arguments]
    with pytest.raises(ValueError, match=r"^target_logits: expected the last dimension contiguous"):
        kvops.verify_draft_varlen(*arguments, 2)
    arguments[0], probs = arguments[0].contiguous(), torch.full((9, 3), 1 / 9, device=device).T
    with pytest.raises(ValueError, match=r"^draft_probs: expected the last dimension contiguous"):
        kvops.verify_draft_varlen(*arguments, 2, draft_probs=probs)


def test_strided_rows_are_read_in_place(backend, device):
    logits, drafts, probs, seeds, steps = (x.to(device) for x in request_batch(2, 2, 30))
    keywords = sampling(seeds, steps, device)

    def strided(x):
        memory = torch.full((2 * len(x), *x.shape[1:]), -7 if x.dtype == torch.int64 else float("nan")).to(x)
        memory[::2] = x
        return memory[::2]

    packed = [logits.flatten(0, 1), drafts.flatten(), int32(0, 2, 4).to(device)]
    want = kvops.verify_draft(logits, drafts, draft_probs=probs, **keywords)
    got = kvops.verify_draft_varlen(
        *(strided(x) for x in packed), 2, draft_probs=strided(probs.flatten(0, 1)), **keywords
    )
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_seeds_are_drawn_once_for_all_requests(backend, device):
    logits, drafts, _, _, _ = (x.to(device) for x in request_batch(3, 2, 30))
    temperature = torch.ones(3, device=device)
    results = []
    for call in (
        lambda: kvops.verify_draft(logits, drafts, temperature=temperature),
        lambda: kvops.verify_draft_varlen(
            logits.flatten(0, 1), drafts.flatten(), int32(0, 2, 4, 6).to(device), 2, temperature=temperature
        ),
    ):
        torch.manual_seed(7)
        results.append([*call(), torch.rand(1, device=device)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_debug_mode_names_the_request_of_bad_data(backend, device, monkeypatch):
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    logits, drafts, ends = torch.zeros(5, 9), torch.tensor([1, 2, 9, 99]), int32(0, 1, 3)
    arguments = [x.to(device) for x in (logits, drafts[:3], ends)]
    with pytest.raises(ValueError, match=r"^draft_tokens: expected tokens inside .* the first at \[1, 1\]"):
        kvops.verify_draft_varlen(*arguments, 2)
    arguments[1] = drafts[[0, 1, 1]].to(device)
    kvops.verify_draft_varlen(*arguments, 2)
