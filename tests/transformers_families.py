"""Every decoder that transformers ships, tiny and random: kvops against transformers' own "eager" attention.

    python tests/transformers_families.py            # check all families; fails where one differs from the table
    python tests/transformers_families.py --write    # write the table, and the page of the documentation made from it
    python tests/transformers_families.py llama bloom

``tests/transformers_families.json`` is the table: what each family does in each of :data:`CHECKS`. The tests hold the
adapter to it, and ``docs/transformers-families.md`` is made from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

import kvops.integrations.transformers as kvops_transformers
from kvops.generation.generate import generate
from kvops.integrations.transformers import Decoder, KVOpsCache

HERE = Path(__file__).parent
TABLE = HERE / "transformers_families.json"
PAGE = HERE.parent / "docs" / "transformers-families.md"

VOCABULARY, LENGTH, PADDING, NEW_TOKENS = 61, 9, 3, 5


def _all(value: object, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# What configurations call their sizes. A family gets those that its configuration has.
SIZES: dict[str, Any] = {
    **_all(
        32, "hidden_size d_model n_embd embed_dim embedding_size dim_model word_embed_proj_dim dim emb_dim lru_width"
    ),
    **_all(32, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dim_ff dff n_inner feed_forward_size"),
    **_all(32, "moe_intermediate_size ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size d_inner"),
    **_all(32, "shared_intermediate_size block_ff_dim mlp_dim lru_width"),
    **_all(2, "num_hidden_layers num_layers n_layer n_layers decoder_layers num_decoder_layers"),
    **_all(2, "encoder_layers num_encoder_layers depth"),
    **_all(4, "num_attention_heads n_head n_heads attention_heads decoder_attention_heads encoder_attention_heads"),
    **_all(4, "num_decoder_attention_heads num_encoder_attention_heads num_heads"),
    **_all(2, "num_key_value_heads multi_query_num_kv_heads kv_n_heads swa_num_key_value_heads"),
    **_all(8, "head_dim d_kv swa_head_dim hidden_size_per_layer_input kv_channels kv_lora_rank q_lora_rank"),
    **_all(8, "qk_nope_head_dim v_head_dim d_rel swa_v_head_dim linear_key_head_dim linear_value_head_dim laurel_rank"),
    **_all(8, "index_head_dim qk_head_dim global_head_dim image_size o_lora_rank"),
    **_all(4, "qk_rope_head_dim index_topk ssm_state_size mamba_d_state state_size time_step_rank patch_size"),
    **_all(2, "linear_num_key_heads linear_num_value_heads mamba_n_groups n_groups index_n_heads"),
    **_all(VOCABULARY, "vocab_size vocab_size_per_layer_input n_words"),
    **_all(64, "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length"),
    **_all(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_all(2, "num_experts_per_tok moe_topk moe_k num_experts_per_token"),
    **_all(1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group max_window_layers"),
    **_all(4, "sliding_window window_size"),
    **_all(0.0, "dropout attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout hidden_dropout_prob"),
    **_all(0.0, "attention_probs_dropout_prob activation_dropout layerdrop decoder_layerdrop"),
    **_all(True, "is_decoder use_sliding_window"),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "cls_token_id": 4},
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _ALTERNATING}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_PARTLY_ROTATED = {"rotary_dim": 4}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
# What single families need beside them, mostly to show what is special about them.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("minimax", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next"), _HYBRID),
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text"), _HYBRID),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), _HYBRID | {"num_key_value_heads": 4}),
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), _SHARED),
    **dict.fromkeys(("codegen", "gptj"), _PARTLY_ROTATED),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _CONVOLUTION),
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA | _HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {"qk_head_dim": 12},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"], "index_block_size": 4},
    "moshi": {"audio_encoder_config": {}, "depth_decoder_config": {}, "sliding_window": 64},
    "mpt": {"attn_config": {}},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 8),
        "attn_layers": ["local", "local"],
        "attention_head_size": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
CHECKS = {
    "forward": "a forward pass without padding",
    "padded": "forward passes with padding on the left and on the right",
    "generate": "greedy `generate` from left-padded prompts, with the dynamic cache",
    "static": "the same with the static cache",
    "cache": "the same with `KVOpsCache`",
    "decoder": "`kvops.generation` through `Decoder`, from ragged prompts",
}


def configuration(kind: Any, own: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    options: dict[str, Any] = {name: value for name, value in SIZES.items() if name in known}
    for name, part in kind.sub_configs.items():
        if name in known and name not in own and part is not AutoConfig:
            options[name] = configuration(part, {}).to_dict()
    return kind(**options | own)


def build(family: str) -> torch.nn.Module:
    """A tiny model with weights large enough that attention matters; raises what transformers raises."""
    kind = getattr(transformers, FAMILIES[family])
    config = configuration(kind.config_class or CONFIG_MAPPING[family], OWN.get(family, {}))
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind(config).parameters())
    if size > 15e6:
        raise ValueError(f"the generic configuration makes a model of {size / 1e6:.0f} million weights")
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "norm" not in name:
                weight.normal_(0, 0.2)
            elif "sink" in name:
                weight.normal_(0, 1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts() -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def batch(side: str) -> dict[str, torch.Tensor]:
    """Two prompts, the second one shorter and padded on the ``side``."""
    ids = prompts()
    mask = torch.ones_like(ids)
    mask[1, slice(PADDING) if side == "left" else slice(LENGTH - PADDING, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _forward(model: Any) -> torch.Tensor:
    return model(input_ids=prompts(), use_cache=False).logits


def _padded(model: Any) -> torch.Tensor:
    inputs = [batch("left"), batch("right")]
    return torch.cat([model(**one, use_cache=False).logits[one["attention_mask"].bool()] for one in inputs])


def _generate(model: Any, **options: Any) -> torch.Tensor:
    """Logits of all new tokens."""
    options |= {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    out = model.generate(**batch("left"), max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return torch.stack(out.logits, 1)


def _cache(model: Any) -> torch.Tensor:
    if implementation(model) != kvops_transformers.NAME:
        return _generate(model)
    return _generate(model, past_key_values=KVOpsCache(model.config, max_tokens=32, block_size=4))


def _decoder(model: Any) -> torch.Tensor:
    rows = [prompts()[:1], prompts()[1:, PADDING:]]
    if implementation(model) == kvops_transformers.NAME:
        lists = [row[0].tolist() for row in rows]
        return torch.tensor(generate(Decoder(model), lists, max_new_tokens=NEW_TOKENS).tokens)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    alone = [model.generate(row, attention_mask=torch.ones_like(row), **options)[:, row.shape[1] :] for row in rows]
    return torch.cat(alone)


_RUN: dict[str, Callable[[Any], torch.Tensor]] = {
    "forward": _forward,
    "padded": _padded,
    "generate": _generate,
    "static": lambda model: _generate(model, cache_implementation="static"),
    "cache": _cache,
    "decoder": _decoder,
}


def implementation(model: Any) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def use(model: Any, name: str) -> None:
    """Also where the model does not support it: as ``from_pretrained(..., attn_implementation="kvops")`` does."""
    model.set_attn_implementation(name)
    for config in {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values():
        if hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = name


def _attempt(run: Callable[[Any], torch.Tensor], model: Any) -> torch.Tensor | Exception:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(model)
    except Exception as error:
        return error


# A refusal is one sentence of ours that starts with an argument's name.
_SENTENCE = re.compile(r"^[\w.]+: expected .*, got [^\n]*$")


def _compare(got: torch.Tensor | Exception, expected: torch.Tensor | Exception) -> str:
    """ "right", "refused: ..." with the sentence, "transformers: ..." where eager attention fails, or what is wrong."""
    if isinstance(got, ValueError | TypeError) and _SENTENCE.match(str(got)) and "kvops" in _raised_in(got):
        return f"refused: {got}"
    if isinstance(expected, Exception):
        if os.environ.get("DEBUG"):
            print(f"   eager: {type(expected).__name__}: {str(expected)[:150]}")
        return "transformers cannot"
    if isinstance(got, ValueError) and re.search("model_kwargs|cache of its own", str(got)):
        return "transformers cannot"  # the model takes no cache, or only one of its own
    if isinstance(got, Exception):
        return f"fails: {type(got).__name__}: {got}"
    if got.shape != expected.shape:
        return f"wrong: shape {list(got.shape)}, expected {list(expected.shape)}"
    if not got.dtype.is_floating_point:
        return "right" if torch.equal(got, expected) else "wrong: other tokens"
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return "wrong: not finite where eager is, or the other way round"
    error = float((got - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1e-6))
    return "right" if error < 1e-4 else f"wrong: relative error {error:.1e}"


def _raised_in(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_filename


def check(family: str, checks: Iterable[str] = tuple(CHECKS)) -> dict[str, str]:
    """What the family does in each of ``checks``; ``{"built": why not}`` where it is not built."""
    kvops_transformers.enable()
    try:
        model = build(family)
    except Exception as error:
        return {"built": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    expected, outcomes = {}, {}
    use(model, "eager")
    for name in checks:
        expected[name] = _attempt(_RUN[name], model)
    own = not getattr(type(model), "_can_set_attn_implementation")()  # noqa: B009 - private
    for name in checks:
        use(model, kvops_transformers.NAME)
        outcomes[name] = _compare(_attempt(_RUN[name], model), expected[name])
        if own and outcomes[name] == "right":
            outcomes[name] = "own attention"
    return outcomes


def expected_table() -> dict[str, dict[str, str]]:
    """By family, what :func:`check` gives; of the version of transformers that ``expected_version`` names."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["families"]


