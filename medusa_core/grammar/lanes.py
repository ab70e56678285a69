"""The matchers of the lanes that have a grammar: what each node of a tree allows, and what was drawn in the end.

A node's mask says which tokens may be drawn there: those the grammar allows behind the path to the node. Drawing from masked logits
is then what it would be without the tree. Nodes that the grammar does not allow need no mask, since nobody draws them.

A mask takes from 10 microseconds to 250 and more, inside a string of limited length, so lanes are done by threads side by side:
llguidance lets go of the interpreter lock meanwhile.

Shapes: B lanes of one step · N tree nodes (root included) · W words of 32 tokens, int32: token t is bit t % 32 of word t // 32.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
from llguidance import LLMatcher

from medusa_core.grammar.compiler import GrammarCompiler
from medusa_core.outputs import FinishReason
from medusa_core.params import Grammar
from medusa_core.plan import LaneJoin, LaneResult, StepPlan

logger = logging.getLogger(__name__)

_MAX_THREADS = 16
# Time for masks below the roots in one step, about that of a step on a GPU. Nodes not reached by then are left out of the tree,
# which costs speed but changes no token.
_DRAFT_BUDGET_S = 0.002
# A first failure may be due to others who have used the same lexer. Whoever fails again decodes without drafts from then on: each
# time costs up to 50 ms.
_MAX_PROBE_FAILURES = 2
# As with these: a matcher that does not last is not made anew for every token.
_MIN_TOKENS_PER_RENEWAL = 64


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


class GrammarLanes:
    """Follows the plans of one runner. Not thread-safe.

    num_tokens: width of the logits. eos_token_ids: the model's.
    """

    def __init__(self, compiler: GrammarCompiler, *, num_tokens: int, eos_token_ids: Sequence[int]) -> None:
        self._compiler = compiler
        self._eos_token_ids = tuple(eos_token_ids)
        self._compiling = Lock()
        self._lanes: dict[int, _Lane] = {}
        # it starts threads when there is something for them
        self._threads = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), thread_name_prefix="masks")
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
        children = _children(parents)
        deadline_s = time.perf_counter() + budget_s

        def fill_lane(number: int) -> None:
            lane = self._lanes[lanes[number]]
            self._fill_root(lane, masks_BNW[number, 0])
            if len(parents) > 1:
                tree = _TreeMasks(tokens_BN[number].tolist(), children, masks_BNW[number], is_left_out_BN[number], deadline_s)
                self._fill_tree(lane, tree)

        if len(lanes) == 1:
            fill_lane(0)
        else:
            # a list, so that what a thread raises is raised here
            list(self._threads.map(fill_lane, range(len(lanes))))
        return masks_BNW, is_left_out_BN

    def take(self, result: LaneResult) -> LaneResult:
        """Advance by what a step emitted. Returns the result, or instead of it the lane's end where its matcher has failed."""
        lane = self._lanes.get(result.lane)
        if lane is None or lane.uid != result.uid:
            # no grammar, or the lane was given away meanwhile: a request that comes back brings its tokens along
            return result
        if lane.failure:
            logger.warning("the output of lane %d is given up: its grammar cannot be followed (%s)", result.lane, lane.failure)
            return LaneResult(lane=result.lane, uid=result.uid, token_ids=[], finish_reason=FinishReason.GRAMMAR)
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
            with self._compiling:
                lane.matcher = self._compiler.lend(lane.grammar, is_fresh=True)
            lane.probe = None
            lane.matcher.consume_tokens(lane.emitted)
            failure = _fill(lane.matcher, mask_W)
        lane.failure = failure
        if failure:
            # whatever is drawn is not told to anyone
            mask_W.fill(-1)
        else:
            _ban_ends(lane, 0, mask_W)

    def _fill_tree(self, lane: _Lane, tree: _TreeMasks) -> None:
        if lane.failure:
            return
        if lane.probe is None:
            lane.probe = lane.matcher.deep_copy()
        tree.has_failed = lane.num_probe_failures >= _MAX_PROBE_FAILURES
        self._fill_below(lane, lane.probe, tree, node=0, depth=0)
        if tree.has_failed:
            lane.num_probe_failures += 1
            lane.probe = None

    def _fill_below(self, lane: _Lane, probe: LLMatcher, tree: _TreeMasks, *, node: int, depth: int) -> None:
        """Masks of what is below a node, whose path the probe has followed. The probe comes back to it, unless it fails."""
        for child in tree.children[node]:
            token_id = tree.token_ids[child]
            if not tree.allows(node, token_id) or token_id in lane.end_ids:
                # nobody draws it, or nothing is drawn behind it
                continue
            if tree.has_failed or time.perf_counter() > tree.deadline_s:
                tree.is_left_out_N[child] = True
                continue
            mask_W = tree.masks_NW[child]
            if not probe.consume_token(token_id) or _fill(probe, mask_W):
                tree.has_failed = tree.is_left_out_N[child] = True
                continue
            _ban_ends(lane, depth + 1, mask_W)
            self._fill_below(lane, probe, tree, node=child, depth=depth + 1)
            tree.has_failed = tree.has_failed or not probe.rollback(1)


@dataclass(slots=True)
class _TreeMasks:
    """One lane's tree while its masks are filled. has_failed: the probe cannot be used again."""

    token_ids: list[int]
    children: list[list[int]]
    masks_NW: np.ndarray
    is_left_out_N: np.ndarray
    deadline_s: float
    has_failed: bool = False

    def allows(self, node: int, token_id: int) -> bool:
        return bool(self.masks_NW[node, token_id >> 5] >> (token_id & 31) & 1)


def _children(parents: Sequence[int]) -> list[list[int]]:
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    return children


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
