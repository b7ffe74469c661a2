"""Writes a model that kvops has loaded, such as a GGUF file, as a folder that transformers and vLLM load."""

from __future__ import annotations

from pathlib import Path

from kvops.extras import require
from kvops.models.loading import LoadedModel


def write_folder(model: LoadedModel, folder: str | Path) -> Path:
    """Write ``config.json``, the weights and the tokenizer into ``folder``, and return its path.

    Args:
        model: as :func:`kvops.models.loading.load` returns it. The weights keep their dtype.
        folder: created if it does not exist.

    Raises ValueError for a model other than a Llama without biases, windows or a scaled rotary embedding, and
    FileNotFoundError for one without a tokenizer.
    """
    transformers = require("transformers")
    c = model.config
    for name, plain in (("attention_bias", False), ("sliding_window", None), ("rope_scaling", None)):
        if getattr(c, name) != plain:
            raise ValueError(f"model: expected {name}={plain} to write a folder, got {getattr(c, name)!r}")
    dtype = next(iter(model.weights.values())).dtype
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_theta,
        max_position_embeddings=c.max_positions,
        tie_word_embeddings=c.tie_embeddings,
        dtype=dtype,
    )
    own = model.tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own.backend, chat_template=own.chat_template, **own.special_tokens
    )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    loaded = theirs.load_state_dict(model.weights, strict=False)
    differing = sorted({*loaded.missing_keys, *loaded.unexpected_keys} - {"lm_head.weight"})
    if differing:
        raise ValueError(f"model: expected exactly the weights of a Llama, got others: {', '.join(differing)}")
    theirs.tie_weights()
    folder = Path(folder)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
