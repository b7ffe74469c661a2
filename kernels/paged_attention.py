"""Attention over ragged lists of blocks (stream-K): decoding, drafts and chunks of prefill.

Three launches. The first gives each program an equal share of all slots, whatever lists they belong to; a program
writes a partial result (m, l, acc) for every list that its share touches. The second merges the partial results of a
list. The third, only where scores are asked for, walks the same shares again and reduces the probabilities over the
queries: they need the final lse, which no share knows, so the first launch leaves its scores (log2, float32) behind
instead of having K read twice. Where the rows fill more than one tile the work is bound by arithmetic and the matrix of
scores would be large: the third launch then computes it again, tile by tile, and where row tiles and lists alone
fill the GPU each program walks a whole list and there is nothing to merge.

For a slot the scores cost 8 bytes a query head, written and read, and 8 to fold the result: at a group of 4 and D = 128
8% of the 512 bytes of K and V in bfloat16, at most (what the second level cache keeps is not paid for). Half precision
would make that 5%, but a score of 20 would then be off by up to 0.008 and its probability by 0.5%: no exact score.

Every grid and buffer follows from shapes alone, and every sum has one order: no atomics, the same bits each time. Which
order it is follows from the shares, and so from the lengths of the whole batch, unless the call is batch invariant:
then every unit of a list has a partial result of its own, and lists that fill row tiles are never cut.
"""

import torch

from kvops.autotune.lookup import choose
from kvops.kernels.device import current_device
from kvops.kernels.paged import as_bytes
from kvops.kernels.paged_attention_kernel import paged_attention_kernel, paged_merge_kernel
from kvops.kernels.paged_parts import PartedKind, launch_in_parts, parted
from kvops.kernels.paged_plan import PagedKind
from kvops.kernels.paged_schedule import paged_schedule
from kvops.kernels.paged_scores import paged_scores_kernel
from kvops.prepared import prepared


# Over 80 lines: 26 are the signature, and a launch takes a line for each argument.
@prepared(parted(PagedKind))
def paged_attention(
    kind: PagedKind | PartedKind,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    q_lens: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_slot_scale: torch.Tensor | None = None,
    v_slot_scale: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    schedule: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    score_decays: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **numbers: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels; see ``kvops.paged_attention``. ``kind`` has the arguments that are not tensors."""
    if isinstance(kind, PartedKind):
        return launch_in_parts(
            paged_attention.__wrapped__,  # type: ignore[attr-defined]
            kind,
            *(q, k_cache, v_cache, block_tables, seq_lens),
            q_lens=q_lens,
            positions=positions,
            query_positions=query_positions,
            sinks=sinks,
            tree_mask=tree_mask,
            k_scale=k_scale,
            v_scale=v_scale,
            k_slot_scale=k_slot_scale,
            v_slot_scale=v_slot_scale,
            scores=scores,
            cu_seqlens_q=cu_seqlens_q,
            out=out,
            alibi_slopes=alibi_slopes,
            score_decays=score_decays,
            bias=bias,
        )
    out, result, lse = kind.results(q, out)
    if kind.packed:
        q_lens = cu_seqlens_q
    if kind.empty:
        return result, lse
    if schedule is None:
        schedule = paged_schedule(seq_lens, kind.block_size, batch_invariant=kind.invariant)
    config = choose("paged_attention", current_device(), *kind.problem)
    plan = kind.plan(config, schedule.shape[0] - kind.lists - 2)
    stash = lse.new_empty(plan.stash) if plan.stash else None  # float32, without 0.6 µs for saying so
    partial = lse.new_empty(plan.partial) if plan.partial else None
    if not kind.by_place:
        positions = query_positions = None
    if tree_mask is not None:
        tree_mask = tree_mask.view(torch.uint8)
    if bias is not None and bias.dtype == torch.bool:
        bias = bias.view(torch.uint8)
    keys, values = (as_bytes(k_cache), as_bytes(v_cache)) if kind.as_bytes else (k_cache, v_cache)
    lists = (
        block_tables,
        seq_lens,
        q_lens,
        positions,
        query_positions,
        tree_mask,
        k_scale,
        alibi_slopes,
        k_slot_scale,
        bias,
    )
    paged_attention_kernel[plan.grid](
        q,
        keys,
        values,
        *lists,
        v_scale,
        v_slot_scale,
        sinks,
        schedule,
        stash,
        partial,
        out,
        lse,
        *plan.numbers,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    if plan.merge_grid is not None:
        paged_merge_kernel[plan.merge_grid](
            partial,
            schedule,
            cu_seqlens_q,
            sinks,
            values,
            v_scale,
            out,
            lse,
            *plan.merge_numbers,
            num_warps=plan.merge_warps,
            enable_fp_fusion=True,
        )
    if scores is not None:
        paged_scores_kernel[plan.scores_grid](
            q,
            keys,
            *lists,
            schedule,
            stash,
            lse,
            scores,
            score_decays,
            *plan.scores_numbers,
            num_warps=plan.scores_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return result, lse
