"""Heads for a model: texts that the model writes itself, and what heads get right along them."""
