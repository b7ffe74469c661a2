"""transformers models with a position bias (T5 and its relatives), and where a bias is refused."""

import pytest
import torch
import transformers
from test_transformers import TINY, assert_like_eager, make_model

from kvops.integrations.transformers import KVOpsCache, attention


@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5", "LongT5", "SwitchTransformers"])
@pytest.mark.parametrize("padded", [False, True])
def test_models_with_a_position_bias(family, padded):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, vocab_size=61, decoder_start_token_id=0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():  # as initialised, the biases are near 0
        torch.nn.init.normal_(parameter, std=0.3)
    ids, real = torch.randint(1, 61, (2, 7)), torch.ones(2, 5, dtype=torch.int64)
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    if padded:
        batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
        real[0, 3:] = 0
        batch["decoder_attention_mask"] = real
    assert_like_eager(model, batch, real, use_cache=False)
    expected = []
    for name in ("eager", "kvops"):
        model.set_attn_implementation(name)
        given = {"attention_mask": batch["attention_mask"]} if padded else {}
        expected.append(model.generate(ids, **given, max_new_tokens=4, do_sample=False))
    assert torch.equal(*expected)


def test_a_bias_beside_a_paged_cache_is_refused():
    model, ids = make_model("Llama"), torch.randint(1, TINY["vocab_size"], (1, 5))
    model.set_attn_implementation("kvops")
    with pytest.raises(ValueError, match=r"attention_mask: expected .* beside a KVOpsCache .* own cache"):
        model(ids, attention_mask=torch.zeros(1, 1, 5, 5), past_key_values=KVOpsCache(model.config, max_tokens=64))


def test_a_bias_beside_packed_sequences_is_refused():
    model, lens = make_model("Llama"), torch.tensor([0, 4], dtype=torch.int32)
    q, k, v = (torch.zeros(1, heads, 4, 8) for heads in (6, 2, 2))
    packing = {"cu_seq_lens_q": lens, "cu_seq_lens_k": lens}
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected None beside a position bias"):
        attention(model.model.layers[0].self_attn, q, k, v, None, position_bias=torch.zeros(1, 6, 4, 4), **packing)
