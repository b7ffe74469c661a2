"""process_logits: each filter against transformers' own, drafts as context, and speculation that stays lossless."""

import math

import pytest
import torch
from speculation import chi_square
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import kvops

V = 300
CONTEXT = torch.tensor([[5, 7, 5, 9, 2, 2], [1, 2, 3, -1, -1, -1], [-1, -1, -1, -1, -1, -1]])


def logits_batch(T=1, vocab=V, dtype=torch.float32):
    return (torch.randn(3, T, vocab) * 3).to(dtype)


def expect_same_distribution(actual, expected):
    assert actual.dtype == torch.float32
    assert torch.equal(actual == -math.inf, expected == -math.inf)
    torch.testing.assert_close(torch.softmax(actual, -1), torch.softmax(expected.float(), -1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "processor"),
    [
        ({"temperature": 0.7}, TemperatureLogitsWarper(0.7)),
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_k": 1000}, TopKLogitsWarper(1000)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"top_p": 0.01}, TopPLogitsWarper(0.01)),
        ({"top_p": 1.0}, lambda ids, x: x),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
        ({"min_p": 0.0}, lambda ids, x: x),
        ({"top_k": 0}, lambda ids, x: x),
        ({"repetition_penalty": 1.7, "context": CONTEXT}, RepetitionPenaltyLogitsProcessor(1.7)),
        ({"bad_words": [[4], [2, 11], [9, 2, 2, 30], [2, 2, 31]], "context": CONTEXT}, "bad words"),
    ],
)
@pytest.mark.parametrize("vocab", [V, 5000])
def test_each_filter_equals_the_one_of_transformers(arguments, processor, vocab):
    if processor == "bad words":
        processor = NoBadWordsLogitsProcessor(arguments["bad_words"], eos_token_id=0)
    x = logits_batch(vocab=vocab)
    got = kvops.process_logits(x, **arguments)
    for b in range(3):
        ids = CONTEXT[b : b + 1]
        want = processor(ids[:, : int((ids >= 0).sum())], x[b])
        expect_same_distribution(got[b], want)


@pytest.mark.parametrize("vocab", [V, 5000])
def test_filters_come_in_their_order(vocab):
    x = logits_batch(vocab=vocab)
    got = kvops.process_logits(
        x, temperature=1.5, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.3, context=CONTEXT
    )
    for b in range(3):
        ids = CONTEXT[b : b + 1]
        want = RepetitionPenaltyLogitsProcessor(1.3)(ids[:, : int((ids >= 0).sum())], x[b])
        for step in (TemperatureLogitsWarper(1.5), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)):
            want = step(ids, want)
        expect_same_distribution(got[b], want)


def test_requests_have_their_own_numbers():
    x = logits_batch(2, vocab=3000)
    arguments = {
        "temperature": torch.tensor([0.5, 0.0, 2.0]),
        "top_k": torch.tensor([0, 7, 2000]),
        "top_p": torch.tensor([0.9, 1.0, 0.99]),
        "min_p": torch.tensor([0.0, 0.0, 0.02]),
        "repetition_penalty": torch.tensor([1.0, 1.2, 2.0]),
        "presence_penalty": torch.tensor([0.0, 0.5, 0.0]),
        "frequency_penalty": torch.tensor([0.2, 0.0, 0.1]),
    }
    together = kvops.process_logits(x, context=CONTEXT, **arguments)
    for b in range(3):
        alone = kvops.process_logits(
            x[b : b + 1], context=CONTEXT[b : b + 1], **{name: value[b].item() for name, value in arguments.items()}
        )
        expect_same_distribution(together[b], alone[0])
    assert torch.equal(together[1].argmax(-1), kvops.process_logits(
        x[1:2], context=CONTEXT[1:2], repetition_penalty=1.2, presence_penalty=0.5
    )[0].argmax(-1))  # fmt: skip


