"""Structured output: what the grammar of a request allows at each node of a tree. Runs without torch."""
