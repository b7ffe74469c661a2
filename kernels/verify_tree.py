"""Verification of trees of drafts.

1. ``softmax_stats_kernel`` over the rows of all nodes.
2. ``offer_kernel``: (requests, nodes) programs; each decides which children of its node are accepted. A child is tested
   against the residual that its refused siblings leave. The residual depends on the node alone, not on the path to it,
   so all nodes decide in parallel.
3. ``walk_kernel``: one program per request follows the decisions from the root.
4. ``tree_race_kernel`` and ``emit_kernel``: the exponential race over the residual of the node at which the walk stops.

Residuals are not stored. ``mass[c]`` is the sum of the residual against which child c was tested; from it each entry of
the vocabulary is computed again by a loop over the siblings: r <- max(r / mass[c] - q[c], 0).
"""

import torch
import triton
import triton.language as tl

from kvops.autotune.lookup import choose
from kvops.kernels.device import current_device
from kvops.kernels.verification import (
    NO_INDEX,
    READ_AS_SCALARS,
    UNSPECIALISED,
    acceptance_threshold,
    draw_by_race,
    exponent_scale,
    race_start,
    race_step,
    row_stats,
    row_weights,
    seed_and_step,
    softmax_stats,
    store_winner,
    vocabulary_index,
)


@triton.jit
def residual_weight(
    weight,
    index,
    mask,
    node,
    end,
    parents_ptr,
    drafts_ptr,
    probs_ptr,
    mass_ptr,
    stride_nn,
    stride_dn,
    stride_pn,
    V,
    HAS_PROBS: tl.constexpr,
):
    """What the children of ``node`` before ``end`` leave of the weights of the entries ``index``; all are refused.

    The pointers are at this request; weights without draft probabilities stay unnormalised.
    """
    for child in range(node + 1, end):
        if tl.load(parents_ptr + child * stride_nn) == node:
            draft = tl.load(drafts_ptr + child * stride_dn)
            if (draft >= 0) & (draft < V):
                if HAS_PROBS:
                    q = tl.load(probs_ptr + child * stride_pn + index, mask=mask, other=0.0)
                    p = weight / tl.load(mass_ptr + child)
                    weight = tl.where(p > q, p - q, 0.0)
                else:
                    weight = tl.where(index == draft, 0.0, weight)
    return weight


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=READ_AS_SCALARS)
def offer_kernel(
    logits_ptr,
    drafts_ptr,
    parents_ptr,
    probs_ptr,
    temperature_ptr,
    seed_ptr,
    step_ptr,
    max_ptr,
    sum_ptr,
    argmax_ptr,
    accept_ptr,
    mass_ptr,
    stride_lb,
    stride_ln,
    stride_db,
    stride_dn,
    stride_nb,
    stride_nn,
    stride_pb,
    stride_pn,
    N,
    V,
    num_splits,
    HAS_PROBS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1)
    logits_ptr += batch * stride_lb + node.to(tl.int64) * stride_ln
    drafts_ptr += batch * stride_db
    parents_ptr += batch * stride_nb
    accept_ptr += batch * N
    mass_ptr += batch * N
    if HAS_PROBS:
        probs_ptr += batch * stride_pb
    scale, sampled = exponent_scale(temperature_ptr, batch, HAS_TEMPERATURE)
    row_max, mass, argmax = row_stats(max_ptr, sum_ptr, argmax_ptr, batch * N + node, num_splits, scale, BLOCK_S)
    usable = mass > 0
    nodes = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    children = tl.load(parents_ptr + nodes * stride_nn, mask=(nodes > node) & (nodes < N), other=-1) == node
    last_child = tl.max(tl.where(children, nodes, 0), 0)
    for child in range(node + 1, last_child + 1):
        if tl.load(parents_ptr + child * stride_nn) == node:
            draft = tl.load(drafts_ptr + child * stride_dn)
            inside = usable & (draft >= 0) & (draft < V)
            accept = draft == argmax
            if HAS_TEMPERATURE:  # noqa: SIM102 (one is decided while compiling, the other while running)
                if sampled & inside:
                    tl.store(mass_ptr + child, mass)
                    tl.debug_barrier()  # the siblings' masses are read back through memory
                    weight = residual_weight(
                        row_weights(logits_ptr, draft, True, row_max, scale), draft, True, node, child, parents_ptr,
                        drafts_ptr, probs_ptr, mass_ptr, stride_nn, stride_dn, stride_pn, V, HAS_PROBS,
                    )  # fmt: skip
                    seed, step = seed_and_step(seed_ptr, step_ptr, batch, HAS_STEP)
                    threshold = acceptance_threshold(seed, step, child - 1)  # from 0 like the drafts of a chain
                    if HAS_PROBS:
                        threshold *= tl.load(probs_ptr + child * stride_pn + draft)
                    accept = threshold * mass < weight
                    if HAS_PROBS:
                        if child < last_child:
                            left = tl.zeros((BLOCK,), tl.float32)
                            for start in range(0, V, BLOCK):
                                index = start + tl.arange(0, BLOCK)  # [BLOCK]
                                left += residual_weight(
                                    row_weights(logits_ptr, index, index < V, row_max, scale), index, index < V, node,
                                    child + 1, parents_ptr, drafts_ptr, probs_ptr, mass_ptr, stride_nn, stride_dn,
                                    stride_pn, V, HAS_PROBS,
                                )  # fmt: skip
                            mass = tl.sum(left, 0)
                    else:
                        mass -= weight
            tl.store(accept_ptr + child, (inside & accept).to(tl.int32))


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=READ_AS_SCALARS)
def walk_kernel(
    drafts_ptr,
    parents_ptr,
    temperature_ptr,
    max_ptr,
    sum_ptr,
    argmax_ptr,
    accept_ptr,
    path_ptr,
    tokens_ptr,
    accepted_ptr,
    node_ptr,
    row_max_ptr,
    row_sum_ptr,
    stride_db,
    stride_dn,
    stride_nb,
    stride_nn,
    N,
    num_splits,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    nodes = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    parents = tl.load(parents_ptr + batch * stride_nb + nodes * stride_nn, mask=nodes < N, other=-1)
    real = (nodes > 0) & (parents >= 0) & (parents < nodes)
    accept = tl.load(accept_ptr + batch * N + nodes, mask=real, other=0) != 0
    path = tl.where(nodes == 0, 0, -1)
    node = 0
    depth = 0
    following = tl.min(tl.where(accept & (parents == node), nodes, NO_INDEX), 0)
    while following != NO_INDEX:
        node = following
        depth += 1
        path = tl.where(nodes == depth, node, path)
        following = tl.min(tl.where(accept & (parents == node), nodes, NO_INDEX), 0)

    scale, sampled = exponent_scale(temperature_ptr, batch, HAS_TEMPERATURE)
    row_max, total, argmax = row_stats(max_ptr, sum_ptr, argmax_ptr, batch * N + node, num_splits, scale, BLOCK_S)
    usable = total > 0
    tl.store(accepted_ptr + batch, depth)
    if HAS_TEMPERATURE:
        tl.store(node_ptr + batch, node)
        tl.store(row_max_ptr + batch, row_max)
        tl.store(row_sum_ptr + batch, tl.where(usable & sampled, total, 0.0))
    tl.store(path_ptr + batch * N + nodes, path, mask=nodes < N)
    # A token stands one place before its node on the path.
    draft = tl.load(drafts_ptr + batch * stride_db + path * stride_dn, mask=path > 0, other=-1)
    tl.store(tokens_ptr + batch * N + nodes - 1, draft, mask=(nodes > 0) & (nodes < N) & (nodes != depth + 1))
    tl.store(tokens_ptr + batch * N + nodes, tl.where(usable, argmax, -1).to(tl.int64) + nodes * 0, mask=nodes == depth)
    tl.store(tokens_ptr + batch * N + nodes, -1 + nodes.to(tl.int64) * 0, mask=(nodes == N - 1) & (nodes != depth))


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=READ_AS_SCALARS)
def tree_race_kernel(
    logits_ptr,
    drafts_ptr,
    parents_ptr,
    probs_ptr,
    temperature_ptr,
    seed_ptr,
    step_ptr,
    mass_ptr,
    node_ptr,
    row_max_ptr,
    row_sum_ptr,
    score_ptr,
    index_ptr,
    stride_lb,
    stride_ln,
    stride_db,
    stride_dn,
    stride_nb,
    stride_nn,
    stride_pb,
    stride_pn,
    N,
    V,
    HAS_PROBS: tl.constexpr,
    HAS_STEP: tl.constexpr,
    LANES: tl.constexpr,
):
    """The winner among the groups of 4 * LANES vocabulary entries, and its score."""
    batch = tl.program_id(0).to(tl.int64)
    if tl.load(row_sum_ptr + batch) == 0:
        return
    scale, _ = exponent_scale(temperature_ptr, batch, True)
    row_max = tl.load(row_max_ptr + batch)
    node = tl.load(node_ptr + batch)
    logits_ptr += batch * stride_lb + node.to(tl.int64) * stride_ln
    if HAS_PROBS:
        probs_ptr += batch * stride_pb
    seed, step = seed_and_step(seed_ptr, step_ptr, batch, HAS_STEP)
    place, words, best, best_index, total = race_start(seed, step, node, LANES)
    for lane in tl.static_range(4):
        index = vocabulary_index(place, lane)
        weight = residual_weight(
            row_weights(logits_ptr, index, index < V, row_max, scale), index, index < V, node, N,
            parents_ptr + batch * stride_nb, drafts_ptr + batch * stride_db, probs_ptr, mass_ptr + batch * N,
            stride_nn, stride_dn, stride_pn, V, HAS_PROBS,
        )  # fmt: skip
        best, best_index, total = race_step(best, best_index, total, weight, words[lane], index)
    store_winner(score_ptr, index_ptr, batch, best, best_index, total, seed, step, node)


