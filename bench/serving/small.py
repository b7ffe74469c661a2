"""Small models of random weights in Hugging Face folders, for vLLM."""

from pathlib import Path

import torch


def small(folder: Path, family: str = "Llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A model of random weights: two layers, four query heads on two KV heads of 32."""
    import transformers

    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 128,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{family}Config")(**(shape | changes), dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:  # wide enough for attention to have preferences
            torch.nn.init.normal_(weight, std=0.3 if "embed" not in name else 1.0)
    model.to(dtype).save_pretrained(folder)
    return folder
