"""The matchers of the lanes that have a grammar: what each node of a tree allows, and what was drawn in the end.

A node's mask says which tokens may be drawn there: those the grammar allows behind the path to the node. Drawing from masked logits
is then what it would be without the tree. Nodes that the grammar does not allow need no mask, since nobody draws them.

A mask takes from 10 microseconds to 250 and more, inside a string of limited length. So trees are cut into chains, and llguidance
follows two chains of every lane at once, in threads of its own. Around that there is plain Python on purpose: the thread that
launches steps needs the interpreter too, and every operation of numpy that lets it go has to wait for it again.

Shapes: B lanes of one step · N tree nodes (root included) · K rows of masks · W words of 32 tokens (see TreeMasks).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par, fill_next_token_bitmask_par_with_draft_tokens

from medusa_core.grammar.compiler import GrammarCompiler
from medusa_core.grammar.trees import Chain, TreeMasks, chains_of, num_mask_rows
from medusa_core.outputs import FinishReason
from medusa_core.params import Grammar
from medusa_core.plan import LaneJoin, LaneResult, StepPlan

logger = logging.getLogger(__name__)

# Time for masks below the roots in one step, a few of which other lanes make on a GPU meanwhile. Nodes not reached by then are left
# out of the tree, which costs speed but changes no token.
_DRAFT_BUDGET_S = 0.004
# A first failure may be due to others who have used the same lexer. Whoever fails again decodes without drafts from then on: each
# time costs up to 50 ms.
_MAX_DRAFT_FAILURES = 2
# As with these: a matcher that does not last is not made anew for every token.
_MIN_TOKENS_PER_RENEWAL = 64
# What a node takes at least, and the weight of a new measurement of it.
_SHORTEST_S = 5e-6
_SMOOTHING = 0.05
# Chains that are followed at once: a tree of 8 nodes seldom has more.
_NUM_CHAINS = 2
# More have made no difference to 8 lanes, on 16 cores.
_MAX_THREADS = 8
# First word of a mask that is not there. If there ever is one that begins so, its node is left out.
_NOT_WRITTEN = 0x5A5A5A5A


@dataclass(slots=True)
class _Lane:
    """A request's place in its grammar.

    origin: what was lent, before the first token. matcher: a copy of it behind the tokens that were emitted, which is asked for
    nothing else; drafts are followed by copies of this one. num_draft_failures: how often these could not go on. failure: why the
    lane cannot go on; "" = it can.
    """

    uid: int
    grammar: Grammar
    emitted: list[int]
    min_tokens: int
    end_ids: frozenset[int]
    origin: LLMatcher
    matcher: LLMatcher
    num_draft_failures: int = 0
    num_renewals: int = 0
    failure: str = ""

    @property
    def can_draft(self) -> bool:
        return not self.failure and self.num_draft_failures < _MAX_DRAFT_FAILURES


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
        self._num_tokens = num_tokens
        self.num_words = -(-num_tokens // 32)

    def __contains__(self, lane: int) -> bool:
        return lane in self._lanes

    @property
    def num_mask_words(self) -> int:
        """Words of a mask, at least those of the logits. Known once there is a lane."""
        return -(-self._compiler.num_tokens // 32)

    def apply(self, plan: StepPlan) -> None:
        """Take the plan's leaves and joins. A request that goes on has emitted tokens before."""
        for number in plan.leaves:
            lane = self._lanes.pop(number, None)
            # What has failed may have used up what the lexer may grow to.
            if lane is not None and not lane.failure and lane.num_draft_failures == 0:
                self._compiler.take_back(lane.grammar, lane.origin)
        for join in plan.joins:
            if join.params.grammar is not None:
                self._lanes[join.lane] = self._join(join)

    def fill(
        self,
        lanes: Sequence[int],
        token_BN: np.ndarray,
        parents: Sequence[int],
        budget_s: float = _DRAFT_BUDGET_S,
        *,
        mask_KW: np.ndarray | None = None,
    ) -> TreeMasks:
        """The masks of each lane's tree. A node has none if the grammar does not allow it, if it ends the text, or if time was up.

        Args:
            token_BN: token of each node; the root's does not matter, as it has been emitted.
            parents: of each node, before it in order; the root's is -1.
            budget_s: most time to spend before nodes below the roots are left out.
            mask_KW: where to write masks, else to new memory: `num_mask_rows` for each lane, `num_mask_words` wide.
        """
        deadline_s = time.perf_counter() + budget_s
        parents = tuple(parents)
        num_rows = num_mask_rows(parents)
        if mask_KW is None:
            mask_KW = np.empty((len(lanes) * num_rows, self.num_mask_words), dtype=np.int32)
        mask_KW[: len(lanes) * num_rows, 0] = _NOT_WRITTEN
        trees = [
            _Tree(self._lanes[lane], parents, tokens, mask_KW, number * num_rows, [-1] * len(parents))
            for number, (lane, tokens) in enumerate(zip(lanes, token_BN.tolist(), strict=True))
        ]
        chains = chains_of(parents)
        following = [tree for tree in trees if tree.lane.can_draft]
        for first in range(0, len(chains), _NUM_CHAINS):
            following = self._follow(following, chains[first : first + _NUM_CHAINS], mask_KW, deadline_s)
        for tree in trees:
            if tree.rows[0] < 0:
                self._fill_root(tree.lane, mask_KW[tree.first_row])
                tree.take(0, tree.first_row, depth=0)
        return TreeMasks(mask_KW, np.array([tree.rows for tree in trees]))

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
        return result

    def _join(self, join: LaneJoin) -> _Lane:
        params = join.params
        assert params.grammar is not None
        origin = self._compiler.lend(params.grammar)
        lane = _Lane(
            uid=join.uid,
            grammar=params.grammar,
            emitted=join.token_ids[join.num_prompt_tokens :],
            min_tokens=params.min_tokens,
            end_ids=frozenset((*self._eos_token_ids, *params.stop_token_ids)),
            origin=origin,
            matcher=origin.deep_copy(),
        )
        lane.matcher.consume_tokens(lane.emitted)
        return lane

    def _fill_root(self, lane: _Lane, mask_W: np.ndarray) -> None:
        failure = lane.failure or self._fill(lane, mask_W)
        if failure and not lane.failure and lane.num_renewals <= 1 + len(lane.emitted) // _MIN_TOKENS_PER_RENEWAL:
            # Perhaps tokens long past, or others before or beside this one, have used up what the lexer may grow to.
            lane.num_renewals += 1
            lane.origin = self._compiler.lend(lane.grammar, is_fresh=True)
            lane.matcher = lane.origin.deep_copy()
            lane.matcher.consume_tokens(lane.emitted)
            failure = self._fill(lane, mask_W)
        lane.failure = failure
        if failure:
            # whatever is drawn is not told to anyone
            self._failures[lane.uid] = failure
            mask_W.fill(-1)

    def _fill(self, lane: _Lane, mask_W: np.ndarray) -> str:
        """Set the mask of the next token. Returns why there is none, "" where there is."""
        matcher = lane.matcher.deep_copy()
        # may be a word longer where it fails
        mask_W[:] = np.frombuffer(matcher.compute_bitmask(), dtype=np.int32)[: len(mask_W)]
        self._cut(mask_W[None])
        if matcher.is_error():
            return matcher.get_error()
        return "" if mask_W.any() else "no token can come next"

    def _follow(self, trees: list[_Tree], chains: Sequence[Chain], mask_KW: np.ndarray, deadline_s: float) -> list[_Tree]:
        """Masks of some chains' nodes, the root among them, as far as they can be reached and there is time.

        Returns the trees whose lanes can go on.
        """
        began_s = time.perf_counter()
        most = int(max(deadline_s - began_s, 0.0) / max(self._node_s, _SHORTEST_S))
        # What hangs on another of these chains is followed before it is known whether it can be reached.
        in_chains = {node for chain in chains for node in chain.nodes}
        jobs: list[_Job] = []
        for chain in chains:
            head = chain.nodes[0]
            for tree in trees:
                if tree.parents[head] in in_chains or tree.is_open(head):
                    drafts = tree.drafts(chain.path[:most])
                    if len(drafts) >= chain.first_depth:
                        jobs.append(_Job(tree, chain, tree.lane.matcher.deep_copy(), drafts))
        if not jobs:
            return trees
        self._run(jobs, mask_KW)
        longest = max(len(job.drafts) for job in jobs)
        self._node_s += _SMOOTHING * ((time.perf_counter() - began_s) / (longest + 1) - self._node_s)
        failed = set()
        for job in jobs:
            if job.matcher.is_error() or not job.tree.accept(job.chain, len(job.drafts), is_cut=self._is_wider):
                failed.add(job.tree.lane.uid)
        for tree in trees:
            tree.lane.num_draft_failures += tree.lane.uid in failed
        return [tree for tree in trees if tree.lane.uid not in failed]

    def _run(self, jobs: Sequence[_Job], mask_KW: np.ndarray) -> None:
        self._executor = self._executor or LLExecutor(min(os.cpu_count() or 1, _MAX_THREADS))
        rooted = [(job.matcher, job.row) for job in jobs if not job.drafts]
        drafted = [(job.matcher, job.row, job.drafts) for job in jobs if job.drafts]
        # Neither takes an empty list.
        if rooted:
            fill_next_token_bitmask_par(self._executor, rooted, mask_KW)
        if drafted:
            fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, mask_KW)
        self._cut(mask_KW)

    def _cut(self, mask_KW: np.ndarray) -> None:
        """Forbid tokens that the tokenizer knows and the logits do not have."""
        if self._is_wider:
            mask_KW[:, self.num_words :] = 0
            if num_bits := self._num_tokens % 32:
                mask_KW[:, self.num_words - 1] &= (1 << num_bits) - 1

    @property
    def _is_wider(self) -> bool:
        """Whether a mask has tokens that the logits do not have."""
        return self._compiler.num_tokens > self._num_tokens


