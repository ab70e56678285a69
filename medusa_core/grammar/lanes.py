"""The matchers of the lanes that have a grammar: what each node of a tree allows, and what was drawn in the end.

A node's mask says which tokens may be drawn there: those the grammar allows behind the path to the node. Drawing from masked logits
is then what it would be without the tree. Nodes that the grammar does not allow need no mask, since nobody draws them.

A mask takes from 10 microseconds to 250 and more, inside a string of limited length. So trees are cut into chains, and llguidance
follows a chain of every lane at once, in threads of its own.

Shapes: B lanes of one step · N tree nodes (root included) · W words of 32 tokens, int32: token t is bit t % 32 of word t // 32.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens

from medusa_core.grammar.compiler import GrammarCompiler
from medusa_core.outputs import FinishReason
from medusa_core.params import Grammar
from medusa_core.plan import LaneJoin, LaneResult, StepPlan

logger = logging.getLogger(__name__)

# Time for masks below the roots in one step, about that of a step on a GPU. Nodes not reached by then are left out of the tree,
# which costs speed but changes no token.
_DRAFT_BUDGET_S = 0.002
# A first failure may be due to others who have used the same lexer. Whoever fails again decodes without drafts from then on: each
# time costs up to 50 ms.
_MAX_PROBE_FAILURES = 2
# As with these: a matcher that does not last is not made anew for every token.
_MIN_TOKENS_PER_RENEWAL = 64
# What a node takes at least, and the weight of a new measurement of it.
_SHORTEST_S = 5e-6
_SMOOTHING = 0.05


@dataclass(slots=True)
class _Lane:
    """A request's place in its grammar.

    matcher: behind the tokens that were emitted. probe: a second one that follows the tree and comes back, so that whatever happens
    to it on a path nobody takes does not matter; None if it has to be made anew. failure: why the lane cannot go on; "" = it can.
    """

    uid: int
    grammar: Grammar
    emitted: list[int]
    min_tokens: int
    end_ids: list[int]
    matcher: LLMatcher
    probe: LLMatcher | None = None
    num_probe_failures: int = 0
    num_renewals: int = 0
    failure: str = ""

    def usable_probe(self) -> LLMatcher:
        """The one there is, unless it has to be made anew."""
        if self.probe is None:
            self.probe = self.matcher.deep_copy()
        return self.probe


class GrammarLanes:
    """Follows the plans of one runner. `fill` may run in a thread of its own, while nothing happens to its lanes.

    num_tokens: width of the logits. eos_token_ids: the model's.
    """

    def __init__(self, compiler: GrammarCompiler, *, num_tokens: int, eos_token_ids: Sequence[int]) -> None:
        self._compiler = compiler
        self._eos_token_ids = tuple(eos_token_ids)
        self._lanes: dict[int, _Lane] = {}
        # by uid, why a request cannot go on, until the result of that step is read: by then it may have lost its lane
        self._failures: dict[int, str] = {}
        # made when there is something for its threads
        self._executor: LLExecutor | None = None
        # what a node of a chain takes, all lanes at once
        self._node_s = 0.0
        self.num_words = -(-num_tokens // 32)

    def __contains__(self, lane: int) -> bool:
        return lane in self._lanes

    def apply(self, plan: StepPlan) -> None:
        """Take the plan's leaves and joins. A request that goes on has emitted tokens before."""
        for number in plan.leaves:
            lane = self._lanes.pop(number, None)
            if lane is not None:
                self._compiler.take_back(lane.grammar, lane.matcher)
        for join in plan.joins:
            if join.params.grammar is not None:
                self._lanes[join.lane] = self._join(join)

    def fill(
        self, lanes: Sequence[int], tokens_BN: np.ndarray, parents: Sequence[int], budget_s: float = _DRAFT_BUDGET_S
    ) -> tuple[np.ndarray, np.ndarray]:
        """The masks of each lane's tree, int32 [B, N, W], and which nodes are left out of it, bool [B, N].

        A node left out must not be descended to, and neither it nor a node that the grammar does not allow has a mask.

        Args:
            tokens_BN: token of each node; the root's does not matter, as it has been emitted.
            parents: of each node, before it in order; the root's is -1.
            budget_s: most time to spend before nodes below the roots are left out.
        """
        masks_BNW = np.zeros((*tokens_BN.shape, self.num_words), dtype=np.int32)
        is_left_out_BN = np.zeros(tokens_BN.shape, dtype=bool)
        deadline_s = time.perf_counter() + budget_s
        trees = []
        for number, lane in enumerate(map(self._lanes.__getitem__, lanes)):
            tree = _Tree(lane, tokens_BN[number].tolist(), masks_BNW[number], is_left_out_BN[number])
            if lane.failure or lane.num_probe_failures >= _MAX_PROBE_FAILURES:
                self._fill_root(lane, tree.masks_NW[0])
                tree.leave_out(parents)
            else:
                trees.append(tree)
        for chain in _chains(tuple(parents)):
            self._fill_chain(trees, chain, parents, deadline_s)
        return masks_BNW, is_left_out_BN

    def take(self, result: LaneResult) -> LaneResult:
        """Advance by what a step emitted. Returns the result, or instead of it the lane's end where its matcher has failed."""
        failure = self._failures.pop(result.uid, "")
        if failure:
            logger.warning("the output of lane %d is given up: its grammar cannot be followed (%s)", result.lane, failure)
            return LaneResult(lane=result.lane, uid=result.uid, token_ids=[], finish_reason=FinishReason.GRAMMAR)
        lane = self._lanes.get(result.lane)
        if lane is None or lane.uid != result.uid:
            # no grammar, or the lane was given away meanwhile: a request that comes back brings its tokens along
            return result
        if result.finish_reason is None:
            lane.emitted += result.token_ids
            # a matcher that fails says so when it is asked for a mask
            lane.matcher.consume_tokens(result.token_ids)
            if lane.probe is not None and not lane.probe.consume_tokens(result.token_ids):
                lane.probe = None
        return result

    def _join(self, join: LaneJoin) -> _Lane:
        params = join.params
        assert params.grammar is not None
        lane = _Lane(
            uid=join.uid,
            grammar=params.grammar,
            emitted=join.token_ids[join.num_prompt_tokens :],
            min_tokens=params.min_tokens,
            end_ids=[*self._eos_token_ids, *params.stop_token_ids],
            matcher=self._compiler.lend(params.grammar),
        )
        lane.matcher.consume_tokens(lane.emitted)
        return lane

    def _fill_root(self, lane: _Lane, mask_W: np.ndarray) -> None:
        failure = lane.failure or _fill(lane.matcher, mask_W)
        if failure and not lane.failure and lane.num_renewals <= 1 + len(lane.emitted) // _MIN_TOKENS_PER_RENEWAL:
            # Perhaps tokens long past, or others before or beside this one, have used up what the lexer may grow to.
            lane.num_renewals += 1
            lane.matcher, lane.probe = self._compiler.lend(lane.grammar, is_fresh=True), None
            lane.matcher.consume_tokens(lane.emitted)
            failure = _fill(lane.matcher, mask_W)
        lane.failure = failure
        if failure:
            # whatever is drawn is not told to anyone
            self._failures[lane.uid] = failure
            mask_W.fill(-1)
        else:
            _ban_ends(lane, 0, mask_W)

    def _fill_chain(self, trees: list[_Tree], chain: _Chain, parents: Sequence[int], deadline_s: float) -> None:
        """Masks of a chain's nodes, the first chain's root among them, as far as they can be reached and there is time."""
        began_s = time.perf_counter()
        time_left_s = max(deadline_s - began_s, 0.0)
        most = min(len(chain.path), int(time_left_s / max(self._node_s, _SHORTEST_S)))
        jobs = [job for tree in trees if (job := tree.start(chain, most, parents)) is not None]
        if not jobs:
            return
        rows_JW = np.zeros((len(jobs) * (len(chain.path) + 1), self._compiler.num_mask_words), dtype=np.int32)
        places = range(0, len(rows_JW), len(chain.path) + 1)
        self._executor = self._executor or LLExecutor()
        rooted = [(tree.lane.usable_probe(), place) for tree, place in zip(jobs, places, strict=True) if not tree.drafts]
        drafted = [(tree.lane.usable_probe(), place, tree.drafts) for tree, place in zip(jobs, places, strict=True) if tree.drafts]
        # Neither takes an empty list.
        if rooted:
            fill_next_token_bitmask_par(self._executor, rooted, rows_JW)
        if drafted:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, rows_JW)
        longest = max(len(tree.drafts) for tree in jobs)
        self._node_s += _SMOOTHING * ((time.perf_counter() - began_s) / (longest + 1) - self._node_s)
        for tree, place in zip(jobs, places, strict=True):
            lane = tree.lane
            if not lane.usable_probe().is_error() and tree.accept(chain, rows_JW[place:, : self.num_words]):
                continue
            lane.probe = None
            lane.num_probe_failures += 1
            if chain.nodes[0] == 0:
                self._fill_root(lane, tree.masks_NW[0])
            tree.leave_out(parents)


