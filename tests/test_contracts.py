"""What every operator owes its callers, checked across all that are registered: nobody can join and leave one out."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from contracts import CONTRACT
from torch.fx.experimental.proxy_tensor import make_fx

import kvops

DIFFERENTIABLE = {"flash_attention", "flash_attention_varlen", "merge_attention"}

# No release is without these.
FOUNDATION = {
    "attention_scores",
    "compact",
    "flash_attention",
    "flash_attention_backward",
    "paged_append",
    "paged_attention",
    "paged_schedule",
    "prompt_lookup",
    "select_blocks",
    "verify_draft",
}


B, T, HQ, HKV, D, DV, BLOCK_SIZE, MAX_BLOCKS = 2, 3, 4, 2, 8, 16, 4, 3


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ragged() -> dict[str, torch.Tensor]:
    blocks = B * HKV * MAX_BLOCKS + 1
    return {
        "k_cache": torch.randn(blocks, BLOCK_SIZE, D),
        "v_cache": torch.randn(blocks, BLOCK_SIZE, DV),
        "block_tables": torch.randperm(blocks)[: B * HKV * MAX_BLOCKS].to(torch.int32).view(B, HKV, MAX_BLOCKS),
        "seq_lens": int32([5, 3], [12, 9]),
    }


def side_arrays(cache) -> dict[str, torch.Tensor]:
    positions = torch.arange(cache["k_cache"].shape[0] * BLOCK_SIZE, dtype=torch.int32).view(-1, BLOCK_SIZE)
    return {"positions": positions, "scores": torch.rand(cache["k_cache"].shape[0], BLOCK_SIZE)}


def dropout() -> dict:
    return {"dropout_p": 0.25, "dropout_seed": torch.tensor([7])}


def flash_attention():
    q, k, v = torch.randn(B, 5, HQ, D), torch.randn(B, 7, HKV, D), torch.randn(B, 7, HKV, DV)
    sinks, bias = torch.randn(HQ), torch.randn(HQ, 5, 1)
    return (q, k, v), {"causal": True, "window_left": 4, "softcap": 3.0, "sinks": sinks, "bias": bias} | dropout()


def flash_attention_backward():
    (q, k, v), keywords = flash_attention()
    out, lse = torch.ops.kvops.flash_attention(q, k, v, **keywords)
    return (torch.randn_like(out), q, k, v, out, lse), {**keywords, "dlse": torch.randn_like(lse)}


def flash_attention_bias_backward():
    args, keywords = flash_attention_backward()
    del keywords["sinks"]
    return (*args, keywords.pop("bias")), keywords


def attention_scores():
    (q, k, v), keywords = flash_attention()
    _, lse = torch.ops.kvops.flash_attention(q, k, v, **keywords)
    for name in ("sinks", "bias", *dropout()):
        del keywords[name]
    return (q, k, lse), {**keywords, "query_start": 2, "skip_recent": 1, "reduce": "sumsq", "group": "max"}


def packed():
    lengths = int32(0, 2, 5), int32(0, 4, 7), 3, 4
    q, k, v = torch.randn(5, HQ, D), torch.randn(7, HKV, D), torch.randn(7, HKV, DV)
    keywords = {"causal": True, "window_right": 2, "sinks": torch.randn(HQ), "bias": torch.randn(HQ, 5, 1)}
    return (q, k, v), lengths, keywords | dropout()


def flash_attention_varlen():
    inputs, lengths, keywords = packed()
    return (*inputs, *lengths), keywords


def flash_attention_varlen_backward():
    inputs, lengths, keywords = packed()
    out, lse = torch.ops.kvops.flash_attention_varlen(*inputs, *lengths, **keywords)
    return (torch.randn_like(out), *inputs, out, lse, *lengths), {**keywords, "dlse": torch.randn_like(lse)}


def flash_attention_varlen_bias_backward():
    args, keywords = flash_attention_varlen_backward()
    del keywords["sinks"]
    return (*args[:6], keywords.pop("bias"), *args[6:]), keywords


def attention_scores_varlen():
    (q, k, v), lengths, keywords = packed()
    _, lse = torch.ops.kvops.flash_attention_varlen(q, k, v, *lengths, **keywords)
    for name in ("sinks", "bias", *dropout()):
        del keywords[name]
    return (q, k, lse, *lengths), {**keywords, "query_start": 1, "reduce": "max", "group": "mean"}


def merge_attention():
    a, b = (torch.randn(B, T, HQ, DV), torch.randn(B, HQ, T)), (torch.randn(B, T, HQ, DV), torch.randn(B, HQ, T))
    return (*a, *b), {}


def merge_attention_backward():
    args, _ = merge_attention()
    return (torch.randn_like(args[0]), *args), {"dlse": torch.randn_like(args[1])}


def paged_append():
    cache = ragged()
    k, v = torch.randn(B, T, HKV, D), torch.randn(B, T, HKV, DV)
    keywords = side_arrays(cache) | {"q_lens": int32(3, 2), "token_positions": int32([2, 3, 4], [9, 10, 11])}
    return (k, v, *cache.values()), keywords


def paged_attention():
    cache = ragged()
    keywords = side_arrays(cache) | {
        "q_lens": int32(3, 2),
        "query_positions": int32([50, 51, 52], [50, 51, 52]),
        "window_left": 40,
        "sinks": torch.randn(HQ),
        "score_reduce": "max",
        "score_decay": 0.5,
    }
    return (torch.randn(B, T, HQ, D), *cache.values()), keywords


def paged_latent_attention():
    (q, cache, _, *lists), _ = paged_attention()
    return (q, cache, *lists), {"value_dim": 6, "scale": 0.5, "q_lens": int32(3, 2), "softcap": 3.0}


def paged_schedule():
    return (int32([[5, 3], [12, 9]], [[0, 1], [2, 3]]), BLOCK_SIZE), {"num_programs": 5}


def select_blocks():
    cache = ragged()
    sides = side_arrays(cache)
    keywords = {"positions": sides["positions"], "protect_first": 1, "protect_last": 2, "scope": "sequence"}
    return (sides["scores"], cache["block_tables"], cache["seq_lens"], int32(2, 3)), keywords


def compact():
    cache = ragged()
    keep = torch.rand(B, HKV, MAX_BLOCKS * BLOCK_SIZE) < 0.5
    return (*cache.values(), keep), side_arrays(cache)


def copy_blocks():
    cache = ragged()
    return (cache["k_cache"], cache["v_cache"], int32(3, 0, 3), int32(1, -1, 2)), side_arrays(cache)


def verify_draft():
    logits, drafts = torch.randn(B, T + 1, 11), torch.randint(0, 11, (B, T))
    keywords = {
        "draft_lens": int32(3, 1),
        "draft_probs": torch.randn(B, T, 11).softmax(-1),
        "temperature": torch.tensor([0.0, 0.7]),
        "seed": torch.tensor([1, 2]),
        "step": torch.tensor([5, 6]),
    }
    return (logits, drafts), keywords


def verify_draft_varlen():
    keywords = verify_draft()[1] | {"draft_probs": torch.randn(4, 11).softmax(-1)}
    del keywords["draft_lens"]
    return (torch.randn(4 + B, 11), torch.randint(0, 11, (4,)), int32(0, 3, 4), T), keywords


def verify_tree():
    nodes = 4
    keywords = verify_draft()[1] | {"draft_probs": torch.randn(B, nodes, 11).softmax(-1)}
    del keywords["draft_lens"]
    parents = int32([-1, 0, 0, 2], [-1, 0, 1, -1])
    return (torch.randn(B, nodes, 11), torch.randint(0, 11, (B, nodes)), parents), keywords


def prompt_lookup():
    return (torch.randint(0, 3, (B, 20)), int32(20, 13)), {"num_draft": 4}


SAMPLES = {
    function.__name__: function
    for function in (
        flash_attention,
        flash_attention_backward,
        flash_attention_bias_backward,
        flash_attention_varlen,
        flash_attention_varlen_backward,
        flash_attention_varlen_bias_backward,
        merge_attention,
        merge_attention_backward,
        attention_scores_varlen,
        attention_scores,
        paged_append,
        paged_attention,
        paged_latent_attention,
        paged_schedule,
        select_blocks,
        compact,
        copy_blocks,
        verify_draft,
        verify_draft_varlen,
        verify_tree,
        prompt_lookup,
    )
}


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("kvops::").partition(".")[0] for name in names if name.startswith("kvops::")}


def operator(name: str):
    return getattr(torch.ops.kvops, name).default


def kernel_functions() -> dict[str, str]:
    """Operator to ``"module:function"``, as the calls of ``register`` in ``kvops/ops`` say."""
    targets = {}
    for path in (Path(kvops.__file__).parent / "ops").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "register":
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                schema = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
                targets[ast.literal_eval(schema).partition("(")[0]] = ast.literal_eval(keywords["kernel"])
    return targets


every_operator = pytest.mark.parametrize("name", sorted(registered() | FOUNDATION))


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_every_registered_operator_has_a_contract_and_a_sample():
    assert registered() >= FOUNDATION
    assert registered() - set(CONTRACT) == set()
    assert set(CONTRACT) == set(SAMPLES)


@every_operator
def test_the_schema_is_the_contract(name):
    contract = CONTRACT[name]
    schema = operator(name)._schema
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    assert [argument.name for argument in positional] == contract.positional
    assert not any(argument.has_default_value() for argument in positional)
    keywords = {
        argument.name: argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        for argument in schema.arguments
        if argument.kwarg_only
    }
    assert {keyword: keywords.get(keyword, "missing") for keyword in contract.keywords} == contract.keywords
    added = set(keywords) - set(contract.keywords)
    assert not [keyword for keyword in added if keywords[keyword] is inspect.Parameter.empty]
    written = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    assert written == contract.written
    assert len(schema.returns) == len(contract.returns)
    names = [result.name for result in schema.returns]
    assert names == contract.returns or not any(names)


@every_operator
def test_the_public_function_hands_on_what_differs_from_the_defaults(name, monkeypatch):
    """The dispatcher takes 0.5 µs for a keyword, and paged_attention has 23 of them."""
    args, keywords = SAMPLES[name]()
    handed = keywords_of(name, monkeypatch)
    getattr(kvops, name)(*args, **keywords)
    assert handed == [set(keywords)]


def test_what_is_no_value_of_a_default_is_handed_on(monkeypatch):
    """None for a flag, 1 for True: what they mean is the dispatcher's to say."""
    args, _ = paged_attention()
    handed = keywords_of("paged_attention", monkeypatch)
    kvops.paged_attention(*args, causal=1, softcap=0, scale=None)
    assert handed == [{"causal", "softcap"}]


