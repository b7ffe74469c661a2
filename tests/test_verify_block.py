"""verify_draft with method="block": the published algorithm, its residual, and what it shares with the token method."""

import pytest
import speculation
import torch
from test_verify import request_batch

import kvops

NUMBA = True


@pytest.mark.parametrize(("B", "V"), [(4, 1), (40, 5), (8, 1030)])
@pytest.mark.parametrize("with_probs", [False, True])
def test_block_verification_equals_the_published_algorithm(backend, device, B, V, with_probs):
    T = 4
    logits, drafts, probs, seeds, steps = request_batch(B, T, V, seed=2)
    temperature = torch.tensor([1.0, 0.7, 1.3, 1.0]).repeat(B // 4)
    lens = torch.tensor([4, 4, 4, 4, 3, 4, 4, 2, 4, 1], dtype=torch.int32).repeat(4)[:B]
    drafts[3, 2] = -1
    tokens, accepted = kvops.verify_draft(
        logits.to(device),
        drafts.to(device),
        draft_lens=lens.to(device),
        draft_probs=probs.to(device) if with_probs else None,
        temperature=temperature.to(device),
        seed=seeds.to(device),
        step=steps.to(device),
        method="block",
    )
    for b, n in enumerate(lens.tolist()):
        want, count = speculation.verify_block(
            logits[b, : n + 1].double().tolist(),
            drafts[b, :n].tolist(),
            probs[b, :n].double().tolist() if with_probs else None,
            float(temperature[b]),
            int(seeds[b]),
            int(steps[b]),
        )
        assert tokens[b].tolist() == want + [-1] * (T + 1 - len(want))
        assert int(accepted[b]) == count


def test_a_block_s_residual_counts_what_its_drafts_used_up(backend, device):
    """The first draft has p / q = 0.7; behind it only token 0 exceeds q once p is weighed by 0.7, as it must be."""
    B = 40
    q = torch.full((B, 2, 8), 1 / 8)
    p = torch.full((B, 3, 8), 1 / 8)
    p[:, 0, 2] = 0.7 / 8
    p[:, 1] = torch.tensor([0.4, 0.15, 0.15, 0.15, 0.14, 0.004, 0.004, 0.002])
    tokens, accepted = kvops.verify_draft(
        p.log().to(device),
        torch.tensor([[2, 7]]).expand(B, 2).to(device),
        draft_probs=q.to(device),
        temperature=torch.ones(B, device=device),
        seed=torch.arange(B, device=device),
        method="block",
    )
    stopped = accepted == 1
    assert int(stopped.sum()) > 5
    assert (tokens[stopped][:, 1] == 0).all()


def test_greedy_requests_are_the_same_in_both_methods(backend, device):
    logits, drafts, probs, seeds, _ = (x.to(device) for x in request_batch(8, 3, 30))
    drafts[::2] = logits[::2, :3].argmax(-1)
    mixed = torch.tensor([0.0, 0.0, 1.0, 0.0] * 2, device=device)
    greedy = mixed == 0
    for temperature in (None, mixed):
        results = [
            kvops.verify_draft(logits, drafts, draft_probs=probs, temperature=temperature, seed=seeds, method=method)
            for method in ("token", "block")
        ]
        for token, block in zip(*results, strict=True):
            assert torch.equal(token[greedy], block[greedy])
