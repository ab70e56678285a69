"""Base models and Medusa heads: where they come from, what is refused, and the two modules a step runs."""
