"""verify_tree: the same walk as one child at a time in float64, the target's distribution, and bad trees."""

import pytest
import speculation
import torch
from speculation import chi_square
from test_verify import request_batch

import kvops
from kvops.eager import philox
from kvops.eager import verify_tree as eager

NUMBA = True
SHAPES = [
    [-1, 0, 0, 0, 1, 1, 2],
    [-1, 0, 1, 2, 3, 4, 5],
    [-1, 0, 0, 0, 0, 0, 0],
    [-1, 0, 1, 0, -1, 2, -1],
    [-1, -1, -1, -1, -1, -1, -1],
    [-1, 0, 0, 1, 2, 3, 4],
]


@pytest.fixture(autouse=True)
def _faults_are_put_into_the_eager_code(request, monkeypatch):
    if request.node.name.startswith("test_fault"):
        monkeypatch.setenv("KVOPS_CPU", "eager")


def tree_batch(V, *, dtype=torch.float32, repeat=1):
    """Trees of all SHAPES; each node is drawn from a drafter's distribution at its parent."""
    parents = torch.tensor(SHAPES * repeat, dtype=torch.int32)
    B, N = parents.shape
    logits, _, probs, seeds, steps = request_batch(B, N, V, dtype=dtype)
    logits = logits[:, :N].contiguous()
    at_parent = probs.gather(1, parents.long().clamp_min(0)[..., None].expand(B, N, V))
    drafts = torch.multinomial(at_parent.reshape(-1, V), 1, generator=torch.Generator().manual_seed(3)).view(B, N)
    return logits, drafts, parents, at_parent, seeds, steps


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's 0 / 0 where nothing is left
@pytest.mark.parametrize("V", [1, 6, 40, 1030])
@pytest.mark.parametrize("with_probs", [False, True])
def test_walks_equal_one_child_at_a_time(backend, device, V, with_probs):
    logits, drafts, parents, probs, seeds, steps = tree_batch(V)
    B, N = parents.shape
    temperature = torch.tensor([1.0, 0.6, 2.0, 0.0, 1.0, 1.5])
    path, tokens, accepted = kvops.verify_tree(
        logits.to(device),
        drafts.to(device),
        parents.to(device),
        draft_probs=probs.to(device) if with_probs else None,
        temperature=temperature.to(device),
        seed=seeds.to(device),
        step=steps.to(device),
    )
    assert (path.dtype, tokens.dtype, accepted.dtype) == (torch.int32, torch.int64, torch.int32)
    for b in range(B):
        want_path, want = speculation.verify_tree(
            logits[b].double().tolist(),
            drafts[b].tolist(),
            parents[b].tolist(),
            probs[b].double().tolist() if with_probs else None,
            float(temperature[b]),
            int(seeds[b]),
            int(steps[b]),
        )
        assert path[b].tolist() == want_path + [-1] * (N - len(want_path))
        assert tokens[b].tolist() == want + [-1] * (N - len(want))
        assert int(accepted[b]) == len(want_path) - 1


@pytest.mark.parametrize("with_probs", [False, True])
def test_many_siblings_of_many_requests(monkeypatch, with_probs):
    """Four siblings and a grandchild over five tokens: what each refusal leaves decides often, equal tokens too."""
    trees = 30
    logits, _, probs, seeds, steps = request_batch(trees, 6, 5)
    logits = logits[:, :6]
    parents = torch.tensor([-1, 0, 0, 0, 0, 2], dtype=torch.int32).expand(trees, 6)
    probs = probs[:, [0, 0, 0, 0, 0, 2]].roll(1, 0)  # another tree's drafter, so that many are refused
    drafts = torch.multinomial(probs.reshape(-1, 5), 1, generator=torch.Generator().manual_seed(3)).view(trees, 6)
    sampling = {"temperature": torch.full((trees,), 1.5), "seed": seeds, "step": steps}
    results = []
    for interpret, cpu in (("0", "eager"), ("0", ""), ("1", "")):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        monkeypatch.setenv("KVOPS_CPU", cpu)
        results.append(
            kvops.verify_tree(logits, drafts, parents, draft_probs=probs if with_probs else None, **sampling)
        )
    for eager_result, *others in zip(*results, strict=True):
        for other in others:
            assert torch.equal(eager_result, other)
    assert len(results[0][0][:, 1].unique()) >= 4


