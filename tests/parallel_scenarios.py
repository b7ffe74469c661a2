"""What the processes of tests/test_parallel.py compute; each function gives one process's results by name."""

import dataclasses
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import kvops
from kvops.generation.generate import generate
from kvops.models.config import LlamaConfig
from kvops.models.llama import Llama
from kvops.models.tensor_parallel import tensor_parallel
from kvops.parallel import gather_attention, ring_attention, shard, unshard
from kvops.policies import Compression, SnapKV

WORLD = 4
# Groups in which ranks and global ranks differ.
PAIR, TRIO = [2, 3], [1, 2, 3]
EVEN = [len(PAIR), WORLD]  # sizes that the model's heads and tokens divide into

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=12,
    num_kv_heads=4,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    max_positions=256,
    tie_embeddings=False,
    sliding_window=None,
    attention_bias=True,
)
PROMPTS = [[token * 7 % 61 for token in range(40)], [token * 5 % 61 for token in range(23)]]


def model_weights(config: LlamaConfig = CONFIG) -> dict[str, Tensor]:
    """Random weights whose logits are far enough apart for greedy decoding to be stable."""
    generator = torch.Generator().manual_seed(3)
    kv, q, hidden, inner = config.num_kv_heads * 8, config.num_heads * 8, config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for layer in range(config.num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes |= {f"{attention}{name}_proj.weight": (rows, hidden), f"{attention}{name}_proj.bias": (rows,)}
        shapes |= {f"{attention}o_proj.weight": (hidden, q), f"{mlp}down_proj.weight": (hidden, inner)}
        shapes |= {f"{mlp}gate_proj.weight": (inner, hidden), f"{mlp}up_proj.weight": (inner, hidden)}
    weights = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    weights |= {name: torch.randn(hidden, generator=generator) * 0.1 + 1 for name in ("model.norm.weight",)}
    for layer in range(config.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = torch.randn(hidden, generator=generator) * 0.1 + 1
    weights["lm_head.weight"] = weights["lm_head.weight"] * 4
    return weights


def inputs(*, sinks: bool) -> dict[str, Tensor]:
    """A sequence of 48 tokens, 6 query and 2 KV heads, values of another size, and weights for a loss."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 48, 6, 16), "k": (2, 48, 2, 16), "v": (2, 48, 2, 12), "dout": (2, 48, 6, 12), "dlse": (2, 6, 48)}
    if sinks:
        shapes["sinks"] = (6,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


ATTENTION: dict[str, dict] = {
    "ring causal": {"method": ring_attention},
    "ring causal sinks softcap": {"method": ring_attention, "softcap": 3.0, "sinks": True},
    "ring full": {"method": ring_attention, "causal": False, "scale": 0.4},
    "ring causal window": {"method": ring_attention, "window_left": 9},
    "ring causal window of one": {"method": ring_attention, "window_left": 0, "sinks": True},
    "ring window on both sides": {"method": ring_attention, "causal": False, "window_left": 5, "window_right": 14},
    "ring window to the right": {"method": ring_attention, "causal": False, "window_right": 3, "softcap": 3.0},
    "ring documents": {"method": ring_attention, "cu_seqlens": [0, 5, 5, 29, 43], "sinks": True},
    "ring documents window softcap": {
        "method": ring_attention,
        "cu_seqlens": [0, 24, 48],
        "window_left": 7,
        "softcap": 3.0,
    },
    "ring documents full": {"method": ring_attention, "causal": False, "cu_seqlens": [0, 17, 48]},
    "ring documents window on both sides": {
        "method": ring_attention,
        "causal": False,
        "cu_seqlens": [0, 2, 41],
        "window_left": 3,
        "window_right": 6,
    },
    "gather causal window": {"method": gather_attention, "window_left": 9},
    "gather causal sinks softcap": {"method": gather_attention, "softcap": 3.0, "sinks": True},
    "gather full": {"method": gather_attention, "causal": False},
    "gather window on both sides": {"method": gather_attention, "causal": False, "window_left": 5, "window_right": 14},
    "gather window to the left": {"method": gather_attention, "causal": False, "window_left": 4},
}


def attention(group: dist.ProcessGroup, case: str) -> dict[str, Tensor]:
    """out, lse and the gradients of this process's tokens."""
    options = dict(ATTENTION[case])
    method, sinks = options.pop("method"), options.pop("sinks", False)
    whole = inputs(sinks=sinks)
    local = {name: shard(whole[name], group, dim=2 if name == "dlse" else 1) for name in whole if name != "sinks"}
    packed = "cu_seqlens" in options
    if packed:
        local = {name: value[0] for name, value in local.items()}
    leaves = {name: local[name].requires_grad_() for name in ("q", "k", "v")}
    if sinks:
        leaves["sinks"] = whole["sinks"].requires_grad_()
        options["sinks"] = leaves["sinks"]
    out, lse = method(leaves["q"], leaves["k"], leaves["v"], group, **options)
    loss_of(out, lse, local).backward()
    results = {"out": out, "lse": lse} | {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    if sinks:
        dist.all_reduce(results["dsinks"], group=group)
    results = {name: value.detach() for name, value in results.items()}
    return {name: value[None] if packed and name != "dsinks" else value for name, value in results.items()}


def loss_of(out: Tensor, lse: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """A sum over out and lse, without the lse of rows that see no key."""
    return (out * weights["dout"]).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * weights["dlse"]).sum()


def training(group: dist.ProcessGroup) -> dict[str, Tensor]:
    """A long sequence through the model, its tokens spread over the processes: the loss and every gradient."""
    model = Llama(CONFIG, model_weights())
    tokens = torch.tensor(PROMPTS[:1])
    positions = torch.arange(tokens.shape[1])[None]
    own, own_positions = shard(tokens, group), shard(positions, group)
    hidden = model(own, own_positions, lambda layer, q, k, v: ring_attention(q, k, v, group)[0])
    targets = shard(tokens.roll(-1, 1), group)
    loss = torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    results = {"loss": loss.detach()} | {name: weight.grad for name, weight in model.named_parameters()}
    for value in results.values():
        dist.all_reduce(value, group=group)
    return results | {"hidden": unshard(hidden, group).detach()}


def tensor_parallel_model(group: dist.ProcessGroup) -> dict[str, object]:
    """Logits, gradients and generation of a model split by heads."""
    mesh = DeviceMesh.from_group(group, "cpu")
    model = tensor_parallel(CONFIG, model_weights(), mesh)
    results: dict[str, object] = {}
    tokens = torch.tensor(PROMPTS[:1])
    positions = torch.arange(tokens.shape[1])[None]
    hidden = model(tokens, positions, lambda layer, q, k, v: kvops.flash_attention(q, k, v, causal=True)[0])
    logits = model.logits(hidden)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum")
    loss.backward()
    results["logits"] = logits.detach()
    results["gradients"] = {name: weight.grad for name, weight in model.named_parameters()}
    results["tokens"] = generate(model, PROMPTS, max_new_tokens=12).tokens
    results["drafted"] = generate(model, PROMPTS, max_new_tokens=12, draft="prompt_lookup").tokens
    compression = Compression(ratio=3, policy=SnapKV(scope="head"), protect_first=1, protect_last=4)
    compressed = generate(model, PROMPTS, max_new_tokens=12, compression=compression)
    results["compressed"] = compressed.tokens
    results["blocks"] = compressed.stats.blocks_in_use
    results["kv_heads"] = model.config.num_kv_heads
    return results


def refusals(group: dist.ProcessGroup) -> dict[str, str]:
    """The messages of what does not divide."""
    mesh = DeviceMesh.from_group(group, "cpu")
    messages = {}
    for name, call in {
        "shard": lambda: shard(torch.zeros(1, 6), group),
        "heads": lambda: tensor_parallel(dataclasses.replace(CONFIG, num_kv_heads=3, num_heads=9), {}, mesh),
        "documents": lambda: ring_attention(*(torch.zeros(2, 1, 8),) * 3, group, cu_seqlens=[0, 99]),
        "slopes": lambda: gather_attention(
            *(torch.zeros(1, 2, 1, 8),) * 3, group, causal=False, alibi_slopes=torch.ones(1)
        ),
        "lengths": lambda: ring_attention(
            torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), group
        ),
    }.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def run(rank: int, port: int, folder: Path) -> None:
    """Everything on every process; results go to a file for each."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    groups = {WORLD: dist.group.WORLD}
    for members in (PAIR, TRIO):
        group = dist.new_group(members)
        if rank in members:
            groups[len(members)] = group
    results: dict[tuple[int, str], object] = {}
    for size, group in groups.items():
        tasks = {case: lambda group, case=case: attention(group, case) for case in ATTENTION}
        if size in EVEN:
            tasks |= {"training": training, "tensor parallel": tensor_parallel_model, "refusals": refusals}
        for name, task in tasks.items():
            try:
                results[size, name] = task(group)
            except Exception:
                results[size, name] = traceback.format_exc()
                torch.save(results, folder / f"{rank}.pt")
                raise
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
