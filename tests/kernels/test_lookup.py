"""The kernel finds the places that the reference finds."""

from __future__ import annotations

import pytest
import torch

from medusa_core.kernels import lookup
from medusa_core.kernels.lookup import match_suffixes
from medusa_core.kernels.tree_step import pack_trees
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.lookup import MAX_MATCH_LEN, lookup_tokens
from medusa_core.tree.topology import TreeTopology, lookup_chain
from tests import options

DEPTH = 5


def check(tokens_PL: torch.Tensor, num_known_P: torch.Tensor, lane_B: torch.Tensor) -> torch.Tensor:
    """Keys of the matches, whose tokens are those of the reference."""
    tokens_PL, num_known_P, lane_B = (tensor.to(options.device) for tensor in (tokens_PL, num_known_P, lane_B))
    match_BJ = match_suffixes(lane_B, num_known_P=num_known_P, tokens_PL=tokens_PL, max_match_len=MAX_MATCH_LEN)
    tree = DeviceTree.create(TreeTopology(lookup_chain(DEPTH)), torch.device(options.device))
    token_T, *_ = pack_trees(
        lane_B,
        None,
        match_BJ,
        list_N=tree.parent_N,
        depth_N=tree.depth_N,
        rank_N=tree.rank_N,
        num_known_P=num_known_P,
        num_prompt_P=torch.ones_like(num_known_P),
        tokens_PL=tokens_PL,
        block_table_PX=torch.zeros(len(num_known_P), 1, dtype=torch.int64, device=options.device),
        block_size=4,
        spare_slot=4,
        max_position=10_000,
    )
    known_B = num_known_P[lane_B]
    tokens_BN = token_T.view(len(lane_B), -1)
    assert torch.equal(tokens_BN[:, 0], tokens_PL[lane_B, known_B - 1])
    assert torch.equal(tokens_BN[:, 1:], lookup_tokens(tokens_PL, lane_B, known_B, DEPTH))
    return match_BJ


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
