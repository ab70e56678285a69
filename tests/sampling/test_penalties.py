"""Penalties and biases by their formulas, one row at a time."""

from __future__ import annotations

import pytest
import torch

from medusa_core.sampling.penalties import PenaltyRows, penalize
from tests import options


def rows(count, is_prompt, *, repetition=1.0, frequency=0.0, presence=0.0, bias=None) -> PenaltyRows:
    def tensor(values, dtype=torch.float32):
        return torch.tensor([values], dtype=dtype, device=options.device)

    return PenaltyRows(
        repetition_R=tensor(repetition).view(1),
        frequency_R=tensor(frequency).view(1),
        presence_R=tensor(presence).view(1),
        count_RV=tensor(count, torch.int32),
        is_prompt_RV=tensor(is_prompt, torch.bool),
        bias_RV=tensor(bias or [0.0] * len(count)),
    )


LOGITS = [2.0, -1.0, 3.0, -4.0]
COUNT = [3, 1, 0, 0]
IS_PROMPT = [False, False, True, False]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, LOGITS),
        # over the output alone
        ({"frequency": 0.5}, [0.5, -1.5, 3.0, -4.0]),
        ({"presence": 0.5}, [1.5, -1.5, 3.0, -4.0]),
        ({"frequency": -1.0, "presence": 2.0}, [3.0, -2.0, 3.0, -4.0]),
        # over prompt and output; likelier is divided, less likely multiplied
        ({"repetition": 2.0}, [1.0, -2.0, 1.5, -4.0]),
        ({"repetition": 0.5}, [4.0, -0.5, 6.0, -4.0]),
        ({"bias": [0.0, 5.0, 0.0, -100.0]}, [2.0, 4.0, 3.0, -104.0]),
        # repetition first
        ({"repetition": 2.0, "frequency": 1.0, "bias": [1.0, 0.0, 0.0, 0.0]}, [-1.0, -3.0, 1.5, -4.0]),
    ],
)
def test_formulas(parameters, expected):
    logits = torch.tensor([LOGITS], device=options.device)
    assert penalize(logits, rows(COUNT, IS_PROMPT, **parameters)).tolist() == [expected]
    assert logits.tolist() == [LOGITS]


def test_what_is_drawn_is_counted():
    state = rows([0, 0, 1, 0], IS_PROMPT)
    for token in (2, 2, 0):
        state.count(torch.tensor([0], device=options.device), torch.tensor([token], device=options.device))
    assert state.count_RV.tolist() == [[1, 0, 3, 0]]
