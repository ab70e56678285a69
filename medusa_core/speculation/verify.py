"""Exact verification: walk the tree along the tokens the model itself draws.

At each node visited, draw the next token from that node's logits as plain decoding would; descend if a child holds it, else stop.
Every token emitted is the model's own, whatever the tree proposed: the rule is lossless for greedy decoding and for sampling,
and no lossless rule accepts more for a fixed set of children. The noise of a draw depends on its index alone
(sampling/noise.py), so even the sampled tokens do not depend on the tree. Requests may ask for a rule that is not exact
(speculation/typical.py).

A tree may hold the same tokens on more than one path, since prompt lookup and heads do not know of each other. Such nodes are
interchangeable: same tokens, same positions, so the same logits and the same K/V. So what is walked is a set of nodes, all of those
whose path holds the tokens drawn so far, and the first of them stands for all. Who gets the credit is another matter, which changes
statistics alone: a head, if one has offered the token, and the lookup only for what no head has.

Shapes: B lanes · N tree nodes · L levels (max depth + 1) · V vocabulary · W stop ids per lane.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medusa_core.sampling.sampler import SamplingRows, draw
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.typical import force_typical

# finish codes in device tensors
NOT_FINISHED, FINISHED_STOP, FINISHED_LENGTH = 0, 1, 2


@dataclass(slots=True)
class Walk:
    """Level l of a lane: the token drawn at the node that level visited.

    token_ids_BL: int64, -1 beyond the walk's end. node_BL: int64, the node whose logits gave the token, the lowest of those whose
    path holds the tokens drawn before; 0 beyond the end. It need not be a child of the node before.
    credit_BL: int64, the draft node that is credited with the token; -1 for the bonus and beyond the end.
    length_B: int64, tokens drawn, i.e. accepted + 1.
    """

    token_ids_BL: Tensor
    node_BL: Tensor
    credit_BL: Tensor
    length_B: Tensor


def walk_tree(logits_BNV: Tensor, tokens_BN: Tensor, tree: DeviceTree, rows: SamplingRows, index_B: Tensor) -> Walk:
    """Draw along one path per lane.

    Args:
        logits_BNV: float32, the model's logits at each node.
        tokens_BN: token of each node, as drafted.
        rows: sampling parameters, one row per lane; penalties count the tokens drawn.
        index_B: index of the first token drawn (0 = first after the prompt).
    """
    num_lanes = logits_BNV.shape[0]
    device = logits_BNV.device
    # Without noise, per-index bans or penalties a draw does not depend on how the node was reached: one pass over all nodes.
    is_pathless = rows.is_all_greedy and not rows.has_min_tokens and rows.penalties is None
    argmax_BN = logits_BNV.argmax(dim=-1) if is_pathless else None
    token_ids_BL = torch.full((num_lanes, tree.max_depth + 1), -1, dtype=torch.int64, device=device)
    credit_BL = torch.full_like(token_ids_BL, -1)
    node_BL = torch.zeros_like(token_ids_BL)
    node_B = torch.zeros(num_lanes, dtype=torch.int64, device=device)
    is_open_B = torch.ones(num_lanes, dtype=torch.bool, device=device)
    # the nodes whose path holds the tokens drawn so far: at first the root
    is_visited_BN = (tree.parent_N < 0).expand(num_lanes, -1)
    forced_BN = _forced(logits_BNV, tokens_BN, tree, rows, index_B) if rows.has_typical and tree.num_nodes > 1 else None
    for level in range(tree.max_depth + 1):
        open_r = _open_lanes(is_open_B)
        if argmax_BN is not None:
            drawn_r = argmax_BN[open_r, node_B[open_r]]
        else:
            drawn_r = draw(logits_BNV[open_r, node_B[open_r]], rows.take(open_r), index_B[open_r] + level)
        if forced_BN is not None:
            forced_r = forced_BN[open_r, node_B[open_r]]
            drawn_r = torch.where(forced_r < 0, drawn_r, forced_r)
        if rows.penalties is not None:
            rows.penalties.count(open_r, drawn_r)
        drawn_B = torch.full_like(node_B, -1)
        drawn_B[open_r] = drawn_r
        token_ids_BL[:, level] = torch.where(is_open_B, drawn_B, -1)
        node_BL[:, level] = node_B
        is_child_BN = is_visited_BN[:, tree.parent_N.clamp(min=0)] & (tree.parent_N >= 0)
        is_visited_BN = is_child_BN & (tokens_BN == drawn_B.unsqueeze(1))
        is_open_B = is_visited_BN.any(dim=1)
        node_B = _first_node(is_visited_BN)
        credit_BL[:, level] = torch.where(is_open_B, _credited_node(is_visited_BN, node_B, tree), -1)
        if device.type == "cpu" and not bool(is_open_B.any()):
            break
    return Walk(token_ids_BL, node_BL, credit_BL, (token_ids_BL >= 0).sum(dim=1))


def _first_node(is_there_BN: Tensor) -> Tensor:
    return is_there_BN.to(torch.int64).argmax(dim=1)


def _credited_node(is_visited_BN: Tensor, node_B: Tensor, tree: DeviceTree) -> Tensor:
    """The first of the nodes that a head has filled, else the first of all, which is `node_B`."""
    if tree.lookup_depth == 0 or tree.head_depth == 0:
        return node_B
    is_head_BN = is_visited_BN & (tree.rank_N >= 0)
    return torch.where(is_head_BN.any(dim=1), _first_node(is_head_BN), node_B)


def _forced(logits_BNV: Tensor, tokens_BN: Tensor, tree: DeviceTree, rows: SamplingRows, index_B: Tensor) -> Tensor:
    """The tokens of drafts that typical acceptance takes, at their parents; -1 elsewhere. int64 [B, N]."""
    forced_BN = torch.full_like(tokens_BN, -1)
    for lane in (rows.epsilon_R > 0).nonzero().flatten().tolist():
        at_1 = torch.tensor([lane], device=tokens_BN.device)
        forced_BN[lane] = force_typical(logits_BNV[lane], tokens_BN[lane], tree, rows.take(at_1), index_B[at_1])
    return forced_BN


def _open_lanes(is_open_B: Tensor) -> Tensor:
    """Lanes still walking. Off the CPU all lanes are drawn for, since counting the open ones would wait for the device."""
    if is_open_B.device.type == "cpu":
        return is_open_B.nonzero().squeeze(1)
    return torch.arange(is_open_B.shape[0], device=is_open_B.device)


def cut_walk(walk: Walk, stop_ids_BW: Tensor, room_B: Tensor, is_finished_B: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens of each walk to keep, and why the lane ends: (num_kept_B int64, finish_code_B int64).

    Tokens are taken one by one: a stop token ends the lane and is kept, then the length limit applies.

    Args:
        stop_ids_BW: EOS and stop ids, -1 padded.
        room_B: tokens the lane may still emit, at least 1 unless it has finished or wants none.
        is_finished_B: lanes that ended in an earlier step keep nothing.
    """
    num_levels = walk.token_ids_BL.shape[1]
    level_L = torch.arange(num_levels, device=room_B.device)
    is_drawn_BL = level_L < walk.length_B.unsqueeze(1)
    is_stop_BL = (walk.token_ids_BL.unsqueeze(2) == stop_ids_BW.unsqueeze(1)).any(dim=2) & is_drawn_BL
    stop_len_B = torch.where(is_stop_BL, level_L + 1, num_levels + 1).amin(dim=1)
    kept_B = torch.minimum(torch.minimum(walk.length_B, stop_len_B), room_B)
    code_B = torch.where(kept_B >= room_B, FINISHED_LENGTH, NOT_FINISHED)
    code_B = torch.where(stop_len_B <= kept_B, FINISHED_STOP, code_B)
    return torch.where(is_finished_B, 0, kept_B), torch.where(is_finished_B, NOT_FINISHED, code_B)


def credited_nodes(walk: Walk, num_kept_B: Tensor) -> Tensor:
    """The draft nodes that are credited with tokens kept, int64 [B]: bit n for node n, so there must be no more than 64."""
    level_L = torch.arange(walk.credit_BL.shape[1], device=num_kept_B.device)
    is_credited_BL = (level_L < num_kept_B.unsqueeze(1)) & (walk.credit_BL >= 0)
    bit_BL = torch.ones_like(walk.credit_BL) << walk.credit_BL.clamp(min=0)
    return torch.where(is_credited_BL, bit_BL, 0).sum(dim=1)
