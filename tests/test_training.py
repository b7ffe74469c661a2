"""Small models train through flash_attention: to the losses of torch's own attention, compiled and with checkpoints."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from oracle import assert_accurate
from rounding import rounded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import kvops

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_bytes.py"
SMALL = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "window": 9}


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("tabulate")
    pytest.importorskip("tqdm")
    spec = importlib.util.spec_from_file_location("train_bytes", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decoder(example, device, attend=None, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return example.Decoder(attend or example.with_kvops, **SMALL | changes).to(device, dtype)


def test_the_losses_are_those_of_torch_and_fall(example, backend, device):
    """As far from a float64 run as rounding takes it, by the tolerance of every other test."""
    compared = 5

    def losses(attend, dtype=torch.float32, steps=compared):
        pieces = example.batches(batch=1, length=40)
        return example.train(decoder(example, device, attend, dtype), pieces, steps)

    ours = losses(example.with_kvops, steps=20 if backend == "eager" else compared)
    exact = losses(example.with_sdpa, torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        same = rounded(torch.float32, losses, example.with_sdpa, torch.float64)
    assert_accurate(ours[:compared].float(), exact, same, "losses")
    assert ours[-3:].mean() < 0.95 * ours[0]


def test_the_tolerance_tells_a_window_that_is_one_key_short(example, device):
    def losses(attend, dtype=torch.float32, window=SMALL["window"]):
        model = decoder(example, device, attend, dtype, window=window)
        return example.train(model, example.batches(batch=1, length=40), 4)

    exact = losses(example.with_sdpa, torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        same = rounded(torch.float32, losses, example.with_sdpa, torch.float64)
    with pytest.raises(AssertionError, match="losses: error"):
        assert_accurate(losses(example.with_kvops, window=SMALL["window"] - 1).float(), exact, same, "losses")


def test_gradients_reach_every_parameter(example, backend, device):
    model = decoder(example, device)
    example.loss_of(model, next(example.batches(batch=2, length=24)).to(device)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # An embedding has a gradient where its byte stands in the text.
        touched = parameter.grad.flatten(1).any(1) if parameter.dim() > 1 else parameter.grad != 0
        assert touched.any() if name == "embed.weight" else touched.all(), name


def test_a_compiled_model_trains_to_the_same_losses_without_a_graph_for_each_length(example, device):
    # What g++ makes of the rest of the model is not what is tested, and takes half a minute.
    graphs = torch._dynamo.testing.CompileCounterWithBackend("inductor" if device.type == "cuda" else "aot_eager")
    counts = []
    lengths = [33, 48, 65, 40, 21]

    def losses(forward, model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        found = []
        for length in lengths:
            loss = example.loss_of(forward, next(example.batches(2, length)).to(device, copy=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
            counts.append(graphs.frame_count)
        return torch.stack(found)

    torch._dynamo.reset()
    model = decoder(example, device, layers=1)
    compiled = losses(torch.compile(model, fullgraph=True, dynamic=True, backend=graphs), model)
    # Not 1: torch compiles the first length twice, the second time with Python's floats as tensors.
    assert counts == counts[:1] * len(lengths), f"graphs after each of the lengths {lengths}: {counts}"

    def in_float64():
        model = decoder(example, device, example.with_sdpa, torch.float64, layers=1)
        return losses(model, model)

    with sdpa_kernel(SDPBackend.MATH):
        assert_accurate(compiled, in_float64(), rounded(torch.float32, in_float64), "losses")


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_inductor_compiles_attention_and_its_gradient(device):
    def loss(x):
        out, lse = kvops.flash_attention(*x.unflatten(-1, (3, 2, 4)).unbind(2), causal=True)
        return (out.square().sum(-1) * lse.transpose(1, 2)).sum()

    torch._dynamo.reset()
    x, results = torch.randn(2, 9, 24, device=device), []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        found = function(leaf)
        results.append((found.detach(), *torch.autograd.grad(found, leaf)))
    torch.testing.assert_close(*results)


def test_activation_checkpointing_gives_the_same_gradients(example, backend, device):
    piece = next(example.batches(batch=1, length=34)).to(device)

    def gradients(model):
        example.loss_of(model, piece).backward()
        return [parameter.grad for parameter in model.parameters()]

    plain, saving = decoder(example, device), decoder(example, device)
    for block in saving.blocks:
        block.forward = lambda x, forward=block.forward: checkpoint(forward, x, use_reentrant=False)
    for expected, got in zip(gradients(plain), gradients(saving), strict=True):
        assert torch.equal(expected, got)