def test_requests_have_their_own_bad_words_and_biases():
    x = logits_batch(2)
    words = [[[4], [2, 11]], [], [[4], [7]]]
    biases = [{5: -3.0, 6: 1.5}, None, {4: 100.0}]
    drafts = torch.tensor([[2], [2], [2]])
    keywords = {"context": CONTEXT, "draft_tokens": drafts, "repetition_penalty": 1.3}
    together = kvops.process_logits(x, bad_words=words, logit_bias=biases, **keywords)
    table = torch.zeros(3, V)
    table[0, 5], table[0, 6], table[2, 4] = -3.0, 1.5, 100.0
    assert torch.equal(together, kvops.process_logits(x, bad_words=words, logit_bias=table, **keywords))
    for b in range(3):
        own = {name: value[b : b + 1] for name, value in keywords.items() if isinstance(value, torch.Tensor)}
        alone = kvops.process_logits(
            x[b : b + 1], bad_words=words[b], logit_bias=biases[b] or {}, repetition_penalty=1.3, **own
        )
        assert torch.equal(together[b : b + 1], alone)
    assert torch.equal(together[0, :, 4].isinf(), torch.tensor([True, True]))
    assert torch.equal(together[0, :, 11].isinf(), torch.tensor([True, True]))  # the text ends with 2, and so the draft
    assert together[1].isfinite().all()
    everybody_without = kvops.process_logits(x, bad_words=[[], [], []])
    assert torch.equal(everybody_without, x)
    assert kvops.process_logits(x, logit_bias={7: -math.inf})[..., 7].eq(-math.inf).all()
    shifted = kvops.process_logits(x, logit_bias=torch.full((V,), 2.0))
    assert torch.equal(shifted, x + 2.0)


def test_min_p_can_come_before_top_p_as_in_vllm():
    """By hand: of 0.5, 0.3, 0.15, 0.05 min-p 0.2 leaves 10/19, 6/19, 3/19; top-p 0.84 then needs two of them, and three
    of the four."""
    x = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]).log()
    kept = kvops.process_logits(x, top_p=0.84, min_p=0.2, min_p_first=True)[0, 0].isfinite()
    assert kept.tolist() == [True, True, False, False]
    kept = kvops.process_logits(x, top_p=0.84, min_p=0.2)[0, 0].isfinite()
    assert kept.tolist() == [True, True, True, False]
    x = logits_batch(vocab=5000)
    got = kvops.process_logits(x, temperature=1.5, top_k=40, top_p=0.9, min_p=0.05, min_p_first=True)
    for b in range(3):
        want = TemperatureLogitsWarper(1.5)(None, x[b])
        for step in (MinPLogitsWarper(0.05), TopKLogitsWarper(40), TopPLogitsWarper(0.9)):
            want = step(None, want)
        expect_same_distribution(got[b], want)


def test_int32_tokens_are_taken():
    x, drafts = logits_batch(2), torch.tensor([[2], [3], [8]])
    keywords = {"frequency_penalty": 0.5, "bad_words": [[2, 2], [3, 5]]}
    want = kvops.process_logits(x, context=CONTEXT, draft_tokens=drafts, **keywords)
    assert torch.equal(kvops.process_logits(x, context=CONTEXT.int(), draft_tokens=drafts.int(), **keywords), want)


def test_ties_are_cut_to_the_lower_index():
    x = torch.zeros(1, 1, 2000)
    x[0, 0, 1500] = 1
    kept = kvops.process_logits(x, top_k=4)[0, 0].isfinite().nonzero()[:, 0].tolist()
    assert kept == [0, 1, 2, 1500]
    kept = kvops.process_logits(x[:, :, :10], top_p=0.55)[0, 0].isfinite().nonzero()[:, 0].tolist()
    assert kept == list(range(6))
    assert kvops.process_logits(x, top_p=0.5)[0, 0].isfinite().sum() in (999, 1000, 1001)


