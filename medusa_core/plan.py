"""The only contract between policy (what to run) and device (running it).

Plans carry lane *changes*, never a sampled token, so the policy can plan step i+1 before it has seen the result of step i: lengths
and tokens live on the device. All types are msgspec structs and can be serialised.

A device applies a plan in this order: `leaves`, `joins`, `block_appends`, then the rows. Rows are the `chunks` (known tokens whose
KV is missing) and the `decode_groups` (one tree per lane). Slots: the KV of known token i goes to slot i of the lane's block
table; in a decode step of n nodes the root goes to slot `length`, node j to slot `length + j`, and the accepted path is then
moved to the slots behind the root, where `length` is the number of tokens already in the cache (known tokens - 1).
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from medusa_core.outputs import FinishReason, TokenLogprob
from medusa_core.params import SamplingParams


class LaneJoin(msgspec.Struct, frozen=True, kw_only=True):
    """A request takes a free lane.

    token_ids: every known token (prompt, and on resume the output emitted before).
    num_prompt_tokens: how many of them are the prompt; the next token drawn has index len(token_ids) - num_prompt_tokens.
    num_computed_tokens: how many have their KV in `block_ids` already (prefix cache); at most len(token_ids) - 1.
    max_total_tokens: the lane finishes with "length" when it knows this many tokens.
    """

    lane: int
    uid: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    max_total_tokens: int
    noise_key: int
    params: SamplingParams
    block_ids: list[int]


class BlockAppend(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Blocks added at the end of a lane's block table."""

    lane: int
    block_ids: list[int]


class PrefillChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Known tokens [start, start + num_tokens) of a lane are computed. If `is_last`, the chunk ends at the last known token and the
    device draws the next one from its logits."""

    lane: int
    start: int
    num_tokens: int
    is_last: bool


class DecodeGroup(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Lanes that decode one step with the same number of nodes, root included (1 = plain decoding).

    has_grammar: whether all of them have a grammar, or none has. The draws of those that have one depend on what the host makes of
    their latest tokens, so they are planned only when no step that draws for them is in flight.
    """

    lanes: list[int]
    num_nodes: int
    has_grammar: bool = False


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step. `is_empty` plans (nothing to run, no lane changes) are not sent to a runner."""

    step_id: int
    leaves: list[int] = []
    joins: list[LaneJoin] = []
    block_appends: list[BlockAppend] = []
    chunks: list[PrefillChunk] = []
    decode_groups: list[DecodeGroup] = []

    @property
    def has_rows(self) -> bool:
        return bool(self.chunks or self.decode_groups)

    @property
    def is_empty(self) -> bool:
        return not (self.has_rows or self.leaves or self.joins or self.block_appends)


class LaneResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one lane emitted in a step, already cut at EOS, stop ids and length limits.

    token_ids: emitted tokens; empty for a lane that had finished in an earlier step still in flight.
    num_draft_nodes: tree nodes offered, root excluded (0: a plain step, or the first token after a prefill).
    draft_depth: longest path offered, in nodes, root excluded.
    num_accepted: accepted draft tokens among token_ids (so len(token_ids) is num_accepted + 1 unless cut).
    credit: the nodes credited with them, bit n for node n, of which bit 63 is the sign. Where heads and prompt lookup have offered
        the same token, a head is; of several nodes, the first.
    logprobs: of each of token_ids, for a lane that asks for them.
    """

    lane: int
    uid: int
    token_ids: list[int]
    num_draft_nodes: int = 0
    draft_depth: int = 0
    num_accepted: int = 0
    finish_reason: FinishReason | None = None
    credit: int = 0
    logprobs: list[TokenLogprob] = []


class PromptLogprobs(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Of the prompt tokens behind those of one chunk: of tokens start + 1, start + 2, ... of the request."""

    uid: int
    start: int
    logprobs: list[TokenLogprob]


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """Results of one step: one LaneResult per lane that had a last chunk or a place in a decode group, and one PromptLogprobs per
    chunk whose lane asks for them.

    Those of a group with a grammar may come with a later step's result instead: with that of the latest step at the latest.
    """

    step_id: int
    lanes: list[LaneResult]
    prompt_logprobs: list[PromptLogprobs] = []


class PendingStep(Protocol):
    """A launched step. `result` waits for the device and may be called once."""

    def result(self) -> StepResult: ...


class Runner(Protocol):
    """The device side: executes plans in the order they are submitted."""

    def submit(self, plan: StepPlan) -> PendingStep: ...
