"""Dropout of transformers models in training mode, and where it is refused."""

import pytest
import torch
from test_transformers import make_model, padded

import kvops
from kvops.integrations.transformers import KVOpsCache, attention


@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_drops_in_training_mode(side):
    model, batch = make_model("Llama", attention_dropout=0.5, attn_implementation="kvops"), padded(side)
    expected = model(**batch).logits
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        logits = model.train()(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
        results.append(
            (logits, torch.autograd.grad(logits.square().sum(), model.model.layers[0].self_attn.q_proj.weight)[0])
        )
    for one, again, other in zip(*results, strict=True):
        assert torch.equal(one, again)
        assert not torch.allclose(one, other)
    assert torch.equal(model.eval()(**batch).logits, expected)
    q, k, v = (torch.randn(1, heads, 4, 8) for heads in (6, 2, 2))
    torch.manual_seed(5)
    out, _ = attention(model.model.layers[0].self_attn, q, k, v, None, scaling=1.0, dropout=0.5)
    torch.manual_seed(5)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert torch.equal(out, kvops.flash_attention(q, k, v, causal=True, scale=1.0, dropout_p=0.5)[0])


def test_dropout_beside_a_cache_is_refused():
    model = make_model("Llama", attention_dropout=0.5, attn_implementation="kvops").train()
    cache = KVOpsCache(model.config, max_tokens=32, block_size=4)
    with torch.no_grad(), pytest.raises(ValueError, match=r"dropout: expected 0 beside a KVOpsCache .*, got 0\.5"):
        model(torch.ones(1, 4, dtype=torch.int64), past_key_values=cache)
