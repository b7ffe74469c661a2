"""Verification of trees of drafts: schema, checks, fake, the public function and the attention mask of a tree."""

from __future__ import annotations

import torch
from torch import Tensor

from kvops import checks
from kvops.eager import verify_tree as eager
from kvops.ops.registry import caller, register
from kvops.ops.verify import check_sampling, draw_seed


def _check_verify_tree(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    *,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
) -> None:
    checks.expect_rank("target_logits", target_logits, "[batch, nodes, vocab]")
    checks.expect_dtype("target_logits", target_logits, *checks.FLOAT_DTYPES)
    checks.expect_last_contiguous("target_logits", target_logits)
    B, N, V = target_logits.shape
    checks.expect_at_least("target_logits.shape[1] (nodes)", N, 1)
    checks.expect_at_least("target_logits.shape[2] (vocab)", V, 1)
    for name, value, dtype in (("draft_tokens", draft_tokens, torch.int64), ("parents", parents, torch.int32)):
        checks.expect_dtype(name, value, dtype)
        checks.expect_shape(name, value, "[batch, nodes]", B, N)
        checks.expect_same_device(name, value, "target_logits", target_logits)
    if draft_probs is not None:
        checks.expect_dtype("draft_probs", draft_probs, torch.float32)
        checks.expect_shape("draft_probs", draft_probs, "[batch, nodes, vocab]", B, N, V)
        checks.expect_last_contiguous("draft_probs", draft_probs)
        checks.expect_same_device("draft_probs", draft_probs, "target_logits", target_logits)
    check_sampling(target_logits, temperature, seed, step)
    if checks.debug() and checks.has_data(target_logits):
        _check_tree_data(target_logits, draft_tokens, parents, draft_probs, temperature)


def _check_tree_data(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_probs: Tensor | None,
    temperature: Tensor | None,
) -> None:
    N, V = target_logits.shape[1:]
    node = torch.arange(N, device=parents.device)
    checks.expect_data(
        "parents", "-1 for the root, and for other nodes -1 or an earlier node", (parents >= -1) & (parents < node)
    )
    drafted = parents >= 0
    checks.expect_data(
        "draft_tokens",
        f"tokens inside the vocabulary of {V} for all nodes that have a parent",
        ~drafted | ((draft_tokens >= 0) & (draft_tokens < V)),
    )
    checks.expect_data(
        "target_logits",
        "rows without NaN or +inf and with at least one finite logit",
        ~(drafted | (node == 0)) | target_logits.amax(-1).isfinite(),
    )
    if temperature is not None:
        checks.expect_data(
            "temperature", "finite temperatures of at least 0", (temperature >= 0) & temperature.isfinite()
        )
    if draft_probs is not None:
        checks.expect_data(
            "draft_probs",
            "rows of probabilities that sum to 1",
            ~drafted | ((draft_probs.amin(-1) >= 0) & ((draft_probs.sum(-1) - 1).abs() < 1e-3)),
        )
        drawn = draft_probs.gather(2, draft_tokens.clamp(0, V - 1)[..., None])[..., 0]
        checks.expect_data("draft_probs", "a positive probability for each draft token", ~drafted | (drawn > 0))


def _fake_verify_tree(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    *,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _ = target_logits.shape
    return parents.new_empty((B, N)), draft_tokens.new_empty((B, N)), parents.new_empty(B)


_verify_tree = caller(
    register(
        "verify_tree(Tensor target_logits, Tensor draft_tokens, Tensor parents, *, Tensor? draft_probs=None, "
        "Tensor? temperature=None, Tensor? seed=None, Tensor? step=None) -> (Tensor, Tensor, Tensor)",
        check=_check_verify_tree,
        fake=_fake_verify_tree,
        eager=eager.verify_tree,
        kernel="kvops.kernels.verify_tree:verify_tree",
        cpu="kvops.kernels.cpu.verify_tree:verify_tree",
    )
)


def verify_tree(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    *,
    draft_probs: Tensor | None = None,
    temperature: Tensor | None = None,
    seed: Tensor | None = None,
    step: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Verify a tree of drafts for each request, losslessly.

    At each node the children are tested in the order of their numbers. A child is accepted with probability
    min(1, r / q). r is the target's distribution at first; after each refusal it becomes max(r - q, 0), renormalised
    (multi-round speculative sampling: Miao et al., SpecInfer, arXiv 2305.09781; Chen et al., Sequoia,
    arXiv 2402.12374). If no child is accepted, the token is sampled from r.
    Greedy requests follow the target's argmax. A tree that is a chain emits the tokens of ``verify_draft``.

    Args:
        target_logits: float16, bfloat16 or float32 ``[B, N, V]``, the last dimension contiguous: row n is the
            target's prediction after node n, computed under :func:`tree_mask`.
        draft_tokens: int64 or int32 ``[B, N]``: the nodes' tokens; node 0 is the root, the last token accepted before,
            and its token is not read. A node whose token is outside the vocabulary is refused. int32 is converted (the
            operator itself takes int64).
        parents: int32 ``[B, N]``: each node's parent, a node of a smaller number; -1 for the root and for padding.
        draft_probs: float32 ``[B, N, V]``: row n is the distribution that node n's token was drawn from (row 0 is
            not looked at). Siblings drawn independently share one row; siblings drawn without replacement have the
            row without their earlier siblings, renormalised. None: each draft is a point mass.
        temperature, seed, step: as in :func:`verify_draft`.

    Returns:
        ``path`` int32 ``[B, N]``: the root and the accepted nodes below it, then -1; ``tokens`` ``[B, N]`` in the dtype
        of ``draft_tokens``: the accepted drafts, then the corrected or bonus token, then -1 (``tokens[b, i]`` was
        decided at node ``path[b, i]``); ``num_accepted`` int32 ``[B]``, the root not counted. A row of logits with a
        NaN, a +inf or nothing but -inf is refused: a request that comes to it gets -1 where its next token would stand.

    Raises:
        ValueError, TypeError: as :func:`verify_draft`; under ``KVOPS_DEBUG=1`` also for parents that are not earlier
            nodes (such nodes are never reached otherwise).
    """
    path, tokens, num_accepted = _verify_tree(
        target_logits,
        checks.expect_tokens("draft_tokens", draft_tokens),
        parents,
        draft_probs=draft_probs,
        temperature=temperature,
        seed=draw_seed(temperature, seed),
        step=step,
    )
    return path, tokens.to(draft_tokens.dtype), num_accepted


def tree_mask(parents: Tensor) -> Tensor:
    """The attention mask of trees: bool ``[B, N, N]``, true where node j is node i or one of its ancestors.

    ``parents`` is int32 ``[B, N]`` as in :func:`verify_tree`; a padding node sees only itself. The mask is what
    ``paged_attention`` takes as ``tree_mask``, and ``mask.sum(-1) - 1`` is each node's depth, by which its position
    exceeds the root's. Made on the device without synchronising.
    """
    checks.expect_tensor("parents", parents)
    checks.expect_rank("parents", parents, "[batch, nodes]")
    checks.expect_dtype("parents", parents, torch.int32, torch.int64)
    N = parents.shape[1]
    node = torch.arange(N, device=parents.device)
    # One step up or none; squared, two steps or fewer, and so on until the deepest chain is covered.
    mask = ((parents[..., None] == node) | (node[:, None] == node)).float()
    for _ in range(max(N - 1, 1).bit_length()):
        mask = (mask @ mask).clamp_max_(1.0)
    return mask > 0
