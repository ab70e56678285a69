"""Choosing a token from logits: filters, and noise keyed by position so that speculation cannot change a draw."""
