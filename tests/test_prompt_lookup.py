"""prompt_lookup: the longest earlier occurrence of the current suffix, as found by looking at all of them."""

import pytest
import torch

import kvops

NUMBA = True


def lookup(text, num_draft, max_ngram, min_ngram):
    """One text, a list of tokens -> its draft."""
    for n in range(max_ngram, min_ngram - 1, -1):
        starts = [end for end in range(n, len(text)) if text[end - n : end] == text[len(text) - n :]]
        whole = [start for start in starts if start + num_draft <= len(text)]
        if starts:
            start = whole[-1] if whole else starts[0]
            return text[start : start + num_draft]
    return []


def expect_drafts(result, texts, num_draft, max_ngram, min_ngram):
    tokens, lens = result
    assert tokens.dtype == torch.int64
    assert lens.dtype == torch.int32
    assert tokens.shape == (len(texts), num_draft)
    for b, text in enumerate(texts):
        draft = lookup(text, num_draft, max_ngram, min_ngram)
        assert int(lens[b]) == len(draft)
        assert tokens[b].tolist() == draft + [-1] * (num_draft - len(draft))


def packed(texts, device, width=None):
    """tokens and lens of the texts; what stands past a text would match it."""
    width = max([1, *map(len, texts)]) if width is None else width
    tokens = torch.zeros(len(texts), width, dtype=torch.int64)
    for b, text in enumerate(texts):
        tokens[b, : len(text)] = torch.tensor(text, dtype=torch.int64)
        tokens[b, len(text) :] = text[-1] if text else 0
    lens = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    return tokens.to(device), lens.to(device)


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([1, 2, 3, 9, 8, 7, 1, 2, 3], [9, 8, 7, 1]),
        ([1, 2, 3, 9, 5, 3, 6, 1, 2, 3], [9, 5, 3, 6]),  # three tokens early beat one token late
        ([7, 3, 1, 7, 3, 2, 0, 7, 3], [2, 0, 7, 3]),  # the later of two equals
        ([4, 4], [4]),
        ([4, 4, 4, 4], [4]),  # overlapping itself, it stops at the end of the text
        ([4] * 6, [4, 4, 4]),  # none has 4 tokens behind it: the one with most
        ([4] * 20, [4] * 4),  # a run of one token
        ([0, 8, 9, 8, 9, 8, 9, 8, 9], [8, 9, 8, 9]),  # periods of two
        ([7, 3, 1, 0, 7, 3, 2, 0, 0, 7, 3], [2, 0, 0, 7]),  # the later of two that have 4 tokens behind them
        ([7, 3, 1, 0, 0, 7, 3, 2, 7, 3], [1, 0, 0, 7]),  # the later has 3: the earlier
        ([5, 6, 5], [6, 5]),
        ([1, 2, 3, 4], []),
        ([1], []),
        ([], []),
    ],
)
def test_small_texts(backend, device, text, draft):
    tokens, lens = kvops.prompt_lookup(*packed([text], device), num_draft=4)
    assert tokens[0].tolist() == draft + [-1] * (4 - len(draft))
    assert int(lens[0]) == len(draft)


@pytest.mark.parametrize(
    ("max_ngram", "min_ngram", "num_draft"), [(3, 1, 5), (1, 1, 1), (4, 2, 7), (2, 2, 70), (9, 3, 4)]
)
def test_a_ragged_batch_equals_a_search_of_each_text(backend, device, max_ngram, min_ngram, num_draft):
    generator = torch.Generator().manual_seed(max_ngram)
    lengths = [0, 1, 2, 3, 17, 64, 65, 150]
    texts = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in lengths]
    result = kvops.prompt_lookup(*packed(texts, device), num_draft=num_draft, max_ngram=max_ngram, min_ngram=min_ngram)
    expect_drafts(result, texts, num_draft, max_ngram, min_ngram)


def test_a_text_of_several_tiles(backend, device):
    """Matches before, across and behind the border of a kernel's tile."""
    texts = []
    for place in (0, 2045, 2046, 2047, 2048, 4095, 4990):
        text = list(range(10, 5003))
        text[place : place + 3] = [1, 2, 3]
        texts.append([*text, 1, 2, 3])
    texts.append(list(range(5000)))
    expect_drafts(kvops.prompt_lookup(*packed(texts, device), num_draft=6), texts, 6, 3, 1)


