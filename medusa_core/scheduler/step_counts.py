"""What the steps of one engine did, in plain numbers: there may be a thousand steps a second."""

from __future__ import annotations

from functools import lru_cache

from medusa_core.scheduler.costs import DecodeGroups, StepCosts
from medusa_core.tree.topology import TreeTopology

_MAX_REMEMBERED = 4096


class StepCounts:
    """Totals, read as attributes.

    num_steps: with rows. num_steps_by_size: with decode rows, by the largest tree among their lanes, in the order of `sizes`.
    num_head_hits: accepted draft tokens by the head and rank that are credited with them, in the order of `topology.head_ranks`.
    num_lookup_hits: those that no head offered, but prompt lookup.
    decode_cost_s: what the decode part of the steps takes by the measured costs, draft_cost_s what its drafting does, and
        plain_cost_s what as many tokens take without drafts: as many plain steps of as many lanes as there are tokens per lane. All
        0 without costs.
    """

    def __init__(self, sizes: tuple[int, ...], topology: TreeTopology, costs: StepCosts | None) -> None:
        self.num_steps = 0
        self.num_steps_by_size = [0] * len(sizes)
        self.num_head_hits = [0] * len(topology.head_ranks)
        self.num_lookup_hits = 0
        self.decode_cost_s = self.draft_cost_s = self.plain_cost_s = 0.0
        self._place_of_size = {size: place for place, size in enumerate(sizes)}
        place_of_rank = {head_rank: place for place, head_rank in enumerate(topology.head_ranks)}
        # None: filled by the lookup. No credit goes to the root.
        self._place_of_node = [place_of_rank.get(head_rank) for head_rank in zip(topology.depths, topology.ranks, strict=True)]
        self._places = lru_cache(_MAX_REMEMBERED)(self._places_of_credit)
        self._decode_seconds = lru_cache(_MAX_REMEMBERED)(costs.decode_seconds) if costs is not None else None

    def launch(self, groups: DecodeGroups) -> None:
        """A step with rows starts."""
        self.num_steps += 1
        if groups:
            self.num_steps_by_size[self._place_of_size[max(groups)[0]]] += 1

    def land(self, groups: DecodeGroups, *, num_lanes: int, num_tokens: int) -> None:
        """The step is done: its decode part, if it had one. With it, or with decode parts of earlier steps whose results come now,
        `num_lanes` lanes have emitted `num_tokens`; others had ended."""
        if self._decode_seconds is None:
            return
        if groups:
            decode_s, draft_s = self._decode_seconds(groups)
            self.decode_cost_s += decode_s
            self.draft_cost_s += draft_s
        if num_lanes:
            self.plain_cost_s += num_tokens / num_lanes * self._decode_seconds(((1, num_lanes),))[0]

    def credit(self, nodes: int) -> None:
        """Tokens of a lane were accepted (plan.LaneResult.credit)."""
        for place in self._places(nodes):
            if place is None:
                self.num_lookup_hits += 1
            else:
                self.num_head_hits[place] += 1

    def _places_of_credit(self, nodes: int) -> tuple[int | None, ...]:
        return tuple(place for node, place in enumerate(self._place_of_node) if nodes >> node & 1)