def test_greedy_follows_the_argmax(backend, device):
    logits, drafts, parents, _, _, _ = tree_batch(50)
    best = logits.argmax(-1)
    for b, n in ((0, 2), (0, 6), (1, 1), (1, 2), (2, 6), (3, 3)):
        drafts[b, n] = best[b, parents[b, n]]
    path, tokens, accepted = kvops.verify_tree(logits.to(device), drafts.to(device), parents.to(device))
    assert [p[: n + 1] for p, n in zip(path.tolist(), accepted.tolist(), strict=True)] == [
        [0, 2, 6],
        [0, 1, 2],
        [0, 6],
        [0, 3],
        [0],
        [0],
    ]
    for b, n in enumerate(accepted.tolist()):
        assert tokens[b, : n + 1].tolist() == best[b, path[b, : n + 1].long().cpu()].tolist()
        assert (tokens[b, n + 1 :] == -1).all()
        assert (path[b, n + 1 :] == -1).all()


@pytest.mark.parametrize("with_probs", [False, True])
def test_a_chain_emits_the_tokens_of_verify_draft(backend, device, with_probs):
    B, T, V = 6, 3, 30
    logits, drafts, probs, seeds, steps = (x.to(device) for x in request_batch(B, T, V))
    chain = torch.arange(-1, T, dtype=torch.int32, device=device).expand(B, T + 1)
    sampling = {"temperature": torch.linspace(0, 2, B, device=device), "seed": seeds, "step": steps}
    want = kvops.verify_draft(logits, drafts, draft_probs=probs if with_probs else None, **sampling)
    nodes = torch.nn.functional.pad(drafts, (1, 0), value=-5)
    node_probs = torch.nn.functional.pad(probs, (0, 0, 1, 0), value=float("nan"))
    path, tokens, accepted = kvops.verify_tree(
        logits, nodes, chain, draft_probs=node_probs if with_probs else None, **sampling
    )
    assert torch.equal(tokens, want[0])
    assert torch.equal(accepted, want[1])
    assert torch.equal(path >= 0, tokens >= 0)


