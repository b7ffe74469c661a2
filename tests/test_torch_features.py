"""What torch offers around operators works with these: compilation, export, graphs, autocast, wrappers for training."""

import functools
import shutil

import processes
import pytest
import torch
import torch._dynamo.testing
import torch._inductor
from distributed_training import WORLD, batch, loss_of, make_layers, train
from test_generate import prompts_of, tiny_model
from torch.autograd.forward_ad import dual_level, make_dual
from torch.utils.checkpoint import checkpoint

import kvops
from kvops.generation.generate import generate
from kvops.generation.passes import new_cache, prefill
from kvops.nn import Attention
from kvops.policies import Compression, SnapKV

needs_a_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs g++")


def make_cache(device, dtype=torch.float32, rows=2) -> kvops.PagedKVCache:
    return kvops.PagedKVCache(
        num_layers=1,
        num_kv_heads=2,
        head_dim=8,
        num_blocks=40,
        max_batch=rows,
        max_tokens=32,
        block_size=4,
        dtype=dtype,
        device=device,
    )


def qkv(*shape: int, device="cpu", dtype=torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries of 4 heads, keys and values of 2."""
    return tuple(torch.randn(*shape, heads, 8, device=device, dtype=dtype) for heads in (4, 2, 2))


@needs_a_compiler
@torch.no_grad()
def test_a_decoding_step_compiles_whole_and_once_for_all_shapes(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def step(q, k, v, cache, scores, tables, lens):
        kvops.paged_append(k, v, *cache, tables, lens, scores=scores)
        out, lse = kvops.paged_attention(q, *cache, tables, lens, scores=scores)
        return out * lse.transpose(1, 2)[..., None].to(out.dtype)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for rows, tokens in ((3, 5), (5, 3), (7, 6)):  # no size of the first is also another one: torch would tie them
        inputs, outs = qkv(rows, tokens, device=device), []
        for function in (step, compiled):
            cache = make_cache(device, rows=rows)
            cache.extend(tokens)
            tensors = (cache.k_cache, cache.v_cache), cache.scores, cache.block_tables[0], cache.seq_lens[0]
            outs.append((function(*inputs, *tensors), cache.scores.clone()))
        torch.testing.assert_close(outs[0], outs[1])
        graphs.append(counter.frame_count)
    # Not 1: torch compiles a graph twice, the second time with Python's floats as tensors.
    assert graphs == graphs[:1] * 3


def exported(module: torch.nn.Module, width: int) -> torch.export.ExportedProgram:
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return torch.export.export(module, (torch.randn(2, 7, width),), dynamic_shapes=(any_size,))


def test_a_module_exports_for_every_batch_and_length(tmp_path):
    module = make_layers().eval()
    torch.export.save(exported(module, 24), tmp_path / "attention.pt2")
    loaded, x = torch.export.load(tmp_path / "attention.pt2").module(), torch.randn(3, 12, 24)
    torch.testing.assert_close(loaded(x), module(x))


@needs_a_compiler
def test_aot_inductor_packages_a_module(tmp_path):
    class Heads(torch.nn.Module):
        def forward(self, x):
            heads = x.unflatten(-1, (3, 2, 4))
            return kvops.flash_attention(*heads.unbind(2), causal=True)[0]

    # What g++ optimises in the wrapper is not what is tested, and takes most of the time.
    fast = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    package = torch._inductor.aoti_compile_and_package(
        exported(Heads(), 24), package_path=str(tmp_path / "heads.pt2"), inductor_configs=fast
    )
    x = torch.randn(3, 12, 24)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), Heads()(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@torch.no_grad()
def test_a_cuda_graph_replays_a_module_and_a_decoding_step():
    module = Attention(32, 4, num_kv_heads=2, rope=100.0, device="cuda")
    cache, x = make_cache("cuda"), torch.randn(2, 1, 32, device="cuda")
    positions = cache.extend(1)

    def both():
        return module(x), module(x, positions, cache=cache)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.normal_()
    graph.replay()
    torch.testing.assert_close(captured, both())


def test_autocast_casts_what_attention_reads_and_nothing_else(device):
    q, k, v = qkv(2, 5, device=device)
    q.requires_grad_()
    sinks = torch.full((4,), 0.3, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out, lse = kvops.flash_attention(q, k.bfloat16(), v, causal=True, sinks=sinks)  # dtypes may be mixed
        scores = kvops.attention_scores(q.detach(), k, lse.detach(), causal=True)
        merged, _ = kvops.merge_attention(out, lse, out.float(), lse)
        caches = [make_cache(device, dtype) for dtype in (torch.float32, torch.float16)]
        kept = []
        with torch.no_grad():
            for cache in caches:  # a cache keeps its dtype, and attention is computed in it
                cache.append(0, k, v, cache.extend(5))
                kept.append(cache.attend(0, q))
        projected = Attention(32, 4, rope=100.0, device=device)(torch.randn(1, 3, 32, device=device))
    expected = kvops.flash_attention(*(x.detach().bfloat16() for x in (q, k, v)), causal=True, sinks=sinks)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert [x.dtype for x in (out, scores, merged)] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert [x.dtype for x in kept] == [torch.float32, torch.float16]
    assert projected.dtype == torch.bfloat16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32
    with pytest.raises(TypeError, match="k: expected the dtype of q"):
        kvops.flash_attention(q, k.bfloat16(), v)


@pytest.mark.parametrize("option", ["softcap", "dropout", "bias"])
def test_gradients_are_the_same_where_the_backward_pass_runs_under_autocast(option, device):
    """Autocast cast the products of the eager backward pass to bfloat16, scores and all."""
    inputs = [x.to(device, torch.bfloat16).requires_grad_() for x in qkv(2, 5)]
    bias = torch.randn(4, 5, 5, device=device, dtype=torch.bfloat16, requires_grad=True)
    options = {
        "softcap": {"softcap": 30.0},
        "dropout": {"dropout_p": 0.1, "dropout_seed": torch.tensor([3], device=device)},
        "bias": {"bias": bias},
    }[option]
    if option == "bias":
        inputs.append(bias)
    with torch.autocast(device.type, torch.bfloat16):
        first, second = (
            kvops.flash_attention(*inputs[:3], causal=True, **options)[0].float().square().sum() for _ in range(2)
        )
        inside = torch.autograd.grad(first, inputs)
    for gradient, expected in zip(inside, torch.autograd.grad(second, inputs), strict=True):
        assert torch.equal(gradient, expected)


def test_autocast_compiles_to_the_same_numbers():
    module, x = make_layers()[0], batch()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), module(x))


def test_tangents_are_refused_and_never_lost():
    x = torch.randn(1, 4, 2, 8)
    with dual_level(), pytest.raises(RuntimeError, match=r"kvops.flash_attention has no forward-mode derivative"):
        kvops.flash_attention(make_dual(x, x), x, x)


def test_vmap_and_tangents_are_refused_by_operators_without_a_gradient_too():
    q, k, _ = qkv(2, 5)
    lse = torch.zeros(2, 4, 5)
    with pytest.raises(RuntimeError, match=r"kvops.attention_scores does not run under torch.func.vmap"):
        torch.func.vmap(kvops.attention_scores)(q[None], k[None], lse[None])
    with dual_level(), pytest.raises(RuntimeError, match=r"kvops.attention_scores has no forward-mode derivative"):
        kvops.attention_scores(make_dual(q, q), k, lse)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, device):
    layers, x = make_layers().to(device), batch().to(device).requires_grad_()

    def gradients(run):
        layers.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in layers.parameters())]

    saving = functools.partial(checkpoint, layers, use_reentrant=reentrant)
    for expected, got in zip(gradients(layers), gradients(saving), strict=True):
        assert torch.equal(expected, got)


def test_deterministic_mode_is_respected_and_changes_nothing(device):
    def everything():
        torch.manual_seed(4)
        q, k, v = (x.requires_grad_() for x in qkv(2, 9, device=device))
        out, lse = kvops.flash_attention(q, k, v, causal=True, softcap=3.0)
        gradients = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
        with torch.no_grad():
            cache = make_cache(device)
            cache.append(0, k, v, cache.extend(9))
            cache.set_scores(0, kvops.attention_scores(q, k, lse, causal=True))
            attended = cache.attend(0, q, accumulate="sum")
            cache.evict(4, protect_last=2)
            cache.extend(1)
        logits = torch.randn(2, 3, 11, device=device)
        drafts = torch.randint(0, 11, (2, 2), device=device)
        seed = torch.arange(2, device=device)
        tokens, _ = kvops.verify_draft(
            logits, drafts, temperature=torch.ones(2, device=device), seed=seed, step=seed.clone()
        )
        lists = [part for head in range(2) for part in cache.gather(0, 1, head)]
        return [out, lse, *gradients, attended, cache.seq_lens.clone(), *(x[:-1] for x in lists), tokens]

    before = everything()
    torch.use_deterministic_algorithms(True)
    try:
        after = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, before, after))


def test_data_parallel_and_sharded_training_give_the_gradients_of_one_process(tmp_path):
    processes.start(train, tmp_path, WORLD)
    model = make_layers()
    loss_of(model, batch()).backward()
    for rank in range(WORLD):
        results = torch.load(tmp_path / f"{rank}.pt")
        for kind in ("ddp", "fsdp"):
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(results[kind, name], parameter.grad, msg=f"{kind} {rank} {name}")


def test_what_runs_on_a_cpu_takes_nothing_from_another_default_device(tmp_path):
    """A kernel wrote to a tensor of the default device, which ended the process."""
    prompt = prompts_of(40)[0]

    def run():
        model = tiny_model(hidden_size=64)
        compression = Compression(ratio=2, policy=SnapKV())
        results = [
            generate(model, [prompt, prompt[:9]], max_new_tokens=8, **options).tokens
            for options in (
                {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 3},
                {"draft": "prompt_lookup", "tree": 2},
                {"draft": model, "num_draft": 3, "compression": compression},
            )
        ]
        cache = new_cache(model, max_batch=1, max_tokens=64)
        with torch.no_grad():
            prefill(model, cache, torch.tensor([prompt], device="cpu"), 0)
        cache.save(tmp_path / "cache")
        return [*results, kvops.PagedKVCache.load(tmp_path / "cache").seq_lens.tolist()]

    expected = run()
    with torch.device("meta"):
        assert run() == expected
