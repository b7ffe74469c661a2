"""verify_draft: the same tokens as one-at-a-time verification in float64, and what it promises about bad rows."""

import pytest
import speculation
import torch

import kvops

NUMBA = True
V_SIZES = [1, 2, 37, 257, 1024, 1030, 5000]


def request_batch(B, T, V, *, dtype=torch.float32, seed=0):
    """Logits near the drafter's own, so that drafts are accepted about half the time."""
    g = torch.Generator().manual_seed(seed)
    drafter = torch.randn(B, T + 1, V, generator=g) * 2
    logits = (drafter + torch.randn(B, T + 1, V, generator=g)).to(dtype)
    probs = torch.softmax(drafter[:, :T], -1)
    drafts = torch.multinomial(probs.reshape(-1, V), 1, generator=g).view(B, T) if B * T else torch.empty(B, T).long()
    seeds = torch.randint(-(2**63), 2**63 - 1, (B,), generator=g)
    steps = torch.randint(0, 2**40, (B,), generator=g)
    return logits, drafts, probs, seeds, steps


def expect_tokens(result, logits, drafts, lens, probs, temperature, seeds, steps):
    tokens, accepted = result
    T = drafts.shape[1]
    for b in range(len(logits)):
        n = T if lens is None else int(lens[b])
        want, count = speculation.verify(
            logits[b, : n + 1].double().tolist(),
            drafts[b, :n].tolist(),
            None if probs is None else probs[b, :n].double().tolist(),
            float(temperature[b]),
            int(seeds[b]),
            int(steps[b]),
        )
        assert tokens[b].tolist() == want + [-1] * (T + 1 - len(want))
        assert int(accepted[b]) == count


