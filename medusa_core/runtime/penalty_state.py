"""What of penalties and biases is a number per token: a row of the vocabulary for every lane.

Shapes: P lanes of the runner, and one more that no request ever has · B lanes of one step · L levels · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from medusa_core.plan import LaneJoin

# int32, bool, float32
_TOKEN_BYTES = 4 + 1 + 4


class PenaltyState:
    """Rows of lanes that ask for no penalties hold anything at all.

    count_PV: how often a token is in the output, int32. is_prompt_PV: whether it is in the prompt, bool. bias_PV: float32.
    """

    def __init__(self, num_lanes: int, vocab_size: int, device: torch.device) -> None:
        shape = (num_lanes + 1, vocab_size)
        self.count_PV = torch.zeros(shape, dtype=torch.int32, device=device)
        self.is_prompt_PV = torch.zeros(shape, dtype=torch.bool, device=device)
        self.bias_PV = torch.zeros(shape, device=device)

    @staticmethod
    def num_bytes(num_lanes: int, vocab_size: int) -> int:
        """Memory of the state."""
        return (num_lanes + 1) * vocab_size * _TOKEN_BYTES

    def join(self, join: LaneJoin, upload: Callable[[np.ndarray], Tensor]) -> None:
        """Set the row of a lane with penalties. Known tokens behind the prompt, of a request that goes on, are output.

        upload: copies to the device, as `LaneState.upload` does.
        """
        count_V, is_prompt_V, bias_V = self.count_PV[join.lane], self.is_prompt_PV[join.lane], self.bias_PV[join.lane]
        known_n = upload(np.array(join.token_ids, dtype=np.int64))
        prompt_n, output_n = known_n[: join.num_prompt_tokens], known_n[join.num_prompt_tokens :]
        is_prompt_V.zero_().index_fill_(0, prompt_n, True)
        count_V.zero_().index_add_(0, output_n, torch.ones_like(output_n, dtype=torch.int32))
        bias_V.zero_()
        if join.params.logit_bias:
            token_ids, values = zip(*join.params.logit_bias, strict=True)
            bias_V.index_copy_(0, upload(np.array(token_ids, dtype=np.int64)), upload(np.array(values, dtype=np.float32)))

    def count(self, index_B: Tensor, token_ids_BL: Tensor, num_kept_B: Tensor) -> None:
        """The first tokens of each lane's walk were kept."""
        level_L = torch.arange(token_ids_BL.shape[1], device=token_ids_BL.device)
        is_kept_BL = level_L < num_kept_B.unsqueeze(1)
        flat_BL = index_B.unsqueeze(1) * self.count_PV.shape[1] + token_ids_BL.clamp(min=0)
        self.count_PV.view(-1).index_add_(0, flat_BL.flatten(), is_kept_BL.flatten().to(torch.int32))
