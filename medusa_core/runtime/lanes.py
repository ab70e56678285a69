"""Lane state: what the device knows about each running request. Rows of tensors, changed in place by joins and by each step.

All changes of a plan go to the device together, in a few copies that wait for nothing: the host builds the next step while the
device runs this one.

Shapes: P lanes of the runner, and one more that no request ever has · B lanes of one step · J joins of one plan · X block-table
width · W stop ids · E hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medusa_core.params import SamplingParams
from medusa_core.plan import BlockAppend, LaneJoin, PrefillChunk, StepPlan
from medusa_core.runtime.penalty_state import PenaltyState
from medusa_core.sampling.penalties import PenaltyRows
from medusa_core.sampling.sampler import SamplingRows
from medusa_core.speculation.lookup import PredictionRows
from medusa_core.tree.merge import MAX_LOOKUP_DEPTH

# Rows of the two matrices that hold every number of a lane: one copy fills a joining lane.
_INTEGERS = (
    "num_known",
    "num_prompt",
    "max_total",
    "key",
    "top_k",
    "min_tokens",
    "is_finished",
    "has_penalties",
    "has_logprobs",
    "num_predicted",
)
_FLOATS = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence", "epsilon", "delta")
_ENDLESS = 2**31
# Of float32, and a little more.
_SMALLEST = 1e-37


@dataclass(slots=True)
class HostLane:
    """What the host keeps of a lane; never a length or a token of the output, which only the device knows in time."""

    uid: int
    params: SamplingParams
    num_prompt_tokens: int
    num_blocks: int


class LaneState:
    """All lanes of a runner.

    vocab_size: width of the logits. penalties: what changes them, lane by lane.
    null_lane: a lane that is finished, knows one token and owns no block: it fills steps up to a captured size.
    max_stop_ids: most EOS and stop ids a request may bring.
    """

    def __init__(
        self,
        num_lanes: int,
        max_model_len: int,
        max_blocks: int,
        hidden_size: int,
        hidden_dtype: torch.dtype,
        device: torch.device,
        *,
        vocab_size: int,
        max_stop_ids: int,
    ) -> None:
        num_rows = num_lanes + 1

        def integers(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        self.device = device
        self.num_lanes = self.null_lane = num_lanes
        self.max_model_len = max_model_len
        self.host: dict[int, HostLane] = {}
        # A spare column behind the known tokens takes writes that must go nowhere; then come predicted tokens, with the last one
        # repeated for a chain of drafts that reaches beyond it.
        self.first_prediction = max_model_len + 1
        self.tokens_PL = integers(num_rows, self.first_prediction + max_model_len + MAX_LOOKUP_DEPTH)
        # post-norm hidden state at the position before the root: what the heads draft from
        self.hidden_PE = torch.zeros(num_rows, hidden_size, dtype=hidden_dtype, device=device)
        self.block_table_PX = integers(num_rows, max_blocks, fill=-1)
        self.stop_ids_PW = integers(num_rows, max(max_stop_ids, 1), fill=-1)
        self._integers = integers(len(_INTEGERS), num_rows)
        self._floats = torch.zeros(len(_FLOATS), num_rows, dtype=torch.float32, device=device)
        (
            self.num_known_P,
            self.num_prompt_P,
            self.max_total_P,
            self.key_P,
            self.top_k_P,
            self.min_tokens_P,
            self.is_finished_P,
            self.has_penalties_P,
            self.has_logprobs_P,
            self.num_predicted_P,
        ) = self._integers
        (
            self.temperature_P,
            self.top_p_P,
            self.min_p_P,
            self.repetition_P,
            self.frequency_P,
            self.presence_P,
            self.epsilon_P,
            self.delta_P,
        ) = self._floats
        self.penalties = PenaltyState(num_lanes, vocab_size, device)
        self.num_known_P[self.null_lane] = 1
        self.num_prompt_P[self.null_lane] = 1
        self.is_finished_P[self.null_lane] = 1

    def apply(self, plan: StepPlan, eos_token_ids: Sequence[int]) -> None:
        """Make the lane changes of a plan, in its order: leaves, joins, appended blocks. Rows of lanes left keep stale values until
        the next join, which writes them all."""
        for lane in plan.leaves:
            del self.host[lane]
        if plan.joins:
            self._join(plan.joins, eos_token_ids)
        # (lane, column, block) of each new block
        blocks: list[tuple[int, int, int]] = []
        changes: list[LaneJoin | BlockAppend] = [*plan.joins, *plan.block_appends]
        for change in changes:
            host = self.host[change.lane]
            blocks += [(change.lane, host.num_blocks + column, block_id) for column, block_id in enumerate(change.block_ids)]
            host.num_blocks += len(change.block_ids)
        if blocks:
            lane_n, column_n, block_n = self.upload(np.array(blocks, dtype=np.int64).T)
            self.block_table_PX[lane_n, column_n] = block_n

    def is_all_greedy(self, lanes: Sequence[int]) -> bool:
        """True if no lane draws with noise, must hold back a stop id, or changes logits: then their arg max is the token."""
        return all(
            params.is_greedy and params.min_tokens == 0 and not params.has_penalties and params.grammar is None
            for params in (self.host[lane].params for lane in lanes)
        )

    def with_logprobs(self, lanes: Sequence[int]) -> tuple[list[int], int]:
        """Which of the lanes ask for log-probabilities of their output, by position, and for how many alternatives at most."""
        counts = {at: count for at, lane in enumerate(lanes) if (count := self.host[lane].params.num_logprobs) is not None}
        return list(counts), max(counts.values(), default=0)

    def prompt_targets(self, chunk: PrefillChunk) -> tuple[Tensor, int] | None:
        """The prompt tokens behind those of the chunk, int64, and for how many alternatives of each its lane asks.

        None where it asks for none of the prompt's log-probabilities, or no prompt token follows.
        """
        host = self.host[chunk.lane]
        end = min(chunk.start + chunk.num_tokens + 1, host.num_prompt_tokens)
        if host.params.num_prompt_logprobs is None or chunk.start + 1 >= end:
            return None
        return self.tokens_PL[chunk.lane, chunk.start + 1 : end], host.params.num_prompt_logprobs

    def block_table(self, lanes: Sequence[int], index_B: Tensor) -> Tensor:
        """int64 [B, X], as narrow as the lanes allow. `index_B` is `index(lanes)`, made once per step."""
        width = max(self.host[lane].num_blocks for lane in lanes)
        return self.block_table_PX[index_B, :width]

    def sampling_rows(self, lanes: Sequence[int], index_B: Tensor) -> SamplingRows:
        params = [self.host[lane].params for lane in lanes]
        return SamplingRows(
            temperature_R=self.temperature_P[index_B],
            top_k_R=self.top_k_P[index_B],
            top_p_R=self.top_p_P[index_B],
            min_p_R=self.min_p_P[index_B],
            min_tokens_R=self.min_tokens_P[index_B],
            stop_ids_RW=self.stop_ids_PW[index_B],
            key_R=self.key_P[index_B],
            epsilon_R=self.epsilon_P[index_B],
            delta_R=self.delta_P[index_B],
            is_all_greedy=all(p.is_greedy for p in params),
            has_top_k=any(p.top_k > 0 for p in params),
            has_top_p=any(p.top_p < 1.0 for p in params),
            has_min_p=any(p.min_p > 0.0 for p in params),
            has_min_tokens=any(p.min_tokens > 0 for p in params),
            has_typical=any(p.is_typical for p in params),
            penalties=self._penalty_rows(index_B) if any(p.has_penalties for p in params) else None,
        )

    def _penalty_rows(self, index_B: Tensor) -> PenaltyRows:
        """Counts as a copy that can be counted on. Lanes without penalties have neutral parameters, but any bias."""
        is_on_B1 = self.has_penalties_P[index_B].unsqueeze(1) > 0
        return PenaltyRows(
            repetition_R=self.repetition_P[index_B],
            frequency_R=self.frequency_P[index_B],
            presence_R=self.presence_P[index_B],
            count_RV=self.penalties.count_PV[index_B],
            is_prompt_RV=self.penalties.is_prompt_PV[index_B],
            bias_RV=torch.where(is_on_B1, self.penalties.bias_PV[index_B], 0.0),
        )

    def prediction_rows(self, lanes: Sequence[int], index_B: Tensor) -> PredictionRows | None:
        """None where no lane has a prediction."""
        longest = max(len(self.host[lane].params.prediction) for lane in lanes)
        if longest == 0:
            return None
        tokens_BK = self.tokens_PL[index_B, self.first_prediction : self.first_prediction + longest]
        return PredictionRows(tokens_BK, self.num_predicted_P[index_B], self.num_prompt_P[index_B])

    def index(self, lanes: Sequence[int]) -> Tensor:
        """int64 [B]."""
        return self.upload(np.array(lanes, dtype=np.int64))

    def upload(self, values: np.ndarray) -> Tensor:
        """A copy on the device. From page-locked memory, so that the copy waits for its turn on the device instead of the host."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _join(self, joins: Sequence[LaneJoin], eos_token_ids: Sequence[int]) -> None:
        integers = np.zeros((len(_INTEGERS), len(joins)), dtype=np.int64)
        floats = np.zeros((len(_FLOATS), len(joins)), dtype=np.float32)
        stop_ids_JW = np.full((len(joins), self.stop_ids_PW.shape[1]), -1, dtype=np.int64)
        for number, join in enumerate(joins):
            params = join.params
            self.host[join.lane] = HostLane(join.uid, params, join.num_prompt_tokens, 0)
            # 64 random bits as a signed number
            key = join.noise_key - 2**64 if join.noise_key >= 2**63 else join.noise_key
            # Larger than any vocabulary or context is as good as endless, and fits the tensor.
            top_k, min_tokens = min(params.top_k, _ENDLESS), min(params.min_tokens, _ENDLESS)
            if params.grammar is not None:
                # Its masks hold the end back, which they must not where there is no other way to go on.
                min_tokens = 0
            known = (len(join.token_ids), join.num_prompt_tokens, join.max_total_tokens)
            asks_for = (int(params.has_penalties), int(params.num_logprobs is not None), len(params.prediction))
            integers[:, number] = (*known, key, top_k, min_tokens, 0, *asks_for)
            # off for greedy lanes: there what the model says is one token
            typical = (0.0, 0.0)
            if params.typical_acceptance is not None and params.is_typical:
                epsilon, delta = params.typical_acceptance
                # not 0 by rounding
                typical = max(epsilon, _SMALLEST), max(delta, _SMALLEST)
            penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            floats[:, number] = (params.temperature, params.top_p, params.min_p, *penalties, *typical)
            stop_ids = [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)]
            stop_ids_JW[number, : len(stop_ids)] = stop_ids
        lane_J = self.index([join.lane for join in joins])
        self._integers[:, lane_J] = self.upload(integers)
        self._floats[:, lane_J] = self.upload(floats)
        self.stop_ids_PW[lane_J] = self.upload(stop_ids_JW)
        self.block_table_PX.index_fill_(0, lane_J, -1)
        lane_n = np.repeat([join.lane for join in joins], [len(join.token_ids) for join in joins])
        column_n = np.concatenate([np.arange(len(join.token_ids)) for join in joins])
        token_n = np.concatenate([np.array(join.token_ids, dtype=np.int64) for join in joins])
        lane_n, column_n, token_n = self.upload(np.stack([lane_n, column_n, token_n]))
        self.tokens_PL[lane_n, column_n] = token_n
        for join in joins:
            if join.params.has_penalties:
                self.penalties.join(join, self.upload)
            if prediction := join.params.prediction:
                padded = np.array([*prediction, *prediction[-1:] * MAX_LOOKUP_DEPTH], dtype=np.int64)
                self.tokens_PL[join.lane, self.first_prediction : self.first_prediction + len(padded)] = self.upload(padded)
