"""What a lane's penalties start from, for a new request and for one that goes on after preemption."""

from __future__ import annotations

import numpy as np
import torch

from medusa_core.params import SamplingParams
from medusa_core.plan import LaneJoin
from medusa_core.runtime.penalty_state import PenaltyState
from tests import options

VOCAB_SIZE = 10


def make_state() -> PenaltyState:
    """Full of what an earlier request left."""
    state = PenaltyState(2, VOCAB_SIZE, torch.device(options.device))
    state.count_PV.fill_(7)
    state.is_prompt_PV.fill_(True)
    state.bias_PV.fill_(3.0)
    return state


def upload(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).to(options.device)


def join(token_ids: list[int], num_prompt_tokens: int, **params) -> LaneJoin:
    return LaneJoin(
        lane=1,
        uid=1,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens,
        num_computed_tokens=0,
        max_total_tokens=20,
        noise_key=0,
        params=SamplingParams(**params),
        block_ids=[],
    )


def test_a_new_request_starts_from_nothing_but_its_prompt():
    state = make_state()
    state.join(join([4, 4, 2], 3, frequency_penalty=1.0), upload)
    assert state.count_PV[1].tolist() == [0] * VOCAB_SIZE
    assert state.is_prompt_PV[1].nonzero().flatten().tolist() == [2, 4]
    assert state.bias_PV[1].tolist() == [0.0] * VOCAB_SIZE
    assert state.count_PV[0].tolist() == [7] * VOCAB_SIZE


def test_a_request_that_goes_on_knows_its_output():
    state = make_state()
    state.join(join([4, 4, 2, 5, 6, 5], 3, presence_penalty=1.0, logit_bias=((0, -2.0), (9, 1.5))), upload)
    assert state.count_PV[1].tolist() == [0, 0, 0, 0, 0, 2, 1, 0, 0, 0]
    assert state.is_prompt_PV[1].nonzero().flatten().tolist() == [2, 4]
    assert state.bias_PV[1].tolist() == [-2.0, *[0.0] * 8, 1.5]


def test_kept_tokens_of_a_walk_are_counted():
    state = PenaltyState(2, VOCAB_SIZE, torch.device(options.device))
    lanes = torch.tensor([2, 0], device=options.device)
    walks = torch.tensor([[5, 5, 3], [1, -1, -1]], device=options.device)
    state.count(lanes, walks, torch.tensor([2, 0], device=options.device))
    assert state.count_PV[2].tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 0]
    assert int(state.count_PV.sum()) == 2
