"""The CPU implementations: vectorised PyTorch, memory linear in sequence length."""
