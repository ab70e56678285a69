"""Heads for a model: texts that it writes itself, heads that learn from them, and the tree that suits what they get right."""
