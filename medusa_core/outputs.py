"""What callers of an engine see: deltas of tokens, static facts about the engine, and a snapshot of its counters."""

from __future__ import annotations

import enum

import msgspec


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
        step may have, 1 (plain) included.
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


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """A snapshot. Gauges describe now; `num_*_total` only grow while the process lives.

    tree_size: nodes per lane in the latest decode step (1 = plain).
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

    @property
    def kv_cache_usage(self) -> float:
        """Share of blocks held by live requests, 0..1."""
        return self.num_blocks_used / self.num_blocks if self.num_blocks else 0.0