def expected_version() -> str:
    return json.loads(TABLE.read_text(encoding="utf-8"))["transformers"]


def page(table: dict[str, dict[str, str]], version: str) -> str:
    """The page of the documentation."""
    built = {family: outcomes for family, outcomes in table.items() if "built" not in outcomes}
    notes: dict[str, int] = {}

    def cell(outcome: str) -> str:
        if outcome.startswith("refused: "):
            number = notes.setdefault(_general(outcome.removeprefix("refused: ")), len(notes) + 1)
            return f"no [{number}]"
        return {"right": "yes", "own attention": "own", "transformers cannot": "–"}[outcome]

    rows = [
        f"| {family} | {' | '.join(cell(outcomes[name]) for name in CHECKS)} |" for family, outcomes in built.items()
    ]
    counts = {name: sum(outcomes[name] == "right" for outcomes in built.values()) for name in CHECKS}
    lines = [
        "# transformers, family by family",
        "",
        "<!-- Made by tests/transformers_families.py --write; do not edit. -->",
        "",
        f"Every causal language model that transformers {version} ships and that can be built from a "
        f"generic configuration ({len(built)} of {len(table)} model types), tiny and with random weights, on kvops and "
        "on transformers' own `eager` attention in float32. The logits of all real tokens agree to a relative error of "
        "1e-4, or kvops refuses with a sentence that says why.",
        "",
        "| column | what is compared | right |",
        "| --- | --- | --- |",
        *(f"| {name} | {text} | {counts[name]} |" for name, text in CHECKS.items()),
        "",
        "`yes`: right. `no [n]`: refused, with the sentence below. `own`: the model does not use transformers' "
        "attention interface, so that kvops takes no part in it. `–`: transformers itself cannot do it.",
        "",
        f"| family | {' | '.join(CHECKS)} |",
        f"| --- |{' --- |' * len(CHECKS)}",
        *rows,
        "",
        "## Why a family is refused",
        "",
        *(f"{number}. `{text}`" for text, number in notes.items()),
        "",
        "## Not built",
        "",
        "These need more than a generic configuration; most of them are wrappers around a family of the table.",
        "",
        ", ".join(f"`{family}`" for family in table if family not in built) + ".",
        "",
    ]
    return "\n".join(lines)


def _general(sentence: str) -> str:
    """The sentence without what differs between families."""
    sentence = re.sub(r"\b[A-Z]\w*(ForCausalLM|LMHeadModel|Attention)\b", "...", sentence)
    return re.sub(r"\d+", "N", sentence)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; all of them if none is named")
    parser.add_argument("--write", action="store_true", help="write the table and the page of the documentation")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    table = expected_table() if TABLE.exists() else {}
    changed = 0
    for family in arguments.families or FAMILIES:
        outcomes = check(family)
        if outcomes != table.get(family):
            changed += 1
            print(family, json.dumps(outcomes, indent=2, ensure_ascii=False), flush=True)
        table[family] = outcomes
    if arguments.write:
        table = {family: table[family] for family in FAMILIES}
        content = {"transformers": transformers.__version__, "families": table}
        TABLE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(page(table, transformers.__version__), encoding="utf-8")
    print(f"{changed} of {len(arguments.families or FAMILIES)} families differ from {TABLE.name}")
    return int(bool(changed) and not arguments.write)


if __name__ == "__main__":
    raise SystemExit(main())
