"""Lane state: what the device knows about each running request. Rows of tensors, changed in place by joins and by each step.

Shapes: P lanes of the runner · B lanes of one step · X block-table width · W stop ids · E hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa_core.params import SamplingParams
from medusa_core.plan import BlockAppend, LaneJoin
from medusa_core.sampling.sampler import SamplingRows

_INITIAL_STOP_IDS = 8


@dataclass(slots=True)
class HostLane:
    """What the host keeps of a lane; never a length or a token of the output, which only the device knows in time."""

    uid: int
    params: SamplingParams
    num_blocks: int


class LaneState:
    """All lanes of a runner."""

    def __init__(
        self, num_lanes: int, max_model_len: int, max_blocks: int, hidden_size: int, hidden_dtype: torch.dtype, device: torch.device
    ) -> None:
        def integers(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=device)

        def floats(fill: float) -> Tensor:
            return torch.full((num_lanes,), fill, dtype=torch.float32, device=device)

        self.device = device
        self.max_model_len = max_model_len
        self.host: dict[int, HostLane] = {}
        # one spare column at the end takes writes that must go nowhere
        self.tokens_PL = integers(num_lanes, max_model_len + 1)
        self.num_known_P = integers(num_lanes)
        self.num_prompt_P = integers(num_lanes)
        self.max_total_P = integers(num_lanes)
        self.is_finished_P = torch.zeros(num_lanes, dtype=torch.bool, device=device)
        # post-norm hidden state at the position before the root: what the heads draft from
        self.hidden_PE = torch.zeros(num_lanes, hidden_size, dtype=hidden_dtype, device=device)
        self.block_table_PX = integers(num_lanes, max_blocks, fill=-1)
        self.key_P = integers(num_lanes)
        self.temperature_P = floats(0.0)
        self.top_p_P = floats(1.0)
        self.min_p_P = floats(0.0)
        self.top_k_P = integers(num_lanes)
        self.min_tokens_P = integers(num_lanes)
        self.stop_ids_PW = integers(num_lanes, _INITIAL_STOP_IDS, fill=-1)

    def join(self, join: LaneJoin, eos_token_ids: Sequence[int]) -> None:
        """Fill a lane from scratch."""
        lane, params = join.lane, join.params
        self.host[lane] = HostLane(join.uid, params, 0)
        self.tokens_PL[lane, : len(join.token_ids)] = self._ids(join.token_ids)
        self.num_known_P[lane] = len(join.token_ids)
        self.num_prompt_P[lane] = join.num_prompt_tokens
        self.max_total_P[lane] = join.max_total_tokens
        self.is_finished_P[lane] = False
        self.key_P[lane] = join.noise_key - 2**64 if join.noise_key >= 2**63 else join.noise_key
        self.temperature_P[lane] = params.temperature
        self.top_p_P[lane] = params.top_p
        self.min_p_P[lane] = params.min_p
        self.top_k_P[lane] = params.top_k
        self.min_tokens_P[lane] = params.min_tokens
        stop_ids = [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)]
        self._reserve_stop_ids(len(stop_ids))
        self.stop_ids_PW[lane] = -1
        self.stop_ids_PW[lane, : len(stop_ids)] = self._ids(stop_ids)
        self.block_table_PX[lane] = -1
        self.append_blocks(BlockAppend(lane=lane, block_ids=join.block_ids))

    def append_blocks(self, append: BlockAppend) -> None:
        host = self.host[append.lane]
        end = host.num_blocks + len(append.block_ids)
        self.block_table_PX[append.lane, host.num_blocks : end] = self._ids(append.block_ids)
        host.num_blocks = end

    def leave(self, lane: int) -> None:
        """Free a lane. Its rows keep stale values until the next join, which writes them all."""
        del self.host[lane]

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
            is_all_greedy=all(p.is_greedy for p in params),
            has_top_k=any(p.top_k > 0 for p in params),
            has_top_p=any(p.top_p < 1.0 for p in params),
            has_min_p=any(p.min_p > 0.0 for p in params),
            has_min_tokens=any(p.min_tokens > 0 for p in params),
        )

    def index(self, lanes: Sequence[int]) -> Tensor:
        """int64 [B]."""
        return self._ids(lanes)

    def _ids(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _reserve_stop_ids(self, num_ids: int) -> None:
        width = self.stop_ids_PW.shape[1]
        if num_ids > width:
            self.stop_ids_PW = pad(self.stop_ids_PW, (0, max(num_ids, 2 * width) - width), value=-1)
