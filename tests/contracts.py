"""The signatures of the operators, as the design fixes them."""

import ast
import inspect
import re

# The operators as the design fixes them: names, order, defaults; `!` behind what is written. Keywords with a default
# may be added, nothing else may change.
CONTRACTS = """
flash_attention(q, k, v, *, causal=False, window_left=-1, window_right=-1, scale=None, softcap=0.0, sinks=None,
    alibi_slopes=None, bias=None, dropout_p=0.0, dropout_seed=None) -> (out, lse)
flash_attention_backward(dout, q, k, v, out, lse, *, causal=False, window_left=-1, window_right=-1, scale=None,
    softcap=0.0, sinks=None, alibi_slopes=None, dlse=None, bias=None, dropout_p=0.0, dropout_seed=None)
    -> (dq, dk, dv, dsinks)
flash_attention_bias_backward(dout, q, k, v, out, lse, bias, *, causal=False, window_left=-1, window_right=-1,
    scale=None, softcap=0.0, alibi_slopes=None, dlse=None, dropout_p=0.0, dropout_seed=None) -> (dbias)
flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False,
    window_left=-1, window_right=-1, scale=None, softcap=0.0, sinks=None, alibi_slopes=None, bias=None, dropout_p=0.0,
    dropout_seed=None) -> (out, lse)
flash_attention_varlen_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *,
    causal=False, window_left=-1, window_right=-1, scale=None, softcap=0.0, sinks=None, alibi_slopes=None, dlse=None,
    bias=None, dropout_p=0.0, dropout_seed=None) -> (dq, dk, dv, dsinks)
flash_attention_varlen_bias_backward(dout, q, k, v, out, lse, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, *, causal=False, window_left=-1, window_right=-1, scale=None, softcap=0.0, alibi_slopes=None,
    dlse=None, dropout_p=0.0, dropout_seed=None) -> (dbias)
merge_attention(out_a, lse_a, out_b, lse_b) -> (out, lse)
merge_attention_backward(dout, out_a, lse_a, out_b, lse_b, *, dlse=None) -> (dout_a, dlse_a, dout_b, dlse_b)
paged_append(k, v, k_cache!, v_cache!, block_tables, seq_lens, *, q_lens=None, positions=None!, token_positions=None,
    scores=None!, k_scale=None, v_scale=None, cu_seqlens_q=None, max_seqlen_q=None, k_slot_scale=None!,
    v_slot_scale=None!) -> ()
paged_attention(q, k_cache, v_cache, block_tables, seq_lens, *, q_lens=None, causal=True, window_left=-1,
    positions=None, query_positions=None, scale=None, softcap=0.0, sinks=None, tree_mask=None, k_scale=None,
    v_scale=None, scores=None!, score_reduce="sum", score_decay=1.0, schedule=None, cu_seqlens_q=None,
    max_seqlen_q=None, out=None!, bias=None, k_slot_scale=None, v_slot_scale=None) -> (out, lse)
paged_latent_attention(q, cache, block_tables, seq_lens, *, value_dim, scale, causal=True, softcap=0.0,
    batch_invariant=False, cu_seqlens_q=None, max_seqlen_q=None, out=None!, cache_scale=None) -> (out, lse)
paged_schedule(seq_lens, block_size, *, num_programs=0) -> (schedule)
attention_scores(q, k, lse, *, causal=False, window_left=-1, window_right=-1, scale=None, softcap=0.0,
    alibi_slopes=None, query_start=0, skip_recent=0, reduce="sum", group="sum") -> (scores)
attention_scores_varlen(q, k, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False,
    window_left=-1, window_right=-1, scale=None, softcap=0.0, alibi_slopes=None, query_start=0, skip_recent=0,
    reduce="sum", group="sum") -> (scores)
select_blocks(scores, block_tables, seq_lens, budget, *, positions=None, protect_first=0, protect_last=0,
    min_per_head=0, scope="head") -> (new_lens, keep)
compact(k_cache!, v_cache!, block_tables, seq_lens!, keep, *, positions=None!, scores=None!, k_slot_scale=None!,
    v_slot_scale=None!) -> (freed)
copy_blocks(k_cache!, v_cache!, source, target, *, positions=None!, scores=None!, k_slot_scale=None!,
    v_slot_scale=None!) -> ()
verify_draft(target_logits, draft_tokens, *, draft_lens=None, draft_probs=None, temperature=None, seed=None, step=None)
    -> (tokens, num_accepted)
verify_draft_varlen(target_logits, draft_tokens, cu_seqlens, max_seqlen, *, draft_probs=None, temperature=None,
    seed=None, step=None) -> (tokens, num_accepted)
verify_tree(target_logits, draft_tokens, parents, *, draft_probs=None, temperature=None, seed=None, step=None)
    -> (path, tokens, num_accepted)
prompt_lookup(tokens, lens, *, num_draft, max_ngram=3, min_ngram=1) -> (draft_tokens, draft_lens)
"""


class Contract:
    def __init__(self, text: str) -> None:
        signature, _, returns = text.partition("->")
        name, _, parameters = signature.strip().rstrip(")").partition("(")
        self.name = name
        self.returns = [part for part in returns.strip(" ()").split(", ") if part]
        self.written = set(re.findall(r"(\w+)(?:=None)?!", parameters))
        arguments = ast.parse(f"def f({parameters.replace('!', '')}): pass").body[0].args
        assert not arguments.defaults
        self.positional = [argument.arg for argument in arguments.args]
        required = inspect.Parameter.empty
        self.keywords = {
            argument.arg: required if default is None else ast.literal_eval(default)
            for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        }


CONTRACT = {contract.name: contract for contract in map(Contract, re.sub(r"\n +", " ", CONTRACTS.strip()).split("\n"))}