@pytest.mark.parametrize("V", V_SIZES)
@pytest.mark.parametrize("with_probs", [False, True])
def test_tokens_equal_one_at_a_time_verification(backend, device, V, with_probs):
    B, T = (8, 3) if V < 1000 else (4, 3)
    logits, drafts, probs, seeds, steps = request_batch(B, T, V)
    temperature = torch.tensor([1.0, 0.0, 0.5, 2.0]).repeat(B // 4)
    lens = torch.arange(B, dtype=torch.int32) % (T + 1)
    for draft_lens in (None, lens):
        result = kvops.verify_draft(
            logits.to(device),
            drafts.to(device),
            draft_lens=None if draft_lens is None else draft_lens.to(device),
            draft_probs=probs.to(device) if with_probs else None,
            temperature=temperature.to(device),
            seed=seeds.to(device),
            step=steps.to(device),
        )
        q = probs if with_probs else None
        expect_tokens([x.cpu() for x in result], logits, drafts, draft_lens, q, temperature, seeds, steps)
        assert result[0].dtype == torch.int64
        assert result[1].dtype == torch.int32


@pytest.mark.parametrize(
    ("dtype", "with_probs"), [(torch.float16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_every_implementation_emits_the_same_tokens(monkeypatch, dtype, with_probs):
    """Many seeds, also where low precision makes many ties."""
    B, T = 40, 2
    logits, drafts, probs, seeds, steps = request_batch(B, T, 67, dtype=dtype, seed=1)
    temperature = torch.rand(B) * 2
    arguments = {
        "draft_probs": probs if with_probs else None,
        "temperature": temperature,
        "seed": seeds,
        "step": steps,
    }
    results = []
    for interpret, cpu in (("0", "eager"), ("0", ""), ("1", "")):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        monkeypatch.setenv("KVOPS_CPU", cpu)
        results.append(kvops.verify_draft(logits, drafts, **arguments))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])
    assert 0 < results[0][1].float().mean() < T


def test_greedy_accepts_exactly_the_argmax_prefix(backend, device):
    logits, _, _, _, _ = request_batch(14, 5, 300)
    best = logits.argmax(-1)
    drafts = best[:, :5].clone()
    wrong = torch.arange(14) % 7
    for b, t in enumerate(wrong.tolist()):
        if t < 5:
            drafts[b, t] = (drafts[b, t] + 1) % 300
    tokens, accepted = kvops.verify_draft(logits.to(device), drafts.to(device))
    assert accepted.tolist() == wrong.clamp_max(5).tolist()
    for b, n in enumerate(accepted.tolist()):
        assert tokens[b].tolist() == best[b, : n + 1].tolist() + [-1] * (5 - n)


@pytest.mark.parametrize("V", [6, 4099, 9000])
def test_ties_go_to_the_lowest_index(backend, device, V):
    logits = torch.zeros(3, 2, V, dtype=torch.bfloat16)
    logits[1, 0, [V // 2, V - 1]] = 1
    logits[2, 0, [V - 2, V - 1]] = 1
    drafts = torch.tensor([[0], [V - 1], [V - 2]])
    tokens, accepted = kvops.verify_draft(logits.to(device), drafts.to(device))
    assert tokens.tolist() == [[0, 0], [V // 2, -1], [V - 2, 0]]
    assert accepted.tolist() == [1, 0, 1]


def test_batch_composition_changes_nothing(backend, device):
    logits, drafts, probs, seeds, steps = request_batch(5, 2, 5003)
    temperature = torch.linspace(0, 2, 5)

    def run(rows):
        return kvops.verify_draft(
            logits[rows].to(device),
            drafts[rows].to(device),
            draft_probs=probs[rows].to(device),
            temperature=temperature[rows].to(device),
            seed=seeds[rows].to(device),
            step=steps[rows].to(device),
        )

    together = run(torch.arange(5))
    shuffled = torch.tensor([3, 1, 4, 0, 2])
    for rows in (shuffled, shuffled[:3], *torch.arange(5)[:, None]):
        part = run(rows)
        assert torch.equal(part[0], together[0][rows])
        assert torch.equal(part[1], together[1][rows])


def test_seed_and_step_decide_and_repeat(backend, device):
    logits = torch.zeros(4, 1, 1000, device=device)
    drafts = torch.empty(4, 0, dtype=torch.int64, device=device)
    one = torch.ones(4, device=device)
    seed = torch.tensor([5, 5, 6, 5 + 2**32], device=device)
    step = torch.tensor([1, 2, 1, 1], device=device)
    first, _ = kvops.verify_draft(logits, drafts, temperature=one, seed=seed, step=step)
    again, _ = kvops.verify_draft(logits, drafts, temperature=one, seed=seed, step=step)
    assert torch.equal(first, again)
    assert first.unique().numel() == 4
    without_step, _ = kvops.verify_draft(logits, drafts, temperature=one, seed=seed)
    zero_step, _ = kvops.verify_draft(logits, drafts, temperature=one, seed=seed, step=torch.zeros_like(seed))
    assert torch.equal(without_step, zero_step)


def test_without_a_seed_torch_s_generator_governs(backend, device):
    logits = torch.zeros(8, 1, 1000, device=device)
    drafts = torch.empty(8, 0, dtype=torch.int64, device=device)
    draws = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        draws.append(kvops.verify_draft(logits, drafts, temperature=torch.ones(8, device=device))[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].unique().numel() > 4


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's inf - inf
@pytest.mark.parametrize("temperature", [None, 1.0])
@pytest.mark.parametrize("poison", ["nan", "all -inf", "+inf"])
@pytest.mark.parametrize(("V", "method"), [(7, "token"), (4100, "token"), (7, "block")])
def test_a_bad_row_refuses_its_request_only(backend, device, temperature, poison, V, method):
    """Row 1 of request 1 is bad: it keeps the draft accepted before and gets no further token; request 2 never
    comes to its bad row 2."""
    logits = torch.full((3, 3, V), -30.0)
    best = torch.tensor([3, 1, 5])
    logits[:, torch.arange(3), best] = 30.0
    drafts = best[:2].repeat(3, 1)
    drafts[2, 1] = 2
    for b, t in ((1, 1), (2, 2)):
        if poison == "nan":
            logits[b, t, V // 2] = float("nan")
        else:
            logits[b, t] = float("-inf")
        if poison == "+inf":
            logits[b, t, V - 1] = float("inf")
    given = {}
    if temperature is not None:
        given = {"temperature": torch.full((3,), temperature, device=device), "seed": torch.arange(3, device=device)}
    tokens, accepted = kvops.verify_draft(logits.to(device), drafts.to(device), method=method, **given)
    assert tokens.tolist() == [[3, 1, 5], [3, -1, -1], [3, 1, -1]]
    assert accepted.tolist() == [2, 1, 1]


def test_minus_infinity_is_never_emitted(backend, device):
    V, B = 40, 16
    logits = torch.randn(B, 3, V)
    logits[:, :, 5:] = float("-inf")
    drafts = torch.randint(0, V, (B, 2))
    for probs in (None, torch.full((B, 2, V), 1 / V, device=device)):
        tokens, _ = kvops.verify_draft(
            logits.to(device),
            drafts.to(device),
            draft_probs=probs,
            temperature=torch.ones(B, device=device),
            seed=torch.arange(B, device=device),
        )
        assert int(tokens.max()) < 5
        assert int(tokens[:, 0].min()) >= 0


@pytest.mark.parametrize("outside", [-1, 11, 2**40])
@pytest.mark.parametrize("with_probs", [False, True])
def test_a_draft_outside_the_vocabulary_ends_the_draft(backend, device, outside, with_probs):
    """The position then draws from the target itself, as behind a draft of that length."""
    logits, drafts, probs, seeds, _ = request_batch(6, 3, 11)
    drafts[:, 1] = outside
    given = {
        "draft_probs": probs.to(device) if with_probs else None,
        "temperature": (torch.arange(6) % 3).float().to(device),
        "seed": seeds.to(device),
    }
    tokens, accepted = kvops.verify_draft(logits.to(device), drafts.to(device), **given)
    shorter = torch.ones(6, dtype=torch.int32, device=device)
    want = kvops.verify_draft(logits.to(device), drafts.to(device), draft_lens=shorter, **given)
    assert torch.equal(tokens, want[0])
    assert torch.equal(accepted, want[1])
    assert int(accepted.max()) == 1


@pytest.mark.parametrize("method", ["token", "block"])
def test_rows_past_the_draft_length_are_not_looked_at(backend, device, method):
    logits, drafts, probs, seeds, steps = request_batch(8, 4, 50)
    lens = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2], dtype=torch.int32)
    given = {"temperature": torch.ones(8, device=device), "seed": seeds.to(device), "step": steps.to(device)}
    results = []
    for poison in (False, True):
        for b, n in enumerate(lens.tolist() if poison else []):
            logits[b, n + 1 :] = float("nan")
            probs[b, n:] = float("nan")
            drafts[b, n:] = 3
        results.append(
            kvops.verify_draft(
                logits.to(device),
                drafts.to(device),
                draft_lens=lens.to(device),
                draft_probs=probs.to(device),
                method=method,
                **given,
            )
        )
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][1].cpu() <= lens).all()


def test_lengths_out_of_range_are_clamped(backend, device):
    logits, drafts, _, _, _ = request_batch(2, 2, 9)
    drafts = logits[:, :2].argmax(-1)
    lens = torch.tensor([-3, 100], dtype=torch.int32, device=device)
    _, accepted = kvops.verify_draft(logits.to(device), drafts.to(device), draft_lens=lens)
    assert accepted.tolist() == [0, 2]


def test_any_stride_but_the_last(backend, device):
    logits, drafts, probs, seeds, steps = (x.to(device) for x in request_batch(6, 3, 130))
    temperature = torch.ones(6, device=device)
    want = kvops.verify_draft(logits, drafts, draft_probs=probs, temperature=temperature, seed=seeds, step=steps)

    def spread(x):
        """The same numbers at other strides: first two dimensions swapped, every second element, NaN or -9 between."""
        filler = float("nan") if x.is_floating_point() else -9
        if x.dim() == 1:
            wide = torch.full((len(x), 2), filler, dtype=x.dtype, device=device)
            wide[:, 0] = x
            return wide[:, 0]
        wide = torch.full((x.shape[1], 2 * x.shape[0], *x.shape[2:]), filler, dtype=x.dtype, device=device)
        wide[:, ::2] = x.transpose(0, 1)
        return wide[:, ::2].transpose(0, 1)

    got = kvops.verify_draft(
        spread(logits),
        spread(drafts),
        draft_lens=spread(torch.full((6,), 3, dtype=torch.int32, device=device)),
        draft_probs=spread(probs),
        temperature=spread(temperature),
        seed=spread(seeds),
        step=spread(steps),
    )
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's 1 / 1e-42
def test_extreme_temperatures(backend, device):
    """Close to 0 is greedy, infinite is uniform over what is finite, below 0 and NaN are greedy."""
    B, V = 24, 64
    logits = torch.randn(B, 1, V)
    logits[:, :, 3:] = float("-inf")
    drafts = torch.empty(B, 0, dtype=torch.int64)
    temperature = torch.tensor([1e-30, 1e-42, -1.0, float("nan")] + [float("inf")] * (B - 4))
    tokens, _ = kvops.verify_draft(
        logits.to(device), drafts.to(device), temperature=temperature.to(device), seed=torch.arange(B, device=device)
    )
    assert torch.equal(tokens[:4, 0].cpu(), logits[:4, 0].argmax(-1))
    assert sorted(tokens[4:].unique().tolist()) == [0, 1, 2]


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_no_drafts_and_no_requests(backend, device, temperature):
    for B, T in ((0, 0), (0, 3), (3, 0)):
        logits, drafts, probs, seeds, _ = (x.to(device) for x in request_batch(B, T, 20))
        given = {}
        if temperature is not None:
            given = {"temperature": torch.full((B,), temperature, device=device), "seed": seeds, "draft_probs": probs}
        tokens, accepted = kvops.verify_draft(logits, drafts, **given)
        assert tokens.shape == (B, T + 1)
        assert accepted.tolist() == [0] * B
        assert ((tokens >= 0) & (tokens < 20)).all()


def test_the_largest_vocabulary(backend, device):
    V = 262144
    logits = torch.randn(2, 2, V).half()
    logits[0, 1, V - 1] = 30.0
    drafts = torch.tensor([[int(logits[0, 0].argmax())], [V - 1]])
    temperature = torch.tensor([0.0, 1.0])
    tokens, accepted = kvops.verify_draft(
        logits.to(device), drafts.to(device), temperature=temperature.to(device), seed=torch.arange(2, device=device)
    )
    assert tokens[0].tolist() == [int(drafts[0, 0]), V - 1]
    assert accepted.tolist() == [1, 0]
    p = torch.softmax(logits[1, 0].double(), -1)
    p[V - 1] = 0
    assert int(tokens[1, 0]) == speculation.race(p.tolist(), 0, 1, 0)


def test_a_residual_lost_in_rounding_still_emits_a_token(backend, device):
    """p equals q and the draft is refused all the same (q is a little too large): the argmax stands in."""
    logits = torch.randn(12, 2, 9)
    q = torch.softmax(logits[:, :1], -1) * 1.5
    drafts = torch.randint(0, 9, (12, 1))
    tokens, accepted = kvops.verify_draft(
        logits.to(device),
        drafts.to(device),
        draft_probs=q.to(device),
        temperature=torch.ones(12, device=device),
        seed=torch.arange(12, device=device),
    )
    refused = (accepted == 0).cpu()
    assert refused.any()
    assert torch.equal(tokens[:, 0].cpu()[refused], logits[:, 0].argmax(-1)[refused])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_logits": torch.zeros(2, 9)}, ValueError, "target_logits: expected 3 dimensions"),
        ({"target_logits": torch.zeros(2, 4, 9).double()}, TypeError, "target_logits: expected dtype float16"),
        ({"target_logits": torch.zeros(2, 9, 4).transpose(1, 2)}, ValueError, "target_logits: expected the last dim"),
        ({"target_logits": torch.zeros(2, 0, 9)}, ValueError, r"target_logits.shape\[1\]"),
        ({"target_logits": torch.zeros(2, 4, 0)}, ValueError, r"target_logits.shape\[2\]"),
        ({"draft_tokens": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "draft_tokens: expected dtype int64"),
        ({"draft_tokens": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "draft_tokens: expected shape"),
        ({"draft_tokens": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "draft_tokens: expected shape"),
        ({"draft_tokens": torch.zeros(2, 3, dtype=torch.int64, device="meta")}, ValueError, "draft_tokens: expected t"),
        ({"draft_lens": torch.zeros(3, dtype=torch.int32)}, ValueError, "draft_lens: expected shape"),
        ({"draft_lens": torch.zeros(2)}, TypeError, "draft_lens: expected dtype int32"),
        ({"draft_probs": torch.zeros(2, 3, 9).half()}, TypeError, "draft_probs: expected dtype float32"),
        ({"draft_probs": torch.zeros(2, 4, 9)}, ValueError, "draft_probs: expected shape"),
        ({"draft_probs": torch.zeros(2, 9, 3).transpose(1, 2)}, ValueError, "draft_probs: expected the last dim"),
        ({"temperature": torch.zeros(2).double()}, TypeError, "temperature: expected dtype float32"),
        ({"temperature": torch.zeros(2, 1)}, ValueError, "temperature: expected shape"),
        ({"seed": torch.zeros(2, dtype=torch.int32)}, TypeError, "seed: expected dtype int64"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, ValueError, "seed: expected shape"),
        ({"step": torch.zeros(2)}, TypeError, "step: expected dtype int64"),
        ({"step": torch.zeros(3, dtype=torch.int64)}, ValueError, "step: expected shape"),
        ({"seed": None}, ValueError, "seed: expected int64"),
        ({"method": "tree"}, ValueError, "method: expected one of 'token', 'block', got 'tree'"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {
        "target_logits": torch.zeros(2, 4, 9),
        "draft_tokens": torch.zeros(2, 3, dtype=torch.int64),
        "temperature": torch.ones(2),
        "seed": torch.zeros(2, dtype=torch.int64),
    } | changes
    positional = arguments.pop("target_logits"), arguments.pop("draft_tokens")
    with pytest.raises(error, match=f"^{message}"):
        torch.ops.kvops.verify_draft(*positional, **arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("draft_tokens", torch.tensor([[1, 9]]), r"draft_tokens: expected tokens inside .* the first at \[0, 1\]"),
        ("draft_tokens", torch.tensor([[-2, 1]]), "draft_tokens: expected tokens inside"),
        ("draft_lens", torch.tensor([3], dtype=torch.int32), "draft_lens: expected lengths"),
        ("draft_lens", torch.tensor([-1], dtype=torch.int32), "draft_lens: expected lengths"),
        ("temperature", torch.tensor([-1.0]), "temperature: expected finite"),
        ("temperature", torch.tensor([float("nan")]), "temperature: expected finite"),
        ("target_logits", torch.full((1, 3, 9), float("nan")), "target_logits: expected rows"),
        ("target_logits", torch.full((1, 3, 9), float("-inf")), "target_logits: expected rows"),
        ("target_logits", torch.full((1, 3, 9), float("inf")), "target_logits: expected rows"),
        ("draft_probs", torch.full((1, 2, 9), 0.2), "draft_probs: expected rows of probabilities"),
        ("draft_probs", torch.full((1, 2, 9), float("nan")), "draft_probs: expected rows of probabilities"),
        ("draft_probs", torch.eye(9)[None, 3:5], "draft_probs: expected a positive probability"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_debug_mode_names_bad_data(backend, device, monkeypatch, name, value, message):
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    arguments = {
        "target_logits": torch.zeros(1, 3, 9),
        "draft_tokens": torch.tensor([[1, 2]]),
        "temperature": torch.ones(1),
        "seed": torch.zeros(1, dtype=torch.int64),
    }
    arguments = {key: x.to(device) for key, x in arguments.items()}
    kvops.verify_draft(**arguments)  # as it should be
    arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=f"^{message}"):
        kvops.verify_draft(**arguments)
    monkeypatch.setenv("KVOPS_DEBUG", "0")
    tokens, _ = kvops.verify_draft(**arguments)
    assert ((tokens >= -1) & (tokens < 9)).all()


def test_debug_mode_ignores_what_is_never_used(device, monkeypatch):
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    logits = torch.zeros(1, 3, 9, device=device)
    logits[:, 2] = float("nan")
    drafts = torch.tensor([[1, 77]], device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    kvops.verify_draft(logits, drafts, draft_lens=one)
    kvops.verify_draft(logits[:, :2], torch.full((1, 1), -1, device=device))


def test_a_gradient_is_refused(device):
    logits = torch.zeros(1, 1, 9, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="verify_draft has no gradient"):
        kvops.verify_draft(logits, torch.empty(1, 0, dtype=torch.int64, device=device))


@pytest.mark.parametrize("mode", ["greedy", "point mass", "probs", "block"])
def test_opcheck(backend, device, mode):
    logits, drafts, probs, seeds, steps = (x.to(device) for x in request_batch(3, 2, 20))
    arguments = {"draft_lens": torch.tensor([0, 1, 2], dtype=torch.int32, device=device)}
    if mode != "greedy":
        arguments |= {"temperature": torch.ones(3, device=device), "seed": seeds, "step": steps}
    if mode in ("probs", "block"):
        arguments["draft_probs"] = probs
    if mode == "block":
        arguments["method"] = "block"
    torch.library.opcheck(torch.ops.kvops.verify_draft.default, (logits, drafts), arguments)


def test_compiles_as_one_graph_with_dynamic_shapes(backend, device):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(logits, drafts, temperature, seed):
        tokens, accepted = kvops.verify_draft(logits * 2, drafts, temperature=temperature, seed=seed)
        return tokens + 1, accepted

    for B, T, V in ((2, 3, 40), (4, 2, 90)):
        logits, drafts, _, seeds, _ = (x.to(device) for x in request_batch(B, T, V))
        temperature = torch.ones(B, device=device)
        tokens, accepted = compiled(logits, drafts, temperature, seeds)
        want = kvops.verify_draft(logits * 2, drafts, temperature=temperature, seed=seeds)
        assert torch.equal(tokens, want[0] + 1)
        assert torch.equal(accepted, want[1])
