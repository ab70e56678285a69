"""The kernel finds the places that the reference finds."""

from __future__ import annotations

import pytest
import torch

from medusa_core.kernels import lookup
from medusa_core.kernels.lookup import match_suffixes
from medusa_core.kernels.tree_step import pack_trees
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.lookup import MAX_MATCH_LEN, PredictionRows, lookup_tokens
from medusa_core.tree.topology import TreeTopology, lookup_chain
from tests import options

DEPTH = 5


def check(tokens_PL: torch.Tensor, num_known_P: torch.Tensor, lane_B: torch.Tensor) -> torch.Tensor:
    """Keys of the matches, whose tokens are those of the reference."""
    no_prediction_P = torch.zeros_like(num_known_P)
    return check_predicted(tokens_PL, num_known_P, lane_B, no_prediction_P, torch.ones_like(num_known_P), tokens_PL.shape[1])


def check_predicted(
    tokens_PL: torch.Tensor,
    num_known_P: torch.Tensor,
    lane_B: torch.Tensor,
    num_predicted_P: torch.Tensor,
    num_prompt_P: torch.Tensor,
    first_prediction: int,
) -> torch.Tensor:
    """The same for lanes whose predicted tokens stand behind the others, with room for a chain of the last one behind them."""
    tokens_PL, num_known_P, lane_B, num_predicted_P, num_prompt_P = (
        tensor.to(options.device) for tensor in (tokens_PL, num_known_P, lane_B, num_predicted_P, num_prompt_P)
    )
    match_BJ = match_suffixes(
        lane_B,
        num_known_P=num_known_P,
        num_prompt_P=num_prompt_P,
        num_predicted_P=num_predicted_P,
        tokens_PL=tokens_PL,
        first_prediction=first_prediction,
        max_match_len=MAX_MATCH_LEN,
    )
    tree = DeviceTree.create(TreeTopology(lookup_chain(DEPTH)), torch.device(options.device))
    token_T, *_ = pack_trees(
        lane_B,
        None,
        match_BJ,
        list_N=tree.parent_N,
        depth_N=tree.depth_N,
        rank_N=tree.rank_N,
        num_known_P=num_known_P,
        num_prompt_P=num_prompt_P,
        tokens_PL=tokens_PL,
        block_table_PX=torch.zeros(len(num_known_P), 1, dtype=torch.int64, device=options.device),
        block_size=4,
        spare_slot=4,
        max_position=10_000,
        first_prediction=first_prediction,
    )
    known_B = num_known_P[lane_B]
    tokens_BN = token_T.view(len(lane_B), -1)
    assert torch.equal(tokens_BN[:, 0], tokens_PL[lane_B, known_B - 1])
    predicted = PredictionRows(tokens_PL[lane_B, first_prediction:], num_predicted_P[lane_B], num_prompt_P[lane_B])
    is_any = bool(num_predicted_P.any())
    text_PL = tokens_PL[:, :first_prediction]
    assert torch.equal(tokens_BN[:, 1:], lookup_tokens(text_PL, lane_B, known_B, DEPTH, predicted if is_any else None))
    return match_BJ


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_tokens", [2, 3, 30])
def test_predictions_are_looked_in_too(seed, num_tokens):
    """Lanes without one among them, outputs that have just begun, and places of equal length in both texts."""
    generator = torch.Generator().manual_seed(seed)
    first_prediction, max_predicted = 61, 40
    tokens_PL = torch.randint(num_tokens, (6, first_prediction + max_predicted + DEPTH), generator=generator)
    num_predicted_P = torch.tensor([0, 1, 2, 40, 17, 9])
    for lane, count in enumerate(num_predicted_P.tolist()):
        if count:
            tokens_PL[lane, first_prediction + count : first_prediction + count + DEPTH] = tokens_PL[
                lane, first_prediction + count - 1
            ]
    num_known_P = torch.tensor([20, 2, 31, 20, 60, 41])
    num_prompt_P = torch.tensor([19, 1, 30, 19, 3, 40])
    check_predicted(tokens_PL, num_known_P, torch.tensor([5, 0, 4, 1, 2, 3]), num_predicted_P, num_prompt_P, first_prediction)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_tokens", [2, 3, 30])
def test_random_texts(seed, num_tokens):
    """Of few tokens, so that long matches, equal ones and none at all occur; what lies behind the known tokens matches too."""
    generator = torch.Generator().manual_seed(seed)
    tokens_PL = torch.randint(num_tokens, (6, 61), generator=generator)
    num_known_P = torch.tensor([1, 2, 3, 20, 60, 41])
    check(tokens_PL, num_known_P, torch.tensor([5, 0, 4, 1, 2, 3]))


def test_a_long_text_is_shared_by_programs(monkeypatch):
    """Of several blocks each."""
    monkeypatch.setattr(lookup, "_BLOCK_LEN", 16)
    monkeypatch.setattr(lookup, "_MAX_PARTS", 3)
    generator = torch.Generator().manual_seed(0)
    tokens_PL = torch.randint(4, (3, 161), generator=generator)
    for num_known in (1, 15, 16, 17, 48, 97, 160):
        match_BJ = check(tokens_PL, torch.tensor([num_known, 33, 100]), torch.tensor([0, 2]))
        assert match_BJ.shape == (2, 3)


def test_keys_tell_length_and_place():
    tokens_PL = torch.tensor([[7, 8, 9, 1, 8, 9, 2, 7, 8, 9, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]])
    match_BJ = check(tokens_PL, torch.tensor([10, 10]), torch.tensor([0, 1]))
    assert match_BJ.tolist() == [[(3 << 32) + 2], [0]]
