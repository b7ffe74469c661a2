"""transformers' decoder families, tiny and random, on kvops beside transformers' own eager attention in float64."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor

import kvops.integrations.transformers as kvops_transformers
from fuzz.inputs import close, often

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_oss", "olmo"),
    *("olmo2", "granite", "cohere", "cohere2", "stablelm", "starcoder2", "smollm3", "helium", "glm", "glm4"),
    *("nemotron", "gpt_neox", "opt", "qwen2_moe", "mixtral", "exaone4", "ernie4_5", "seed_oss", "arcee", "apertus"),
)
VOCABULARY = 61


@dataclass(frozen=True)
class Case:
    seed: int = 0
    family: int = 0  # a place in FAMILIES
    layers: int = 1
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 8
    window: int = 0
    softcap: float = 0.0
    lengths: tuple[int, ...] = (1,)
    side: str = "left"  # of the padding
    new: int = 0  # tokens to generate
    cache: str = ""  # "static" or "kvops"
    chunk: int = 0  # prefill_chunk_size


def draw(r: Random) -> Case:
    new = r.choice((0, 0, 3, 9))
    longest = r.choice((1, 5, 20, 40))
    return Case(
        seed=r.randrange(2**31),
        family=r.randrange(len(FAMILIES)),
        layers=r.choice((1, 2, 2, 4)),
        kv_heads=r.choice((1, 1, 2)),
        group=r.choice((1, 2, 3)),
        head_dim=r.choice((8, 16, 24)),
        window=r.choice((0, 2, 3, 8, 100)),
        softcap=often(r, 0.0, 2.0),
        lengths=tuple(often(r, longest, r.randint(1, longest)) for _ in range(r.choice((1, 1, 2, 3)))),
        side="left" if new else r.choice(("left", "right")),
        new=new,
        cache=r.choice(("", "static", "kvops", "kvops")) if new else "",
        chunk=often(r, 0, 1, 2, 7, p=0.7) if new else 0,
    )


def check(case: Case) -> None:
    kvops_transformers.enable()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        _check(case)


def _model(case: Case, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    heads = case.kv_heads * case.group
    family, window = FAMILIES[case.family], {}
    if case.window and hasattr(transformers.CONFIG_MAPPING[family](), "sliding_window"):  # else it means nothing
        window = {"sliding_window": case.window, "use_sliding_window": True, "max_window_layers": 0}
    config = transformers.AutoConfig.for_model(
        family,
        **{"vocab_size": VOCABULARY, "hidden_size": heads * case.head_dim, "intermediate_size": 32},
        **{"num_hidden_layers": case.layers, "num_attention_heads": heads, "num_key_value_heads": case.kv_heads},
        **{"head_dim": case.head_dim, "max_position_embeddings": 128, "attention_dropout": 0.0, "dropout": 0.0},
        **window,
        **{"query_pre_attn_scalar": case.head_dim, "attn_logit_softcapping": case.softcap or None},
        **{"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"},
        **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        **{"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None},
    )
    torch.manual_seed(case.seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:  # near 0, where a forgotten sink would hardly show
            torch.nn.init.normal_(parameter)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation(attention)
    return model.to(dtype)


def _batch(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(case.seed)
    longest = max(case.lengths)
    ids = torch.zeros(len(case.lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(case.lengths):
        place = slice(longest - length, longest) if case.side == "left" else slice(length)
        ids[row, place] = torch.randint(1, VOCABULARY, (length,), generator=g)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _refused(error: Exception) -> bool:
    """Said in one sentence that names an argument, a model or a setting."""
    return isinstance(error, (ValueError, TypeError, NotImplementedError)) and bool(
        re.match(r"[\w.\[\]]+: expected ", str(error))
    )


def _alone(case: Case, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each row without its padding."""
    real = [mask.bool() for mask in batch["attention_mask"]]
    rows = [ids[mask][None] for ids, mask in zip(batch["input_ids"], real, strict=True)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]


def _check(case: Case) -> None:
    batch = _batch(case)
    options: dict[str, Any] = {"max_new_tokens": case.new, "do_sample": False}
    chunk = {"prefill_chunk_size": case.chunk} if case.chunk else {}
    static = {"cache_implementation": "static"} if case.cache == "static" else {}
    try:
        truth, low, model = (
            _model(case, dtype, attention)
            for dtype, attention in ((torch.float64, "eager"), (torch.float32, "eager"), (torch.float32, "kvops"))
        )
        if case.new:
            right = [
                low.generate(**row, **options, use_cache=False)[0, row["input_ids"].shape[1] :]
                for row in _alone(case, batch)
            ]
            low.generate(**batch, **options, **chunk, **static)
        else:
            exact, same = (torch.cat([m(**row).logits[0] for row in _alone(case, batch)]) for m in (truth, low))
    except Exception:
        return  # what transformers cannot do itself
    try:
        if not case.new:
            found = model(**batch).logits[batch["attention_mask"].bool()]
        elif case.cache == "kvops":
            size = max(case.lengths) + case.new
            cache = kvops_transformers.KVOpsCache(model.config, max_tokens=size)
            found = model.generate(**batch, **options, **chunk, past_key_values=cache)
        else:
            found = model.generate(**batch, **options, **chunk, **static)
    except Exception as error:
        if _refused(error):
            return
        raise
    if not case.new:
        close(found, exact, same, "logits")
        return
    for row, alone in enumerate(_alone(case, batch)):
        _expect_tokens(truth, alone["input_ids"], found[row, max(case.lengths) :], right[row])


def _expect_tokens(truth: torch.nn.Module, prompt: Tensor, found: Tensor, right: Tensor) -> None:
    """Equal, or first different where float64 has the two next to each other."""
    if torch.equal(found, right):
        return
    place = int((found != right).nonzero()[0])
    logits = truth(input_ids=torch.cat([prompt, right[None, :place]], 1)).logits[0, -1]
    gap = float((logits[found[place]] - logits[right[place]]).abs())
    assert gap < 1e-4, f"token {place}: {found.tolist()}, expected {right.tolist()}"