def test_no_room_no_text_no_batch(backend, device):
    tokens, lens = kvops.prompt_lookup(*packed([[1, 1]], device), num_draft=0)
    assert tokens.shape == (1, 0)
    assert lens.tolist() == [0]
    empty = torch.empty(2, 0, dtype=torch.int64, device=device)
    zero = torch.zeros(2, dtype=torch.int32, device=device)
    tokens, lens = kvops.prompt_lookup(empty, zero, num_draft=3)
    assert tokens.tolist() == [[-1] * 3] * 2
    assert lens.tolist() == [0, 0]
    tokens, lens = kvops.prompt_lookup(empty[:0], zero[:0], num_draft=3)
    assert tokens.shape == (0, 3)


def test_rows_may_lie_apart_and_lens_may_be_strided(backend, device):
    texts = [[1, 2, 1], [3, 3]]
    tokens, lens = packed(texts, device)
    wide = torch.full((4, 7), 9, device=device)
    wide[::2, :3] = tokens
    spread = torch.zeros(2, 2, dtype=torch.int64, device=device)
    spread[:, 0] = lens
    expect_drafts(kvops.prompt_lookup(wide[::2, :3], spread[:, 0], num_draft=4), texts, 4, 3, 1)


def test_lengths_out_of_range_are_clamped_or_named(backend, device, monkeypatch):
    tokens = torch.tensor([[1, 2, 1]], device=device)
    for length, draft in ((50, [2, 1]), (-4, [])):
        lens = torch.tensor([length], dtype=torch.int32, device=device)
        got, count = kvops.prompt_lookup(tokens, lens, num_draft=2)
        assert got[0, : int(count)].tolist() == draft
        monkeypatch.setenv("KVOPS_DEBUG", "1")
        with pytest.raises(ValueError, match=r"^lens: expected lengths from 0"):
            kvops.prompt_lookup(tokens, lens, num_draft=2)
        monkeypatch.setenv("KVOPS_DEBUG", "0")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": torch.zeros(8, dtype=torch.int64)}, ValueError, "tokens: expected 2 dimensions"),
        ({"tokens": torch.zeros(2, 8)}, TypeError, "tokens: expected dtype int64 or int32"),
        ({"tokens": torch.zeros(8, 2, dtype=torch.int64).T}, ValueError, "tokens: expected the last dimension"),
        ({"lens": torch.zeros(3, dtype=torch.int32)}, ValueError, "lens: expected shape"),
        ({"lens": torch.zeros(2)}, TypeError, "lens: expected dtype int32"),
        ({"lens": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "lens: expected the device"),
        ({"num_draft": -1}, ValueError, "num_draft: expected at least 0"),
        ({"min_ngram": 0}, ValueError, "min_ngram: expected at least 1"),
        ({"max_ngram": 1, "min_ngram": 2}, ValueError, "max_ngram: expected at least 2"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {
        "tokens": torch.zeros(2, 8, dtype=torch.int64),
        "lens": torch.zeros(2, dtype=torch.int32),
        "num_draft": 3,
    } | changes
    with pytest.raises(error, match=f"^{message}"):
        kvops.prompt_lookup(arguments.pop("tokens"), arguments.pop("lens"), **arguments)


def test_opcheck(backend, device):
    tokens, lens = packed([[1, 2, 1, 2], [3]], device)
    torch.library.opcheck(torch.ops.kvops.prompt_lookup.default, (tokens, lens), {"num_draft": 3})


def test_compiles_as_one_graph_with_dynamic_shapes(backend, device):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(tokens, lens):
        drafts, count = kvops.prompt_lookup(tokens + 1, lens, num_draft=3)
        return drafts - 1, count

    for texts in ([[1, 2, 1], [4, 4]], [[5, 1, 5], [1], [2, 2, 2, 2]]):
        tokens, lens = packed(texts, device)
        got = compiled(tokens, lens)
        want = kvops.prompt_lookup(tokens + 1, lens, num_draft=3)
        assert torch.equal(got[0], want[0] - 1)
        assert torch.equal(got[1], want[1])
