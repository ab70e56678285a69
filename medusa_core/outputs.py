"""What callers of an engine see: deltas of tokens, static facts about the engine, and a snapshot of its counters."""

from __future__ import annotations

import enum

import msgspec

# Upper ends of the buckets that EngineStats counts steps in, in seconds; a step on a GPU takes less than a millisecond.
STEP_LATENCY_BOUNDS_S = (
    *(0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5),
)


class FinishReason(enum.Enum):
    """Why a choice ended: a stop token or EOS, a length limit, the caller's abort, or a grammar that takes too much to follow."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    GRAMMAR = "grammar"


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probability of a token, natural logarithm, and the most likely tokens in its place, best first."""

    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


# On the wire as an array and unknown to the garbage collector: there is one per lane and step.
class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """Tokens one choice emitted in one step.

    num_draft_nodes, draft_depth, num_accepted: as in plan.LaneResult; all 0 for a step without a draft.
    is_first: holds the choice's first token, which belongs to no decode step.
    num_cached_tokens, queue_s: set with the first delta; prompt tokens found in the prefix cache, seconds waited for a lane.
    logprobs: of each token, where the request asks for them. prompt_logprobs: with the first delta, of each prompt token but the
        first, where it asks for those.
    """

    request_id: str
    choice_idx: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    num_draft_nodes: int = 0
    draft_depth: int = 0
    num_accepted: int = 0
    is_first: bool = False
    num_cached_tokens: int = 0
    queue_s: float = 0.0
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts fixed when an engine has loaded.

    tokenizer_path: folder that holds the tokenizer and chat template, for the caller's side.
    model_name: the model's own name (hub id or folder name).
    max_depth: longest path of the tree (0 where nothing drafts). tree_size: the configured size or "auto". tree_sizes: those that a
        step may have, 1 (plain) included. head_ranks: (head, rank) of every node that heads fill, each pair once; heads count from
        1, ranks from 0.
    """

    model_name: str
    tokenizer_path: str
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    num_heads: int = 0
    max_depth: int = 0
    tree: str = "none"
    tree_size: str = "1"
    tree_sizes: tuple[int, ...] = (1,)
    head_ranks: tuple[tuple[int, int], ...] = ()


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """A snapshot, sent with every step's tokens. Gauges describe now; what ends in `_total` only grows while the process lives.

    tree_size: nodes per lane in the latest decode step (1 = plain).
    step_seconds_total: of all steps, each from its launch, or from the result before it where that was later, to its own result.
    num_starts: how often the engine's process has been started, this time included.
    num_steps_by_latency_total: by STEP_LATENCY_BOUNDS_S, and those beyond.
    num_steps_by_size_total: steps with decode rows by nodes of the largest tree in them, as EngineInfo.tree_sizes.
    num_head_hits_total: accepted draft tokens by who offered them, as EngineInfo.head_ranks; num_lookup_hits_total: those that no
        head did, but prompt lookup. Before trimming at stop strings.
    decode_cost_seconds_total, draft_cost_seconds_total, plain_cost_seconds_total: what the decode steps took by costs measured at
        start, what of that was drafting, and what the same tokens would have taken without drafts; 0 where nothing was measured.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks: int = 0
    tree_size: int = 1
    num_steps_total: int = 0
    num_preemptions_total: int = 0
    num_prefix_query_tokens_total: int = 0
    num_prefix_hit_tokens_total: int = 0
    step_seconds_total: float = 0.0
    num_starts: int = 1
    num_steps_by_latency_total: tuple[int, ...] = ()
    num_steps_by_size_total: tuple[int, ...] = ()
    num_head_hits_total: tuple[int, ...] = ()
    num_lookup_hits_total: int = 0
    decode_cost_seconds_total: float = 0.0
    draft_cost_seconds_total: float = 0.0
    plain_cost_seconds_total: float = 0.0

    @property
    def kv_cache_usage(self) -> float:
        """Share of blocks held by live requests, 0..1."""
        return self.num_blocks_used / self.num_blocks if self.num_blocks else 0.0