def test_penalties_count_what_is_behind_the_prompt():
    x = torch.zeros(3, 1, 12)
    got = kvops.process_logits(
        x, presence_penalty=1.0, frequency_penalty=0.25, context=CONTEXT, prompt_lens=torch.tensor([2, 3, 0])
    )
    want = torch.zeros(3, 1, 12)
    want[0, 0, 5], want[0, 0, 9], want[0, 0, 2] = -1.25, -1.25, -1.5
    assert torch.equal(got, want)


def test_a_row_stands_behind_its_drafts():
    """Row t equals the only row of a call whose context already holds the first t drafts."""
    x = logits_batch(4)
    drafts = torch.tensor([[2, 30, 2], [11, 2, -1], [8, 8, 8]])
    arguments = {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "bad_words": [[2, 30], [30, 2, 4], [8, 8, 8, 1], [3, 11, 2, 7], [6]],
        "prompt_lens": torch.tensor([1, 2, 0]),
    }
    together = kvops.process_logits(x, context=CONTEXT, draft_tokens=drafts, **arguments)
    for t in range(4):
        for b in range(3):
            text = [*CONTEXT[b][CONTEXT[b] >= 0].tolist(), *[d for d in drafts[b, :t].tolist() if d >= 0]]
            own = {**arguments, "prompt_lens": arguments["prompt_lens"][b : b + 1]}
            context = torch.tensor([text], dtype=torch.int64).reshape(1, -1)
            alone = kvops.process_logits(x[b : b + 1, t : t + 1], context=context, **own)
            if b == 1 and t == 3:
                continue  # behind a padded draft nothing is verified
            assert torch.equal(together[b, t], alone[0, 0]), (b, t)


def test_a_node_of_a_tree_stands_behind_its_ancestors():
    """Each row equals the last one of the chain of its ancestors; node 0 is the context's last token."""
    x = logits_batch(5)
    parents = torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 1, 2, 3], [-1, 0, 0, 0, -1]], dtype=torch.int32)
    drafts = torch.tensor([[2, 30, 2, 2, 11], [3, 2, 30, 2, 4], [8, 8, 9, 8, -1]])
    arguments = {
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.3,
        "bad_words": [[2, 30], [30, 2, 4], [8, 1], [3, 2, 7], [2, 11, 5], [9, 2, 2, 30, 6]],
        "prompt_lens": torch.tensor([1, 2, 0]),
    }
    together = kvops.process_logits(x, context=CONTEXT, draft_tokens=drafts, parents=parents, **arguments)
    for b in range(3):
        own = {**arguments, "prompt_lens": arguments["prompt_lens"][b : b + 1]}
        for node in range(5):
            way, at = [], node
            while parents[b, at] >= 0:
                way.insert(0, int(drafts[b, at]))
                at = int(parents[b, at])
            chain = torch.tensor([way], dtype=torch.int64).reshape(1, -1)
            rows = x[b : b + 1, node : node + 1].expand(1, len(way) + 1, V)
            alone = kvops.process_logits(rows, context=CONTEXT[b : b + 1], draft_tokens=chain, **own)
            if node and parents[b, node] < 0:
                continue  # padding
            assert torch.equal(together[b, node], alone[0, -1]), (b, node)
    with pytest.raises(ValueError, match=r"^draft_tokens: expected int64 \[batch, rows\] along with parents"):
        kvops.process_logits(x, parents=parents)


