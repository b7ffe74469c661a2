"""A benchmark case: inputs, the timed call, the oracle, the cost, and the peers.

Families of cases live in ``bench/cases/``, one module each with ``cases(scale) -> Iterator[Case]``. New modules there
are found automatically.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
"""The inputs of a case's ``run``, ``oracle`` and peers, by name."""

Outputs = tuple[Tensor | None, ...]
"""None for an output that a contender does not have."""


class UnavailableError(Exception):
    """A peer cannot run a case here; the message becomes its row."""


@dataclass(frozen=True)
class Peer:
    """Another implementation of the same computation."""

    name: str
    prepare: Callable[[Inputs], Callable[[], Outputs]]
    """Prepares what is not timed (layouts, masks, plans) and returns the timed call. Raises ImportError or
    :class:`UnavailableError` if the peer is missing. Its outputs are in the order of the case's; some may be missing or
    None."""
    package: str = "torch"
    """The distribution whose version is recorded with the figures."""


def everything(inputs: Inputs, outputs: Outputs) -> Outputs:
    return outputs


@dataclass(frozen=True)
class Case:
    """One operator at one shape."""

    op: str
    """The name in ``torch.ops.kvops``."""
    model: str
    """The model that the shape is from."""
    shape: Mapping[str, int | str]
    """The parameters of the case, such as ``{"batch": 1, "context": 4096}``."""
    make_inputs: Callable[[torch.device, torch.dtype, torch.Generator], Inputs]
    """Random data; never timed. The generator is one of the device."""
    run: Callable[[Inputs], Outputs]
    """The timed call. Tensors that an operator writes in place count as outputs."""
    oracle: Callable[[Inputs, torch.dtype], Outputs]
    """The outputs (those that ``sample`` picks) in plain torch with every step in the given dtype: called with float64
    for the truth and with the tested dtype for the error that its arithmetic is allowed."""
    flops: float
    """The least multiplications and additions; 0 if the work is moving or comparing."""
    bytes: Callable[[int], float]
    """Item size -> the least bytes: the needed inputs read once, the outputs written once."""
    peers: tuple[Peer, ...]
    sample: Callable[[Inputs, Outputs], Outputs] = everything
    """The part of the outputs that is compared, if the oracle takes too long for all."""
    reset: Callable[[Inputs], None] | None = None
    """Restores the inputs before every call, untimed."""

    @property
    def name(self) -> str:
        """``op/model/key=value,...``: unique in a registry, and what ``--shapes`` searches."""
        return f"{self.op}/{self.model}/" + ",".join(f"{key}={value}" for key, value in self.shape.items())


@dataclass(frozen=True)
class Model:
    """The attention of one model, and its vocabulary."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    window: int = -1
    softcap: float = 0.0

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


LLAMA_8B = Model("Llama-3.1-8B", 32, 8, 128, vocab=128256, layers=32)
LLAMA_70B = Model("Llama-3.1-70B", 64, 8, 128, vocab=128256, layers=80)
MISTRAL_7B = Model("Mistral-7B", 32, 8, 128, vocab=32000, layers=32, window=4096)
QWEN_7B = Model("Qwen2.5-7B", 28, 4, 128, vocab=152064, layers=28)
SMOLLM = Model("SmolLM2-135M", 9, 3, 64, vocab=49152, layers=30)
T5 = Model("T5-3B", 32, 32, 128, vocab=32128, layers=24)  # adds a bias [heads, queries, keys] to the scores
BLOOM = Model("BLOOM-7B", 32, 32, 128, vocab=250880, layers=30)  # ALiBi
GEMMA = Model("Gemma-2-9B", 16, 8, 256, vocab=256000, layers=42, softcap=50.0)
GEMMA_3 = Model("Gemma-3-4B", 8, 4, 256, vocab=262144, layers=34, window=1024)  # the largest vocabulary
STARCODER = Model("StarCoder-15B", 48, 1, 128, vocab=49152, layers=40)  # every query head reads one KV head
MODELS = (LLAMA_8B, LLAMA_70B, MISTRAL_7B, QWEN_7B, SMOLLM, GEMMA, STARCODER)


@dataclass(frozen=True)
class Scale:
    """The size of the cases: the same families, scaled to a device."""

    name: str
    prompts: tuple[int, ...]
    """Tokens of a prompt, for dense attention."""
    contexts: tuple[int, ...]
    """Tokens in a cache, for decoding and eviction."""
    batches: tuple[int, ...]
    """Requests decoded together."""
    max_kv_heads: int
    max_cached_heads: int
    """KV heads where new tokens read a cache: far less work than the attention of a prompt."""
    max_head_dim: int
    max_vocab: int
    max_logits: int
    """Rows times vocabulary of a draft verification."""
    window: int
    """Replaces a model's window, if it has one."""

    def model(self, model: Model, *, cached: bool = False) -> Model:
        """The model with as many KV heads, head size, vocabulary and window as this scale allows; its group is kept.
        ``cached``: for new tokens that read a cache."""
        kv_heads = min(model.kv_heads, self.max_cached_heads if cached else self.max_kv_heads)
        return replace(
            model,
            heads=kv_heads * model.group,
            kv_heads=kv_heads,
            head_dim=min(model.head_dim, self.max_head_dim),
            vocab=min(model.vocab, self.max_vocab),
            window=min(model.window, self.window),
        )


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "full",
            prompts=(1024, 4096, 16384),
            contexts=(4096, 32768, 131072),
            batches=(1, 16, 64),
            max_kv_heads=1 << 30,
            max_cached_heads=1 << 30,
            max_head_dim=1 << 30,
            max_vocab=1 << 30,
            max_logits=1 << 40,
            window=4096,
        ),
        Scale(
            "cpu",
            prompts=(512, 1024),
            contexts=(1024, 4096),
            batches=(1, 8),
            max_kv_heads=2,
            max_cached_heads=8,
            max_head_dim=256,
            max_vocab=1 << 30,
            max_logits=1 << 24,
            window=512,
        ),
        # For tests, and for Triton's interpreter.
        Scale(
            "tiny",
            prompts=(33,),
            contexts=(40,),
            batches=(1, 2),
            max_kv_heads=2,
            max_cached_heads=2,
            max_head_dim=16,
            max_vocab=97,
            max_logits=1024,
            window=13,
        ),
    )
}


def scale_for(device: torch.device) -> Scale:
    """Full size on a GPU, scaled down on a CPU."""
    return SCALES["cpu" if device.type == "cpu" else "full"]