def keywords_of(name: str, monkeypatch) -> list[set[str]]:
    """The keywords of the operator's calls, from now on."""
    handed, kind = [], type(operator(name))
    call = kind.__call__

    def noted(self, /, *args, **given):
        if self is operator(name):
            handed.append(set(given))
        return call(self, *args, **given)

    monkeypatch.setattr(kind, "__call__", noted)
    return handed


@every_operator
def test_the_public_function_takes_what_the_operator_takes(name):
    assert name in kvops.__all__
    parameters = inspect.signature(getattr(kvops, name)).parameters
    schema = operator(name)._schema
    assert list(parameters) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        parameter = parameters[argument.name]
        assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        assert parameter.default == default
        assert parameter.annotation is not inspect.Parameter.empty


@every_operator
def test_the_public_function_is_documented(name):
    function = getattr(kvops, name)
    text = inspect.getdoc(function)
    assert re.search(r"``\[[^]]+\]``", text), "no shapes"
    assert re.search(r"\bRaises\b", text)
    assert "ValueError" in text
    assert "TypeError" in text
    undocumented = [parameter for parameter in inspect.signature(function).parameters if parameter not in text]
    assert not undocumented


@every_operator
def test_opcheck(name):
    args, keywords = SAMPLES[name]()
    torch.library.opcheck(operator(name), args, keywords)


