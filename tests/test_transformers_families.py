"""Every decoder of transformers: right, or refused in one sentence. tests/transformers_families.py runs them."""

import pytest
import torch
import transformers
from transformers_families import (
    CHECKS,
    FAMILIES,
    PAGE,
    batch,
    build,
    check,
    expected_table,
    expected_version,
    page,
    use,
)

import kvops.integrations.transformers as kvops_transformers

TABLE = expected_table()
BUILT = [family for family, outcomes in TABLE.items() if "built" not in outcomes]


@pytest.mark.skipif(transformers.__version__ != expected_version(), reason="the table is of another transformers")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_does_what_the_table_says(family):
    assert check(family) == TABLE.get(family)


def test_the_table_has_every_family_and_no_wrong_result():
    if transformers.__version__ == expected_version():
        assert list(TABLE) == list(FAMILIES)
    assert len(BUILT) >= 130
    for family in BUILT:
        assert list(TABLE[family]) == list(CHECKS), family
        for outcome in TABLE[family].values():
            assert outcome in ("right", "own attention", "transformers cannot") or outcome.startswith("refused: ")


def test_the_page_of_the_documentation_is_made_from_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(TABLE, expected_version()), (
        "python tests/transformers_families.py --write"
    )


@pytest.mark.parametrize("fault", ["scale", "padding", "window"])
def test_the_checks_notice_a_fault(fault, monkeypatch):
    """A wrong scale, padding that is attended to, a window one token wider: each changes what Gemma 3 computes."""
    from kvops.integrations.transformers import masks

    model = build("gemma3_text")
    with torch.no_grad():
        use(model, "eager")
        expected = model(**batch("left"), use_cache=False).logits
        use(model, kvops_transformers.enable())
        if fault == "scale":
            for layer in model.model.layers:
                layer.self_attn.scaling *= 1.05
        elif fault == "padding":
            monkeypatch.setattr(masks, "_pack_rows", lambda *args: None)
        else:
            monkeypatch.setattr(masks, "_narrower", lambda limit, other: other + 1)
        got = model(**batch("left"), use_cache=False).logits
    real = batch("left")["attention_mask"].bool()
    assert float((got - expected)[real].abs().max() / expected.abs().max()) > 1e-3
