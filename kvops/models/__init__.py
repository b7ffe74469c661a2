"""A thin Llama-family reference model: configuration, loaders, tokenizer, generation."""
