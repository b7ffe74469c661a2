"""Planted faults of dropout and of biases in dense, packed and paged attention (``mutations.py``)."""

from faults import Mutation, named

BIAS = named("attention_bias", "agrees", "triton")
DROPOUT = named("attention_dropout", "agrees", "triton")

DROPOUT_FAULTS = [
    Mutation(
        "a bias is not added",
        "kernels/flash_tiles.py",
        'scores = tl.where(bias == float("-inf"), bias, scores + bias)',
        'scores = tl.where(bias == float("-inf"), bias, scores)',
        BIAS,
    ),
    Mutation(
        "a row that a bias hides from all keys has the lse of its sink",
        "kernels/flash_forward.py",
        "sees_a_key = empty == 0",
        "sees_a_key = seqlen_k > 0",
        named("attention_bias", "triton", "empty"),
    ),
    Mutation(
        "dbias misses the last batch entry",
        "kernels/flash_backward_bias.py",
        "for entry in tl.range(first_batch, end_batch):",
        "for entry in tl.range(first_batch, end_batch - SUM_BATCHES):",
        BIAS,
    ),
    Mutation(
        "eager: dbias is half of what it is",
        "kvops/eager/attention.py",
        "target += ds.flatten(1, 2).sum_to_size(target.shape)",
        "target += (ds * 0.5).flatten(1, 2).sum_to_size(target.shape)",
        named("attention_bias", "agrees", "eager"),
    ),
    Mutation(
        "packed: every sequence reads the bias of the first rows",
        "kernels/flash_forward.py",
        "head * stride_bias_h + first_row * stride_bias_m",
        "head * stride_bias_h",
        named("varlen_bias", "agrees", "triton"),
    ),
    Mutation(
        "packed: the gradient of a bias goes to the first rows",
        "kernels/flash_backward_bias.py",
        "dbias_ptr += first_q * stride_dbias_m",
        "dbias_ptr += 0",
        named("varlen_bias", "agrees", "triton"),
    ),
    Mutation(
        "packed, eager: the bias of other rows",
        "kvops/eager/varlen.py",
        "        rows if bias.shape[1] > 1 else slice(None),\n",
        "        slice(rows.stop - rows.start) if bias.shape[1] > 1 else slice(None),\n",
        named("varlen_bias", "agrees", "eager"),
    ),
    Mutation(
        "dropout: the words of a block serve its keys in another order",
        "kernels/flash_tiles.py",
        "tl.join(tl.join(a >= low, c >= low), tl.join(b >= low, d >= low))",
        "tl.join(tl.join(a >= low, b >= low), tl.join(c >= low, d >= low))",
        named("attention_dropout", "triton", "manual"),
    ),
    Mutation(
        "dropout: all heads drop the same",
        "kernels/flash_tiles.py",
        "return seed, (batch * heads + head).to(tl.int32)",
        "return seed, (batch * heads).to(tl.int32)",
        named("attention_dropout", "triton", "manual"),
    ),
    Mutation(
        "dropout: what is kept is not scaled up",
        "kernels/flash_forward.py",
        "total *= kept_share",
        "total *= 1.0",
        DROPOUT,
    ),
    Mutation(
        "dropout: dV comes of all probabilities",
        "kernels/flash_backward_keys.py",
        "dv = dot(weights.to(dout.dtype), dout, dv)",
        "dv = dot(p.to(dout.dtype), dout, dv)",
        DROPOUT,
    ),
    Mutation(
        "dropout: dQ's delta is not that of what is kept",
        "kernels/flash_backward_queries.py",
        "delta *= kept_share",
        "delta *= 1.0",
        DROPOUT,
    ),
    Mutation(
        "dropout: the gradient of a bias takes the mask of other queries",
        "kernels/flash_backward_bias.py",
        "dropout_keeps(seed, drop_below, plane, start_m, start_n,",
        "dropout_keeps(seed, drop_below, plane, start_m + 1, start_n,",
        named("attention_dropout", "bias", "triton"),
    ),
    Mutation(
        "dropout, eager: tiles of keys begin at a multiple of four",
        "kvops/eager/dropout.py",
        "[..., tile.low - 4 * first : tile.high - 4 * first]",
        "[..., : tile.high - tile.low]",
        named("attention_dropout", "agrees", "eager"),
    ),
    Mutation(
        "dropout, eager: every sequence is the first one of a batch",
        "kvops/eager/varlen.py",
        'options = options | {"first_entry": i}',
        'options = options | {"first_entry": 0}',
        named("attention_dropout", "packed", "eager"),
    ),
    Mutation(
        "paged: every token has the bias of the first one",
        "kernels/paged_tiles.py",
        "query_head * stride_h + place.to(tl.int64) * stride_t",
        "query_head * stride_h",
        named("paged_bias", "triton", "agrees"),
    ),
    Mutation(
        "paged: a slot that a bias hides from all rows loses its score",
        "kernels/paged_scores.py",
        'own_seen = seen & (s != float("-inf"))',
        "own_seen = seen",
        named("paged_bias", "triton", "all_rows_are_hidden"),
    ),
    Mutation(
        "paged: a slot that a bias hides from all rows of a chunk loses its score",
        "kernels/paged_scores.py",
        'seen &= s != float("-inf")',
        "seen &= s == s",
        named("paged_bias", "triton", "all_rows_are_hidden"),
    ),
    Mutation(
        "paged, eager: a hidden key that is NaN spoils its rows",
        "kvops/eager/paged.py",
        "seen = seen & (added != -torch.inf)",
        "seen = seen & (added == added)",
        named("paged_bias", "eager", "no_number"),
    ),
]