@dataclass(frozen=True, slots=True)
class _Chain:
    """nodes: each the child of the one before. path: what leads from the root to the last of them, root excluded."""

    nodes: tuple[int, ...]
    path: tuple[int, ...]

    @property
    def first_depth(self) -> int:
        """Depth of the first node, the root's being 0."""
        return len(self.path) - len(self.nodes) + 1


@lru_cache(maxsize=64)
def _chains(parents: tuple[int, ...]) -> list[_Chain]:
    """A tree cut into chains, each as long as it gets, the one from the root first and none before the node that it hangs on."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    chains = []
    starts: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    while starts:
        node, above = starts.pop(0)
        nodes: list[int] = [node]
        while children[nodes[-1]]:
            nodes.append(children[nodes[-1]][0])
        path = (*above, *nodes) if node > 0 else tuple(nodes[1:])
        chains.append(_Chain(tuple(nodes), path))
        for depth, at in enumerate(nodes):
            to = (*above, *nodes[: depth + 1]) if node > 0 else tuple(nodes[1 : depth + 1])
            starts += [(sibling, to) for sibling in children[at][1:]]
    return chains


@dataclass(slots=True)
class _Tree:
    """One lane's tree while its masks are filled. drafts: tokens that its probe is to follow now."""

    lane: _Lane
    token_ids: list[int]
    masks_NW: np.ndarray
    is_left_out_N: np.ndarray
    drafts: list[int] = field(default_factory=list)
    has_failed: bool = False

    def start(self, chain: _Chain, most: int, parents: Sequence[int]) -> _Tree | None:
        """Set the drafts for a chain, at most so many; None if there is nothing to look at."""
        head = chain.nodes[0]
        if self.has_failed or (head > 0 and not self._is_open(parents[head], head)):
            return None
        if most < chain.first_depth:
            self.is_left_out_N[head] = True
            return None
        self.drafts = []
        for node in chain.path[:most]:
            if self.token_ids[node] in self.lane.end_ids:
                break
            self.drafts.append(self.token_ids[node])
        return self

    def accept(self, chain: _Chain, rows_IW: np.ndarray) -> bool:
        """Take the masks over, row i that behind i drafts. False if there is none where there should be."""
        depth = chain.first_depth
        parent = -1
        for node in chain.nodes:
            if parent >= 0 and not self._is_open(parent, node):
                break
            if depth > len(self.drafts):
                self.is_left_out_N[node] = True
                break
            self.masks_NW[node] = rows_IW[depth]
            if not self.masks_NW[node].any():
                return False
            _ban_ends(self.lane, depth, self.masks_NW[node])
            parent, depth = node, depth + 1
        return True

    def leave_out(self, parents: Sequence[int]) -> None:
        """Nothing is filled any more: what could be reached from filled nodes is not."""
        self.has_failed = True
        for node in range(1, len(parents)):
            if not self.masks_NW[node].any() and self._is_open(parents[node], node):
                self.is_left_out_N[node] = True

    def _is_open(self, parent: int, node: int) -> bool:
        """Whether the token may be drawn behind the parent's path, and something be drawn behind it."""
        token_id = self.token_ids[node]
        return bool(self.masks_NW[parent, token_id >> 5] >> (token_id & 31) & 1) and token_id not in self.lane.end_ids


def _fill(matcher: LLMatcher, mask_W: np.ndarray) -> str:
    """Set the mask of the next token. Returns why there is none, "" where there is."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.int32)
    # The tokenizer may know more tokens than the logits have.
    mask_W[:] = bits[: len(mask_W)]
    if matcher.is_error():
        return matcher.get_error()
    return "" if mask_W.any() else "no token can come next"


def _ban_ends(lane: _Lane, depth: int, mask_W: np.ndarray) -> None:
    """Before `min_tokens` only what goes on may be drawn, if there is anything."""
    if len(lane.emitted) + depth < lane.min_tokens:
        banned_W = mask_W.copy().view(np.uint32)
        for token_id in lane.end_ids:
            banned_W[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
        if banned_W.any():
            mask_W[:] = banned_W.view(np.int32)
