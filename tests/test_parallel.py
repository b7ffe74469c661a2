"""Context and tensor parallelism: two, three and four gloo processes compute what one process computes."""

import processes
import pytest
import torch
from oracle import assert_accurate, attention_mask
from oracle import attention as exact_attention
from parallel_scenarios import (
    ATTENTION,
    CONFIG,
    EVEN,
    PAIR,
    PROMPTS,
    TRIO,
    WORLD,
    inputs,
    loss_of,
    model_weights,
    run,
)
from rounding import rounded

from kvops.generation.generate import generate
from kvops.models.llama import Llama
from kvops.parallel import _cells, _Mask, _order, _steps
from kvops.policies import Compression, SnapKV

SIZES = [len(PAIR), len(TRIO), WORLD]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By (processes, scenario): what each process came to, in the order of their ranks."""
    folder = tmp_path_factory.mktemp("parallel")
    processes.start(run, folder, WORLD)
    by_rank = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    ranks = {len(PAIR): PAIR, len(TRIO): TRIO, WORLD: range(WORLD)}
    return {(size, name): [by_rank[rank][size, name] for rank in ranks[size]] for size, name in by_rank[PAIR[0]]}


def whole(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """The sequence put together from every process's chunks: rank r holds numbers r and 2 P - 1 - r."""
    chunks = [part.chunk(2, dim) for part in parts]
    return torch.cat([first for first, _ in chunks] + [second for _, second in reversed(chunks)], dim)


def same_document(ends: list[int], tokens: int) -> torch.Tensor:
    """bool [tokens, tokens]: whether two tokens belong to the same document, and to one at all."""
    document = torch.bucketize(torch.arange(tokens), torch.tensor(ends), right=True)
    return (document[:, None] == document) & (document < len(ends))


def seen_in_the_ring(mask: _Mask, size: int, chunk: int) -> torch.Tensor:
    """int [tokens, tokens]: how often a query's row meets a key in the calls of all processes."""
    total = 2 * size * chunk
    seen = torch.zeros(total, total, dtype=torch.int64)
    tokens = torch.arange(total).split(chunk)
    places = [torch.cat((tokens[_order(size)[2 * rank]], tokens[_order(size)[2 * rank + 1]])) for rank in range(size)]
    for rank in range(size):
        for step in range(_steps(mask, size, chunk)):
            for cell in _cells(mask, step, rank, size, chunk):
                rows, columns = places[rank][cell.rows], places[(rank - step) % size][cell.columns]
                windows = {"window_left": cell.window_left, "window_right": cell.window_right}
                visible = attention_mask(len(rows), len(columns), causal=cell.causal, **windows)
                if cell.documents is not None:
                    visible = visible & same_document(list(cell.documents), len(rows))
                assert len(rows) > 0
                assert len(columns) > 0
                seen[rows[:, None], columns] += visible
    return seen


def test_the_calls_of_a_ring_cover_what_the_mask_shows_exactly_once():
    generator = torch.Generator().manual_seed(2)

    def number(high):
        return int(torch.randint(high, (), generator=generator))

    for _ in range(300):
        size, chunk = 1 + number(4), 1 + number(5)
        total = 2 * size * chunk
        causal, windows = number(2) == 0, [number(total + 2) - 1 if number(2) else -1 for _ in range(2)]
        ends = sorted({0, *(number(total + 1) for _ in range(number(6)))}) if number(2) else None
        mask = _Mask(causal, windows[0], 0 if causal else windows[1], None if ends is None else tuple(ends))
        want = attention_mask(total, total, causal=causal, window_left=windows[0], window_right=windows[1])
        if ends is not None:
            want = want & same_document(ends, total)
        assert torch.equal(seen_in_the_ring(mask, size, chunk), want.long()), (mask, size, chunk)


def test_shards_that_no_row_sees_do_not_travel():
    plain, alone = _Mask(True, -1, 0, None), _Mask(True, 0, 0, None)
    by_chunks = _Mask(True, -1, 0, tuple(range(0, 81, 10)))
    assert [_steps(mask, 4, 10) for mask in (plain, alone, by_chunks)] == [4, 1, 1]
    # A document over the two chunks in the middle, which are on the last process.
    assert _steps(_Mask(True, -1, 0, (0, 10, 20, 30, 50, 60)), 4, 10) == 1
    assert not _cells(_Mask(True, 3, 0, None), 2, 0, 4, 10)


