"""Text generation over a :class:`kvops.PagedKVCache`: prefill, decoding, sampling, speculation, statistics."""
