"""Measurements in the real vLLM, in its own environment (``make test-vllm`` creates it): a soak of random requests,
answers to questions, and a benchmark of serving."""