def oracle(case: str) -> dict[str, torch.Tensor]:
    options = {key: value for key, value in ATTENTION[case].items() if key != "method"}
    x = {name: value.double() for name, value in inputs(sinks=options.pop("sinks", False)).items()}
    ends = options.pop("cu_seqlens", None)
    if ends is not None:
        x = {name: value if name == "sinks" else value[:1] for name, value in x.items()}
    leaves = {name: x[name].requires_grad_() for name in ("q", "k", "v", "sinks") if name in x}
    windows = {name: options.pop(name, -1) for name in ("window_left", "window_right")}
    mask = attention_mask(48, 48, causal=options.pop("causal", True), **windows)
    if ends is not None:
        mask = mask & same_document(ends, 48)
    out, lse, _ = exact_attention(
        leaves["q"], leaves["k"], leaves["v"], mask=mask, sinks=leaves.get("sinks"), **options
    )
    loss_of(out, lse, x).backward()
    return {"out": out.detach(), "lse": lse.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_over_processes_is_attention(results, size, case):
    exact, same = oracle(case), rounded(torch.float32, oracle, case)
    parts = results[size, case]
    assert set(parts[0]) == set(exact)
    for name in exact:
        if name == "dsinks":
            actual = parts[0][name]
        else:
            actual = whole([part[name] for part in parts], 2 if name == "lse" else 1)
        assert_accurate(actual, exact[name], same[name], name)


def model_alone() -> dict[str, torch.Tensor]:
    """The model on one process in float64 with the oracle's attention: hidden states, logits, loss, gradients."""
    model = Llama(CONFIG, {name: weight.double() for name, weight in model_weights().items()})
    tokens = torch.tensor(PROMPTS[:1])
    length = tokens.shape[1]

    def attend(layer, q, k, v):
        return exact_attention(q, k, v, mask=attention_mask(length, length, causal=True))[0]

    hidden = model(tokens, torch.arange(length)[None], attend)
    logits = model.logits(hidden)
    targets = tokens.roll(-1, 1).flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return {"hidden": hidden.detach(), "logits": logits.detach(), "loss": loss.detach()} | gradients


@pytest.fixture(scope="module")
def alone():
    return model_alone(), rounded(torch.float32, model_alone)


@pytest.mark.parametrize("size", EVEN)
def test_a_sequence_spread_over_processes_trains_as_on_one(results, alone, size):
    exact, same = alone
    for part in results[size, "training"]:
        assert set(part) == set(exact) - {"logits"}
        for name, actual in part.items():
            assert_accurate(actual, exact[name], same[name], name)


@pytest.mark.parametrize("size", EVEN)
def test_a_model_split_by_heads_gives_the_logits_and_gradients_of_the_whole(results, alone, size):
    exact, same = alone
    parts = results[size, "tensor parallel"]
    for part in parts:
        assert part["kv_heads"] == CONFIG.num_kv_heads // size
        assert_accurate(part["logits"], exact["logits"], same["logits"], "logits")
    for name in parts[0]["gradients"]:
        shards = [part["gradients"][name] for part in parts]
        expected, arithmetic = exact[name], same[name]
        if ".qkv." in name or ".gate_up." in name:  # q, k, v (gate, up) of each process lie one behind the other
            widths = [CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.num_kv_heads] if "qkv" in name else [1, 1]
            rows = [shards[0].shape[0] * width // sum(widths) for width in widths]
            split = [shard.split(rows) for shard in shards]
            actual = torch.cat([torch.cat(part) for part in zip(*split, strict=True)])
        elif name.endswith((".out.weight", ".down.weight")):
            actual = torch.cat(shards, 1)
        else:
            assert all(torch.equal(shard, shards[0]) for shard in shards), f"{name}: differs between processes"
            actual = shards[0]
        assert_accurate(actual, expected, arithmetic, name)


@pytest.mark.parametrize("size", EVEN)
def test_a_model_split_by_heads_generates_the_tokens_of_the_whole(results, size):
    model = Llama(CONFIG, model_weights())
    plain = generate(model, PROMPTS, max_new_tokens=12).tokens
    compression = Compression(ratio=3, policy=SnapKV(scope="head"), protect_first=1, protect_last=4)
    compressed = generate(model, PROMPTS, max_new_tokens=12, compression=compression)
    assert compressed.tokens != plain, "compression changes nothing here, so the test shows nothing"
    for part in results[size, "tensor parallel"]:
        assert part["tokens"] == plain
        assert part["drafted"] == plain
        assert part["compressed"] == compressed.tokens
        assert part["blocks"] * size == compressed.stats.blocks_in_use


@pytest.mark.parametrize("size", EVEN)
def test_what_does_not_divide_is_named(results, size):
    for messages in results[size, "refusals"]:
        assert messages["shard"].startswith(f"x: expected a multiple of {2 * size} along dimension 1")
        assert messages["heads"].startswith(f"num_kv_heads: expected a multiple of the mesh's {size} processes, got 3")
        assert messages["documents"].startswith("cu_seqlens: expected ends in ascending order, of at most the ")
        assert messages["slopes"].startswith("alibi_slopes: expected None without causal")
        assert messages["lengths"].startswith("k: expected the 4 tokens that q has")
