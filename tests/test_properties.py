"""What holds for whatever hypothesis thinks of: a file of its own, so that no other needs hypothesis."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from test_prompt_lookup import expect_drafts, packed

import kvops
from kvops.policies import share_out


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 2), max_size=24), min_size=1, max_size=4),
    max_ngram=st.integers(1, 5),
    num_draft=st.integers(0, 6),
)
def test_any_small_batch_is_looked_up(texts, max_ngram, num_draft):
    min_ngram = max(1, max_ngram - 2)
    result = kvops.prompt_lookup(*packed(texts, "cpu"), num_draft=num_draft, max_ngram=max_ngram, min_ngram=min_ngram)
    expect_drafts(result, texts, num_draft, max_ngram, min_ngram)


@given(
    st.integers(0, 400), st.lists(st.floats(0.05, 3), min_size=1, max_size=12), st.integers(0, 9), st.integers(9, 40)
)
def test_a_total_is_shared_out_whole_and_within_bounds(total, weights, least, most):
    parts = share_out(total, weights, least=least, most=most)
    assert all(least <= part <= most for part in parts)
    assert sum(parts) == min(max(total, least * len(weights)), most * len(weights))
    by_weight = [part for _, part in sorted(zip(weights, parts, strict=True), key=lambda pair: pair[0])]
    assert all(small <= large + 1 for small, large in itertools.pairwise(by_weight))
