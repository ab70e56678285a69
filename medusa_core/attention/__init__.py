"""Attention over a paged KV cache for packed queries: prompts in chunks and trees of draft tokens alike."""
