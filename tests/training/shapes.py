"""One of each shape that heads can have, for tiny models."""

from __future__ import annotations

from medusa_core.model.sequential_heads import HeadsShape

SHAPES = {
    "medusa": HeadsShape(num_heads=2, mlp_size=0, is_sequential=False, shares_blocks=False),
    "two blocks": HeadsShape(num_heads=2, num_layers=2, mlp_size=0, is_sequential=False, shares_blocks=False),
    "own lm_head": HeadsShape(num_heads=2, mlp_size=0, is_sequential=False, shares_blocks=False, output="own"),
    "wide": HeadsShape(num_heads=2, mlp_size=80, is_sequential=False, shares_blocks=False),
    "low rank": HeadsShape(num_heads=2, mlp_size=0, is_sequential=False, shares_blocks=False, output="low-rank", rank=4),
    "markov": HeadsShape(num_heads=2, mlp_size=0, is_sequential=False, shares_blocks=False, has_markov_term=True, rank=8),
    "sequential": HeadsShape(num_heads=2, shares_blocks=False),
    "sequential, shared": HeadsShape(num_heads=2),
    "sequential, all at once": HeadsShape(num_heads=2, num_layers=2, mlp_size=48, output="low-rank", has_markov_term=True, rank=4),
    "sequential, own lm_head": HeadsShape(num_heads=2, output="own"),
}