def verify_tree(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    *,
    draft_probs: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, N, V = target_logits.shape
    path = parents.new_empty((B, N))
    tokens = draft_tokens.new_empty((B, N))
    num_accepted = parents.new_empty(B)
    if B == 0:
        return path, tokens, num_accepted
    temperature, seed, step = (None if value is None else value.contiguous() for value in (temperature, seed, step))
    if temperature is None:
        draft_probs = None  # greedy requests draw nothing
    config = choose("verify", current_device(), target_logits.element_size(), V)
    stats = softmax_stats(target_logits, None, temperature, config)
    splits = stats[0].shape[1]
    tiles = {"BLOCK_S": triton.next_power_of_2(splits), "BLOCK_N": triton.next_power_of_2(N)}
    accept = parents.new_empty((B, N))
    node = parents.new_empty(B)
    mass = target_logits.new_empty((B, N), dtype=torch.float32)
    row_max, row_sum = target_logits.new_empty((2, B), dtype=torch.float32).unbind()
    inputs = target_logits, draft_tokens, parents, draft_probs, temperature, seed, step
    tree_strides = *draft_tokens.stride(), *parents.stride()
    prob_strides = (0, 0) if draft_probs is None else draft_probs.stride()[:2]
    strides = *target_logits.stride()[:2], *tree_strides, *prob_strides
    flags = {"HAS_PROBS": draft_probs is not None, "HAS_STEP": step is not None}

    if N > 1:
        offer_kernel[(B, N)](
            *inputs,
            *stats,
            accept,
            mass,
            *strides,
            N,
            V,
            splits,
            HAS_TEMPERATURE=temperature is not None,
            BLOCK=config.block,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
            **tiles,
            **flags,
        )
    walk_kernel[(B,)](
        draft_tokens,
        parents,
        temperature,
        *stats,
        accept,
        path,
        tokens,
        num_accepted,
        node,
        row_max,
        row_sum,
        *tree_strides,
        N,
        splits,
        HAS_TEMPERATURE=temperature is not None,
        num_warps=4,
        enable_fp_fusion=True,
        **tiles,
    )
    if temperature is not None:
        tensors = *inputs, mass, node, row_max, row_sum
        draw_by_race(tree_race_kernel, tensors, (*strides, N, V), flags, row_sum, num_accepted, tokens, config)
    return path, tokens, num_accepted