@every_operator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(name, dtype):
    """Who loads a model may well have set one: what is float32 says so itself."""
    results = []
    for default in (torch.float32, dtype):
        torch.manual_seed(0)
        args, keywords = SAMPLES[name]()
        torch.set_default_dtype(default)
        try:
            result = operator(name)(*args, **keywords)
        finally:
            torch.set_default_dtype(torch.float32)
        outputs = (result,) if isinstance(result, torch.Tensor) else result or ()
        results.append([*outputs, *(keywords[key] for key in CONTRACT[name].written & keywords.keys())])
    for one, two in zip(*results, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


@every_operator
def test_none_for_a_tensor_is_named(name):
    """The dispatcher takes None for any tensor."""
    args, keywords = SAMPLES[name]()
    tensors = [place for place, value in enumerate(args) if isinstance(value, torch.Tensor)]
    for place in tensors if len(tensors) > 1 else []:  # without any tensor the dispatcher finds nobody to ask
        wrong = [*args[:place], None, *args[place + 1 :]]
        with pytest.raises(TypeError, match=f"^{CONTRACT[name].positional[place]}: expected a torch.Tensor, got None"):
            operator(name)(*wrong, **keywords)


@every_operator
def test_gradients_are_given_or_refused_never_lost(name):
    args, keywords = SAMPLES[name]()
    differentiable = [
        value for value in (*args, *keywords.values()) if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    if name in DIFFERENTIABLE:
        leaves = [value.requires_grad_() for value in differentiable]
        out, lse = getattr(kvops, name)(*args, **keywords)
        (out.sum() + lse.sum()).backward()
        assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
        return
    for value in differentiable:
        value.requires_grad_()
        with pytest.raises(RuntimeError, match=f"kvops.{name} has no gradient"):
            getattr(kvops, name)(*args, **keywords)
        with torch.no_grad():
            value.requires_grad_(False)
    with torch.no_grad():
        operator(name)(*args, **keywords)


def differentiated(name) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The results of a sample and its leaves."""
    args, keywords = SAMPLES[name]()
    values = (*args, *keywords.values())
    leaves = [x.requires_grad_() for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()]
    out, lse = getattr(kvops, name)(*args, **keywords)
    return out, lse, leaves


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_the_first_gradient_may_be_part_of_a_graph_and_the_second_is_refused(name):
    """``create_graph=True`` was refused at the first gradient already."""
    out, lse, leaves = differentiated(name)
    loss = out.sum() + lse.sum()
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, other)
        gradient.add_(1.0)  # not a view
    with pytest.raises(RuntimeError, match=rf"^kvops\.{name} has no second derivative, only the first"):
        torch.autograd.grad(gradients[0].square().sum(), leaves)


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_what_a_differentiable_operator_returns_can_be_changed_in_place(name):
    """Autograd refuses to change a view that a function returned."""
    for options in ({}, {"causal": True}) if name == "flash_attention" else ():
        q = torch.randn(1, 5, 2, 8, requires_grad=True)
        out, lse = kvops.flash_attention(q, q, q, **options)  # torch's kernel and nothing around it
        assert out.add_(1.0).requires_grad
        assert lse.add_(1.0).requires_grad
    out, lse, leaves = differentiated(name)
    out.mul_(2.0)
    lse.add_(1.0)
    if name == "merge_attention":
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum() + lse.sum(), leaves))
    else:  # kept for the gradient, as torch's own attention keeps its result
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum() + lse.sum(), leaves)


@every_operator
def test_it_traces_into_one_node_with_symbolic_shapes(name):
    args, keywords = SAMPLES[name]()
    tensors = [value for value in (*args, *keywords.values()) if isinstance(value, torch.Tensor)]

    def call(*tensors):
        values = iter(tensors)

        def filled(value):
            return next(values) if isinstance(value, torch.Tensor) else value

        positional = [filled(value) for value in args]
        return getattr(kvops, name)(*positional, **{key: filled(value) for key, value in keywords.items()})

    graph = make_fx(call, tracing_mode="symbolic")(*tensors).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function" and "kvops" in str(node.target)]
    assert targets == [operator(name)]
    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    assert not [node for node in graph.nodes if any(word in str(node.target) for word in forbidden)]
