"""The sizes of captured steps: plans are filled up to the next one."""

from __future__ import annotations

from collections.abc import Sequence

_SMALLEST_CHUNK = 64


def lane_buckets(max_lanes: int) -> tuple[int, ...]:
    """Powers of two below `max_lanes`, with the points between them from 32 on, then `max_lanes` itself."""
    sizes = {2**power for power in range(max_lanes.bit_length())} | {3 * 2**power for power in range(4, max_lanes.bit_length())}
    return (*sorted(size for size in sizes if size < max_lanes), max_lanes)


def decode_buckets(max_lanes: int, node_sizes: Sequence[int], max_rows: int) -> list[tuple[int, int]]:
    """(lanes, nodes) of every decode step that plans within the row budget can need. A bucket may exceed the budget, as its last
    lanes are padding."""
    sizes = lane_buckets(max_lanes)
    smallest = [1, *(size + 1 for size in sizes[:-1])]
    firsts = list(zip(sizes, smallest, strict=True))
    return [(size, nodes) for nodes in node_sizes for size, first in firsts if nodes == 1 or first * nodes <= max_rows]


def max_bucket_rows(max_lanes: int, node_sizes: Sequence[int], max_rows: int) -> int:
    """Rows of the largest decode step: what its logits take is part of the memory arithmetic."""
    return max(lanes * nodes for lanes, nodes in decode_buckets(max_lanes, node_sizes, max_rows))


def chunk_buckets(max_rows: int) -> tuple[int, ...]:
    """Rows of the prefill steps: doubling, up to the most that a plan may hold."""
    sizes = []
    rows = _SMALLEST_CHUNK
    while rows < max_rows:
        sizes.append(rows)
        rows *= 2
    return (*sizes, max_rows)