@dataclass(slots=True)
class _Tree:
    """One lane's tree while its masks are filled.

    first_row: of the rows for its masks, in mask_KW. rows: of each node that has its mask; -1 for others.
    """

    lane: _Lane
    parents: Sequence[int]
    tokens: list[int]
    mask_KW: np.ndarray
    first_row: int
    rows: list[int]

    def drafts(self, path: Sequence[int]) -> list[int]:
        """Tokens of a path, up to the first that nothing comes behind."""
        drafts = []
        for node in path:
            if self.tokens[node] in self.lane.end_ids:
                break
            drafts.append(self.tokens[node])
        return drafts

    def is_open(self, node: int) -> bool:
        """Whether the token may be drawn behind the parent's path, and something be drawn behind it. The root is."""
        if node == 0:
            return True
        row, token_id = self.rows[self.parents[node]], self.tokens[node]
        return row >= 0 and token_id not in self.lane.end_ids and bool(int(self.mask_KW[row, token_id >> 5]) >> (token_id & 31) & 1)

    def accept(self, chain: Chain, num_drafts: int, *, is_cut: bool) -> bool:
        """Take a chain's masks over. False if one is not there: llguidance may refuse a token that it has allowed.

        is_cut: tokens may have been taken from masks, so that nothing is left.
        """
        for depth, node in enumerate(chain.nodes, start=chain.first_depth):
            if depth > num_drafts or not self.is_open(node):
                break
            row = self.first_row + chain.first_row + depth
            if self.mask_KW[row, 0] == _NOT_WRITTEN or (is_cut and not self.mask_KW[row].any()):
                return False
            self.take(node, row, depth=depth)
        return True

    def take(self, node: int, row: int, *, depth: int) -> None:
        """A node's mask is there. Before `min_tokens` only what goes on may be drawn, if there is anything."""
        self.rows[node] = row
        if len(self.lane.emitted) + depth < self.lane.min_tokens:
            held_W = self.mask_KW[row].copy().view(np.uint32)
            for token_id in self.lane.end_ids:
                held_W[token_id >> 5] &= ~np.uint32(1 << (token_id & 31))
            if held_W.any():
                self.mask_KW[row] = held_W.view(np.int32)


@dataclass(slots=True)
class _Job:
    """Follow a chain with a matcher. drafts: tokens along its path, as far as it is to go.

    matcher: a copy for this alone. llguidance 1.9 knows its last mask by the depth in the grammar and the lexer's state, and does
    not forget it on the way back from a path: it would take it for the mask behind other tokens that are as deep.
    """

    tree: _Tree
    chain: Chain
    matcher: LLMatcher
    drafts: list[int]

    @property
    def row(self) -> int:
        """Of the mask at the root; those behind the drafts follow."""
        return self.tree.first_row + self.chain.first_row