def test_batch_composition_and_strides_change_nothing(backend, device):
    logits, drafts, parents, probs, seeds, steps = tree_batch(300)
    temperature = torch.ones(len(parents))
    arguments = [x.to(device) for x in (logits, drafts, parents, probs, temperature, seeds, steps)]

    def run(x, d, parent, q, t, s, n):
        return kvops.verify_tree(x, d, parent, draft_probs=q, temperature=t, seed=s, step=n)

    together = run(*arguments)
    rows = torch.tensor([4, 0, 2], device=device)
    for got, want in zip(run(*(x[rows] for x in arguments)), together, strict=True):
        assert torch.equal(got, want[rows])
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x for x in arguments]
    strided[-1] = torch.stack((strided[-1], strided[-1]), 1)[:, 0]
    for got, want in zip(run(*strided), together, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("temperature", [None, 1.0])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's inf - inf
def test_bad_rows_and_bad_nodes(backend, device, temperature):
    """A bad row ends its request's walk; nodes outside the vocabulary and later parents are never reached."""
    V = 9
    logits = torch.full((5, 4, V), -40.0)
    logits[:, :, 3] = 40.0
    drafts = torch.full((5, 4), 3)
    parents = torch.tensor([[-1, 0, 1, 2]] * 5, dtype=torch.int32)
    logits[0, 1, 0] = float("nan")
    logits[1, 2] = float("-inf")
    logits[2, 0, 8] = float("inf")
    drafts[3, 1] = V
    parents[4, 1] = 2
    sampling = {}
    if temperature is not None:
        sampling = {"temperature": torch.ones(5, device=device), "seed": torch.arange(5, device=device)}
    path, tokens, accepted = kvops.verify_tree(logits.to(device), drafts.to(device), parents.to(device), **sampling)
    assert accepted.tolist() == [1, 2, 0, 0, 0]
    assert tokens.tolist() == [[3, -1, -1, -1], [3, 3, -1, -1], [-1, -1, -1, -1], [3, -1, -1, -1], [3, -1, -1, -1]]
    assert path.tolist() == [[0, 1, -1, -1], [0, 1, 2, -1], [0, -1, -1, -1], [0, -1, -1, -1], [0, -1, -1, -1]]


def test_no_requests_and_a_root_alone(backend, device):
    for B, N in ((0, 3), (2, 1)):
        parents = torch.full((B, N), -1, dtype=torch.int32, device=device)
        drafts = torch.full((B, N), -1, device=device)
        logits = torch.randn(B, N, 12, device=device)
        one, seed = torch.ones(B, device=device), torch.arange(B, device=device)
        for sampling in ({}, {"temperature": one, "seed": seed}):
            path, tokens, accepted = kvops.verify_tree(logits, drafts, parents, **sampling)
            assert path.shape == tokens.shape == (B, N)
            assert path.tolist() == [[0]] * B
            assert accepted.tolist() == [0] * B
            assert (tokens[:, :1] >= 0).all()


def test_the_mask_holds_each_node_s_ancestors(device):
    parents = torch.tensor([*SHAPES, [-1, 0, 1, 2, 3, 4, 5]], dtype=torch.int32)
    mask = kvops.tree_mask(parents.to(device)).cpu()
    assert mask.dtype == torch.bool
    for b, tree in enumerate(parents.tolist()):
        for node in range(len(tree)):
            seen, at = set(), node
            while at >= 0:
                seen.add(at)
                at = tree[at]
            assert set(mask[b, node].nonzero()[:, 0].tolist()) == seen
    chain = torch.arange(-1, 99, dtype=torch.int32)[None]
    assert torch.equal(kvops.tree_mask(chain)[0], torch.ones(100, 100, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match=r"^parents: expected 2 dimensions"):
        kvops.tree_mask(parents[0])
    with pytest.raises(TypeError, match=r"^parents: expected dtype int32"):
        kvops.tree_mask(parents.float())


# The distribution: three children, two of them with two children, over a vocabulary of five.

TRIALS, V, TEMPERATURE, PASS = 200_000, 5, 0.8, 1e-4
_generator = torch.Generator().manual_seed(11)
TARGET = torch.randn(1 + V + V * V, V, generator=_generator)
DRAFTER = torch.softmax(TARGET + torch.randn(TARGET.shape, generator=_generator), -1)
TREE = [-1, 0, 0, 0, 1, 1, 2, 2]


def draw_children(q, count, siblings):
    """``count`` children of nodes with distributions q [trials, V], and what each was drawn from."""
    drafts, rows = [], []
    for _ in range(count):
        draft = torch.multinomial(q, 1)[:, 0]
        drafts.append(draft)
        rows.append(q)
        if siblings == "without replacement":
            q = q.scatter(1, draft[:, None], 0.0)
            q = q / q.sum(1, keepdim=True)
    return drafts, rows


def decode_two(siblings, *, trials=TRIALS, wire=lambda logits, drafts, probs: (logits, drafts, probs)):
    """The first two tokens of each trial as one number; where one was accepted or none, plain sampling goes on."""
    root = torch.zeros(trials, dtype=torch.int64)
    context, drafts, probs = [root], [root], [DRAFTER[root]]
    for node, count in ((0, 3), (1, 2), (2, 2)):
        q = DRAFTER[context[node]]
        if siblings == "point mass":  # any tokens, equal ones among them
            q = torch.full_like(q, 1 / V)
        children, rows = draw_children(q, count, siblings)
        drafts += children
        probs += rows
        if node == 0:
            context += [1 + child for child in children]
    for node in range(4, 8):
        context.append(1 + V + drafts[TREE[node]] * V + drafts[node])
    logits, nodes = TARGET[torch.stack(context, 1)], torch.stack(drafts, 1)
    rows = None if siblings == "point mass" else torch.stack(probs, 1)
    logits, nodes, rows = wire(logits, nodes, rows)
    sampling = {"temperature": torch.full((trials,), TEMPERATURE), "seed": torch.arange(trials)}
    parents = torch.tensor(TREE, dtype=torch.int32).expand(trials, 8)
    _, tokens, accepted = kvops.verify_tree(logits, nodes, parents, draft_probs=rows, **sampling)
    first = tokens[:, 0]
    more, _ = kvops.verify_draft(TARGET[1 + first][:, None], nodes[:, :0], step=torch.ones_like(first), **sampling)
    return first * V + torch.where(accepted > 0, tokens[:, 1], more[:, 0])


def expected():
    p = torch.softmax(TARGET.double() / TEMPERATURE, -1)
    return (p[0][:, None] * p[1 : 1 + V]).flatten()


@pytest.mark.parametrize("siblings", ["point mass", "independent", "without replacement"])
@pytest.mark.parametrize("cpu", ["eager", ""])
def test_two_tokens_are_distributed_as_the_target_s(siblings, cpu, monkeypatch):
    monkeypatch.setenv("KVOPS_CPU", cpu)
    assert chi_square(decode_two(siblings), expected()) > PASS


def test_fault_siblings_without_replacement_said_to_be_independent():
    def same_row(logits, drafts, probs):
        return logits, drafts, torch.stack([probs[:, TREE.index(max(parent, 0), 1)] for parent in TREE], 1)

    assert chi_square(decode_two("without replacement", trials=60_000, wire=same_row), expected()) < PASS


def test_fault_residual_not_renormalised_between_siblings(monkeypatch):
    monkeypatch.setattr(eager, "row_sum", lambda residual: torch.ones(len(residual)))
    assert chi_square(decode_two("independent", trials=60_000), expected()) < PASS


def test_fault_one_stream_for_acceptance_and_residual(monkeypatch):
    monkeypatch.setattr(philox, "RESAMPLE", philox.ACCEPT)
    assert chi_square(decode_two("independent", trials=60_000), expected()) < PASS


def test_fault_one_number_for_all_siblings(monkeypatch):
    def shared(stream, position, seed, step):
        return philox.uniform(stream, torch.zeros_like(position), seed, step)

    monkeypatch.setattr(eager, "uniform", shared)
    assert chi_square(decode_two("independent", trials=60_000), expected()) < PASS


@pytest.mark.parametrize("siblings", ["point mass", "independent"])
def test_fault_temperature_on_one_side(siblings):
    def colder(logits, drafts, probs):
        return logits * TEMPERATURE, drafts, probs

    assert chi_square(decode_two(siblings, trials=60_000, wire=colder), expected()) < PASS


def test_fault_logits_of_the_parent():
    def off_by_one(logits, drafts, probs):
        return logits[:, [0, 0, 0, 0, *range(4, 8)]], drafts, probs

    assert chi_square(decode_two("point mass", trials=60_000, wire=off_by_one), expected()) < PASS


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_logits": torch.zeros(2, 9)}, ValueError, "target_logits: expected 3 dimensions"),
        ({"target_logits": torch.zeros(2, 4, 9).double()}, TypeError, "target_logits: expected dtype float16"),
        ({"target_logits": torch.zeros(2, 9, 4).transpose(1, 2)}, ValueError, "target_logits: expected the last dim"),
        ({"target_logits": torch.zeros(2, 0, 9)}, ValueError, r"target_logits.shape\[1\]"),
        ({"draft_tokens": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "draft_tokens: expected dtype int64"),
        ({"draft_tokens": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "draft_tokens: expected shape"),
        ({"parents": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "parents: expected dtype int32"),
        ({"parents": torch.zeros(4, 2, dtype=torch.int32)}, ValueError, "parents: expected shape"),
        ({"parents": torch.zeros(2, 4, dtype=torch.int32, device="meta")}, ValueError, "parents: expected the device"),
        ({"draft_probs": torch.zeros(2, 3, 9)}, ValueError, "draft_probs: expected shape"),
        ({"draft_probs": torch.zeros(2, 4, 9).half()}, TypeError, "draft_probs: expected dtype float32"),
        ({"temperature": torch.zeros(3)}, ValueError, "temperature: expected shape"),
        ({"step": torch.zeros(2)}, TypeError, "step: expected dtype int64"),
        ({"seed": None}, ValueError, "seed: expected int64"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {
        "target_logits": torch.zeros(2, 4, 9),
        "draft_tokens": torch.zeros(2, 4, dtype=torch.int64),
        "parents": torch.full((2, 4), -1, dtype=torch.int32),
        "temperature": torch.ones(2),
        "seed": torch.zeros(2, dtype=torch.int64),
    } | changes
    positional = [arguments.pop(name) for name in ("target_logits", "draft_tokens", "parents")]
    with pytest.raises(error, match=f"^{message}"):
        torch.ops.kvops.verify_tree(*positional, **arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("parents", torch.tensor([[-1, 1, 0]], dtype=torch.int32), "parents: expected -1 for the root"),
        ("parents", torch.tensor([[0, 0, 0]], dtype=torch.int32), "parents: expected -1 for the root"),
        ("parents", torch.tensor([[-1, -2, 0]], dtype=torch.int32), "parents: expected -1 for the root"),
        ("draft_tokens", torch.tensor([[0, 9, 1]]), "draft_tokens: expected tokens inside"),
        ("temperature", torch.tensor([-1.0]), "temperature: expected finite"),
        ("target_logits", torch.full((1, 3, 9), float("nan")), "target_logits: expected rows"),
        ("draft_probs", torch.full((1, 3, 9), 0.2), "draft_probs: expected rows of probabilities"),
        ("draft_probs", torch.eye(9)[None, 3:6], "draft_probs: expected a positive probability"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_debug_mode_names_bad_data(backend, device, monkeypatch, name, value, message):
    monkeypatch.setenv("KVOPS_DEBUG", "1")
    arguments = {
        "target_logits": torch.zeros(1, 3, 9),
        "draft_tokens": torch.tensor([[-1, 1, 2]]),
        "parents": torch.tensor([[-1, 0, 0]], dtype=torch.int32),
        "temperature": torch.ones(1),
        "seed": torch.zeros(1, dtype=torch.int64),
    }
    arguments = {key: x.to(device) for key, x in arguments.items()}
    kvops.verify_tree(**arguments)  # as it should be
    arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=f"^{message}"):
        kvops.verify_tree(**arguments)
    monkeypatch.setenv("KVOPS_DEBUG", "0")
    _, tokens, _ = kvops.verify_tree(**arguments)
    assert ((tokens >= -1) & (tokens < 9)).all()


@pytest.mark.parametrize("mode", ["greedy", "point mass", "probs"])
def test_opcheck(backend, device, mode):
    logits, drafts, parents, probs, seeds, steps = (x.to(device) for x in tree_batch(20))
    arguments = {}
    if mode != "greedy":
        arguments = {"temperature": torch.ones(len(seeds), device=device), "seed": seeds, "step": steps}
    if mode == "probs":
        arguments["draft_probs"] = probs
    torch.library.opcheck(torch.ops.kvops.verify_tree.default, (logits, drafts, parents), arguments)


def test_compiles_as_one_graph_with_dynamic_shapes(device):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(logits, drafts, parents, temperature, seed):
        mask = kvops.tree_mask(parents)
        return *kvops.verify_tree(logits * 2, drafts, parents, temperature=temperature, seed=seed), mask

    for V in (40, 90):
        logits, drafts, parents, _, seeds, _ = (x.to(device) for x in tree_batch(V))
        rows = slice(0, 3) if V == 40 else slice(None)
        logits, drafts, parents, seeds = logits[rows], drafts[rows], parents[rows], seeds[rows]
        temperature = torch.ones(len(seeds), device=device)
        *got, mask = compiled(logits, drafts, parents, temperature, seeds)
        want = kvops.verify_tree(logits * 2, drafts, parents, temperature=temperature, seed=seeds)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(mask, kvops.tree_mask(parents))