def test_logits_are_not_changed_in_place():
    x = logits_batch()
    before = x.clone()
    kvops.process_logits(
        x, temperature=0.5, bad_words=[[1]], top_k=3, min_p=0.1, frequency_penalty=1.0, context=CONTEXT
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_processed_in_float32(dtype):
    x = logits_batch(2, dtype=dtype)
    arguments = {"temperature": 0.3, "top_p": 0.9}
    assert torch.equal(kvops.process_logits(x, **arguments), kvops.process_logits(x.float(), **arguments))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(default):
    """In bfloat16 a temperature of 0.7 was one of 0.6992, and 257 occurrences were 256."""
    logits, context = torch.randn(1, 2, 9), torch.zeros(1, 300, dtype=torch.int64)
    filters = {"temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
    expected = kvops.process_logits(logits, **filters, context=context)
    torch.set_default_dtype(default)
    try:
        processed = kvops.process_logits(logits, **filters, context=context)
    finally:
        torch.set_default_dtype(torch.float32)
    assert processed.dtype == torch.float32
    assert torch.equal(processed, expected)


def test_hopeless_rows_stay_hopeless():
    x = torch.zeros(3, 1, 4)
    x[0] = -math.inf
    x[1, 0, 2] = math.nan
    for arguments in ({"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}, {"temperature": 0.5}, {"bad_words": [[0]]}):
        row_max = kvops.process_logits(x, **arguments).amax(-1)
        assert not row_max[:2].isfinite().any()
        assert row_max[2].isfinite()
    assert (kvops.process_logits(x, bad_words=[[0], [1], [2], [3]])[2] == -math.inf).all()
    assert kvops.process_logits(x[:0], top_k=2).shape == (0, 1, 4)
    assert kvops.process_logits(torch.ones(1, 1, 4) * 3e38, temperature=1e-20).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature: expected a number from 0"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a number from 0"),
        ({"temperature": math.inf}, ValueError, "temperature: expected a number from 0"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number or"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature: expected shape"),
        ({"top_k": -1}, ValueError, "top_k: expected at least 0"),
        ({"top_k": 1.5}, TypeError, "top_k: expected an int"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k: expected dtype int32"),
        ({"top_p": 1.1}, ValueError, "top_p: expected a number from 0.0 to 1.0"),
        ({"min_p": -0.1}, ValueError, "min_p: expected a number"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty: expected a number"),
        ({"repetition_penalty": math.inf}, ValueError, "repetition_penalty: expected a number"),
        ({"presence_penalty": math.inf}, ValueError, "presence_penalty: expected a number"),
        ({"frequency_penalty": -math.inf}, ValueError, "frequency_penalty: expected a number"),
        ({"context": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "context: expected shape"),
        ({"context": torch.zeros(3, 3)}, TypeError, "context: expected dtype int64"),
        ({"prompt_lens": torch.zeros(2, dtype=torch.int32)}, ValueError, "prompt_lens: expected shape"),
        ({"draft_tokens": torch.zeros(3, 0, dtype=torch.int64)}, ValueError, r"draft_tokens.shape\[1\]: expected at l"),
        ({"draft_tokens": torch.zeros(3, 1)}, TypeError, "draft_tokens: expected dtype int64 or int32"),
        ({"bad_words": [5]}, TypeError, "bad_words: expected sequences of tokens, such as"),
        ({"bad_words": [[1.5]]}, TypeError, "bad_words: expected whole numbers"),
        ({"bad_words": [[]]}, ValueError, "bad_words: expected sequences"),
        ({"bad_words": [[V]]}, ValueError, "bad_words: expected sequences"),
        ({"bad_words": [[[1]], []]}, ValueError, "bad_words: expected sequences of tokens for all requests, or a list"),
        ({"bad_words": [[[1]], [], [2]]}, TypeError, "bad_words: expected sequences of tokens, such as"),
        ({"logit_bias": {V: 1.0}}, ValueError, f"logit_bias: expected tokens inside the vocabulary of {V}"),
        ({"logit_bias": {1: math.inf}}, ValueError, "logit_bias: expected numbers below inf, got inf of token 1"),
        ({"logit_bias": {1: math.nan}}, ValueError, "logit_bias: expected numbers below inf, got nan of token 1"),
        ({"logit_bias": {"a": 1.0}}, TypeError, "logit_bias: expected whole numbers"),
        ({"logit_bias": [{1: 1.0}]}, ValueError, "logit_bias: expected a mapping for each of 3 requests, got 1"),
        ({"logit_bias": 3.0}, TypeError, "logit_bias: expected a mapping from tokens to numbers"),
        ({"logit_bias": torch.zeros(V).double()}, TypeError, "logit_bias: expected dtype float32"),
        ({"logit_bias": torch.zeros(2, V)}, ValueError, "logit_bias: expected shape"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        kvops.process_logits(logits_batch(2), **arguments)
    with pytest.raises(TypeError, match=r"^logits: expected dtype"):
        kvops.process_logits(logits_batch().double())


def test_compiles_as_one_graph():
    def process(x, top_k, context):
        return kvops.process_logits(
            x, temperature=0.8, top_k=top_k, top_p=0.9, repetition_penalty=1.2, context=context, bad_words=[[1, 2]]
        )

    compiled = torch.compile(process, fullgraph=True, backend="aot_eager", dynamic=True)
    for T, vocab in ((1, 50), (3, 2000)):
        x, top_k = logits_batch(T, vocab), torch.tensor([5, 0, 20])
        assert torch.equal(compiled(x, top_k, CONTEXT), process(x, top_k, CONTEXT))


TRIALS = 200_000


@pytest.mark.parametrize("sees_drafts", [True, False])
def test_speculation_with_filters_is_lossless(sees_drafts):
    """Penalties that see the drafts, top-p and temperature on both sides; leaving the drafts out is found out."""
    vocab, generator = 5, torch.Generator().manual_seed(5)
    target, drafter = torch.randn(2, 1 + vocab, vocab, generator=generator)
    filters = {"temperature": 0.9, "top_p": 0.93, "repetition_penalty": 1.5, "frequency_penalty": 0.8}

    def rows(table, drafts, see=True):
        """The processed rows behind nothing and behind each of the drafts."""
        x = table[torch.stack((torch.zeros_like(drafts), 1 + drafts), 1)]
        context = torch.ones(len(drafts), 2, dtype=torch.int64)
        return kvops.process_logits(x, context=context, draft_tokens=drafts[:, None] if see else None, **filters)

    every = torch.arange(vocab)
    first = torch.softmax(rows(drafter, every)[0, 0], -1)
    drafts = torch.multinomial(first.expand(TRIALS, vocab), 1)[:, 0]
    tokens, accepted = kvops.verify_draft(
        rows(target, drafts, sees_drafts),
        drafts[:, None],
        draft_probs=first.expand(TRIALS, 1, vocab),
        temperature=torch.ones(TRIALS),
        seed=torch.arange(TRIALS),
    )
    exact = torch.softmax(rows(target, every).double(), -1)
    more = torch.multinomial(exact[tokens[:, 0], 1], 1)[:, 0]
    outcome = tokens[:, 0] * vocab + torch.where(accepted > 0, tokens[:, 1], more)
    expected = (exact[0, 0][:, None] * exact[:, 1]).flatten()
    assert (chi_square(outcome, expected) > 1e-4) == sees_drafts


def test_numbers_in_tensors_are_looked_at_on_demand(monkeypatch):
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    for name, value in (("temperature", -1.0), ("top_p", math.nan), ("top_k", -1)):
        numbers = torch.tensor([0, value, 0], dtype=torch.int32 if name == "top_k" else torch.float32)
        with pytest.raises(ValueError, match=rf"^{name}: expected numbers .* got 1 that are not, the first at \[1\]"):
            kvops.process_logits(logits_batch(), **{name: numbers})


def test_a_nan_is_not_hidden_by_a_bad_word():
    """The row was made one of finite numbers, and sampled from."""
    logits = torch.tensor([[[1.0, float("nan"), 2.0]]])
    assert kvops.process_logits(logits, bad_words=[[1]]).isnan().any()
    assert kvops.process_logits(logits, bad_words=[[0]]).isnan().any()


@pytest.mark.parametrize("name", ["context", "prompt_lens", "draft_tokens", "parents"])
def test_what_is_no_tensor_is_refused_by_name(name):
    with pytest.raises(TypeError, match=f"{name}: expected a torch.Tensor, got str"):
        kvops.process_logits(torch.zeros(1, 1, 5), **{name: "x"})
