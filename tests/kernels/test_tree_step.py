"""Packing and walking trees in kernels: the same rows, paths, cuts and lane state as the torch step."""

from __future__ import annotations

import pytest
import torch

from medusa_core.kernels.lookup import match_suffixes
from medusa_core.kernels.roots import gather_roots
from medusa_core.kernels.tree_step import NUM_RESULT_COLUMNS, pack_trees, walk_trees
from medusa_core.runtime.penalty_state import PenaltyState
from medusa_core.sampling.sampler import SamplingRows
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.drafter import draft_tree
from medusa_core.speculation.lookup import MAX_MATCH_LEN, lookup_tokens
from medusa_core.speculation.verify import credited_nodes, cut_walk, walk_tree
from medusa_core.tree.presets import load_tree
from medusa_core.tree.topology import TreeTopology, lookup_chain
from tests import options

NUM_LANES, MAX_LEN, BLOCK_SIZE, NUM_BLOCKS, HIDDEN, VOCAB = 5, 40, 4, 30, 6, 7
SPARE = NUM_BLOCKS * BLOCK_SIZE
TREES = {
    "root": TreeTopology(()),
    "chain": TreeTopology.from_choices([(0,), (0, 0), (0, 0, 0)]),
    "bushy": TreeTopology.from_choices([(0,), (1,), (2,), (0, 0), (1, 0), (0, 1), (1, 0, 0), (1, 0, 1)]),
    "preset": load_tree("mc_sim_7b_63"),
    "lookup": TreeTopology(lookup_chain(4)),
    "heads and lookup": TreeTopology.from_choices([(0,), (-1,), (-1, -1), (1,), (0, 0), (0, 1), (-1, -1, -1), (0, 0, 0), (1, 0)]),
    "all of 64 nodes": TreeTopology(
        (*load_tree("mc_sim_7b_63").choices[:40], *lookup_chain(15), *((0, 0, 0, n) for n in range(1, 9)))
    ),
}


class Lanes:
    """Random lane state. Lane 3 has finished."""

    def __init__(self, seed: int, topology: TreeTopology) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        device = options.device
        self.tree = DeviceTree.create(topology, torch.device(device))
        self.known = self.ints(3, 20, NUM_LANES)
        self.prompt = torch.minimum(self.ints(1, 10, NUM_LANES), self.known)
        self.max_total = self.known + self.ints(1, 8, NUM_LANES)
        self.finished = torch.tensor([0, 0, 0, 1, 0], device=device)
        self.tokens = self.ints(0, VOCAB, NUM_LANES, MAX_LEN + 1)
        table = torch.randperm(NUM_BLOCKS, generator=self.generator)[: NUM_LANES * 6].view(NUM_LANES, 6)
        table[:, 5] = -1
        self.table = table.to(device)
        self.stop_ids = self.ints(-1, VOCAB, NUM_LANES, 3)
        self.hidden = torch.randn(NUM_LANES, HIDDEN, generator=self.generator).to(device)

    def ints(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(options.device)

    def slots(self, lane_B: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        block_idx = (position // BLOCK_SIZE).clamp(max=5)
        block = self.table[lane_B.unsqueeze(1), block_idx]
        is_there = (block >= 0) & (position // BLOCK_SIZE < 6)
        return torch.where(is_there, block * BLOCK_SIZE + position % BLOCK_SIZE, SPARE)


class FixedLists:
    """A drafter with nothing to compute."""

    def __init__(self, lists_BRC: torch.Tensor, list_N: torch.Tensor) -> None:
        self._lists_BRC, self._list_N = lists_BRC, list_N

    def lists_of(self, tree: DeviceTree) -> torch.Tensor:
        return self._list_N

    def __call__(self, hidden_BE: torch.Tensor, root_B: torch.Tensor, tree: DeviceTree) -> torch.Tensor:
        return self._lists_BRC


def run_walk(state, lane_B, drawn_BN, token_BN, hidden_TE, result_BR, count_PV=None, has_logprobs=None, path_hidden=None):
    """By default nobody looks at counts or at hidden states along the path."""
    if count_PV is None:
        count_PV = torch.zeros(NUM_LANES, VOCAB, dtype=torch.int32, device=options.device)
    if has_logprobs is None:
        has_logprobs = torch.zeros(NUM_LANES, dtype=torch.int64, device=options.device)
        path_hidden = torch.zeros(NUM_LANES, 1, HIDDEN, device=options.device)
    return walk_trees(
        lane_B,
        drawn_BN.flatten(),
        token_BN.flatten(),
        hidden_TE,
        parent_N=state.tree.parent_N,
        rank_N=state.tree.rank_N,
        num_levels=state.tree.max_depth + 1,
        num_known_P=state.known,
        max_total_P=state.max_total,
        is_finished_P=state.finished,
        stop_ids_PW=state.stop_ids,
        tokens_PL=state.tokens,
        hidden_PE=state.hidden,
        has_logprobs_P=has_logprobs,
        path_hidden_PLE=path_hidden,
        count_PV=count_PV,
        block_table_PX=state.table,
        block_size=BLOCK_SIZE,
        spare_slot=SPARE,
        result_BR=result_BR,
    )


def test_roots_of_lanes():
    state = Lanes(0, TREES["root"])
    lane_B = torch.tensor([4, 1, 4], device=options.device)
    hidden, root = gather_roots(lane_B, num_known_P=state.known, tokens_PL=state.tokens, hidden_PE=state.hidden)
    assert torch.equal(hidden, state.hidden[lane_B])
    assert torch.equal(root, state.tokens[lane_B, state.known[lane_B] - 1])


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("has_paths", [False, True])
def test_rows_of_a_step(name, seed, has_paths):
    state = Lanes(seed, TREES[name])
    tree = state.tree
    lane_B = torch.tensor([4, 1, 3], device=options.device)
    # as independent heads offer them, or a list for each node with children
    list_N = tree.inner_list_N if has_paths else tree.depth_N - 1
    candidates = state.ints(0, VOCAB, max(int(list_N.max()) + 1, 1), 3, TREES[name].max_rank + 1).transpose(0, 1)
    candidates = candidates if has_paths else candidates.contiguous()
    match, expected_lookup = None, None
    if tree.lookup_depth:
        match = match_suffixes(
            lane_B,
            num_known_P=state.known,
            num_prompt_P=state.prompt,
            num_predicted_P=torch.zeros_like(state.known),
            tokens_PL=state.tokens,
            first_prediction=state.tokens.shape[1],
            max_match_len=MAX_MATCH_LEN,
        )
        expected_lookup = lookup_tokens(state.tokens, lane_B, state.known[lane_B], tree.lookup_depth)
    token, position, slot, index, lane, base = pack_trees(
        lane_B,
        candidates if tree.head_depth > 0 else None,
        match,
        list_N=list_N,
        depth_N=tree.depth_N,
        rank_N=tree.rank_N,
        num_known_P=state.known,
        num_prompt_P=state.prompt,
        tokens_PL=state.tokens,
        block_table_PX=state.table,
        block_size=BLOCK_SIZE,
        spare_slot=SPARE,
        max_position=17,
        first_prediction=state.tokens.shape[1],
    )
    known_B = state.known[lane_B]
    assert torch.equal(base, known_B - 1)
    drafter = FixedLists(candidates, list_N)
    expected = draft_tree(drafter, state.hidden[lane_B], state.tokens[lane_B, base], tree, expected_lookup)
    assert torch.equal(token.view(3, -1), expected)
    assert torch.equal(position.view(3, -1), (base.unsqueeze(1) + tree.depth_N).clamp(max=17))
    node_N = torch.arange(tree.num_nodes, device=options.device)
    assert torch.equal(slot.view(3, -1), state.slots(lane_B, base.unsqueeze(1) + node_N))
    assert torch.equal(index.view(3, -1), (known_B - state.prompt[lane_B]).unsqueeze(1) + tree.depth_N)
    assert torch.equal(lane.view(3, -1), lane_B.unsqueeze(1).expand(3, tree.num_nodes))


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("seed", range(8))
def test_walk_cut_and_lane_state(name, seed):
    """Few token ids, so that drafts are often right and stop ids are often met."""
    state = Lanes(seed + 100, TREES[name])
    tree = state.tree
    lane_B = torch.tensor([4, 1, 3, 0], device=options.device)
    num_lanes, num_levels = len(lane_B), tree.max_depth + 1
    token_BN = state.ints(0, VOCAB, num_lanes, tree.num_nodes)
    drawn_BN = state.ints(0, VOCAB, num_lanes, tree.num_nodes)
    hidden_BNE = torch.randn(num_lanes, tree.num_nodes, HIDDEN, generator=state.generator).to(options.device)

    walk = walk_tree(
        torch.nn.functional.one_hot(drawn_BN, VOCAB).float(), token_BN, tree, greedy_rows(num_lanes), torch.zeros_like(lane_B)
    )
    known_B = state.known[lane_B]
    kept_B, code_B = cut_walk(walk, state.stop_ids[lane_B], state.max_total[lane_B] - known_B, state.finished[lane_B] > 0)
    expected_tokens, expected_hidden = state.tokens.clone(), state.hidden.clone()
    for row, lane in enumerate(lane_B.tolist()):
        kept = int(kept_B[row])
        start = int(known_B[row])
        expected_tokens[lane, start : start + kept] = walk.token_ids_BL[row, :kept]
        if kept:
            expected_hidden[lane] = hidden_BNE[row, walk.node_BL[row, kept - 1]]

    counted, expected_counts = (PenaltyState(NUM_LANES - 1, VOCAB, torch.device(options.device)) for _ in range(2))
    expected_counts.count(lane_B, walk.token_ids_BL, kept_B)
    has_logprobs = torch.tensor([1, 1, 0, 1, 0, 0], device=options.device)[:NUM_LANES]
    path_hidden = torch.zeros(NUM_LANES, num_levels + 1, HIDDEN, device=options.device)
    expected_path = path_hidden.clone()
    for row, lane in enumerate(lane_B.tolist()):
        if has_logprobs[lane]:
            kept = int(kept_B[row])
            expected_path[lane, :kept] = hidden_BNE[row, walk.node_BL[row, :kept]]
    result = torch.full((num_lanes, num_levels + NUM_RESULT_COLUMNS), -9, device=options.device)
    hidden_TE = hidden_BNE.flatten(0, 1)
    source, target = run_walk(
        state, lane_B, drawn_BN, token_BN, hidden_TE, result, counted.count_PV, has_logprobs=has_logprobs, path_hidden=path_hidden
    )
    assert torch.equal(result[:, :num_levels], walk.token_ids_BL)
    assert torch.equal(result[:, num_levels:], torch.stack([walk.length_B, kept_B, code_B, credited_nodes(walk, kept_B)], dim=1))
    assert torch.equal(state.tokens, expected_tokens)
    assert torch.equal(state.hidden, expected_hidden)
    assert torch.equal(path_hidden, expected_path)
    assert torch.equal(counted.count_PV, expected_counts.count_PV)
    assert int(counted.count_PV.sum()) == int(kept_B.sum())
    assert torch.equal(state.known[lane_B], known_B + kept_B)
    assert torch.equal(state.finished[lane_B] > 0, (code_B > 0) | (lane_B == 3))
    level_L = torch.arange(num_levels, device=options.device)
    has_move = (level_L < kept_B.unsqueeze(1)) & (walk.node_BL != level_L)
    assert torch.equal(source, torch.where(has_move, state.slots(lane_B, known_B.unsqueeze(1) - 1 + walk.node_BL), -1))
    assert torch.equal(target, torch.where(has_move, state.slots(lane_B, known_B.unsqueeze(1) - 1 + level_L), -1))


@pytest.mark.parametrize("name", ["bushy", "preset", "heads and lookup", "all of 64 nodes"])
@pytest.mark.parametrize("seed", range(6))
def test_walks_go_as_far_as_plain_decoding_confirms(name, seed):
    """Of two tokens, so that many nodes hold what others hold, siblings too: the first one that is found need not have the right
    children."""
    state = Lanes(seed, TREES[name])
    tree, topology = state.tree, TREES[name]
    next_token = state.ints(0, 2, 2, 2, 2).tolist()  # by the three tokens before
    token_BN = state.ints(0, 2, NUM_LANES, tree.num_nodes)
    truth, drawn, paths = [], [], []
    for row in token_BN.tolist():
        paths.append(
            [[row[other] for other in range(node + 1) if bits >> other & 1] for node, bits in enumerate(topology.ancestor_mask)]
        )
        texts = [[0, 1, *path] for path in paths[-1]]
        drawn.append([next_token[text[-3]][text[-2]][text[-1]] for text in texts])
        text = texts[0]
        for _ in range(tree.max_depth + 1):
            text = [*text, next_token[text[-3]][text[-2]][text[-1]]]
        truth.append(text[2:])
    drawn_BN = torch.tensor(drawn, device=options.device)
    lane_B = torch.arange(NUM_LANES, device=options.device)
    logits = torch.nn.functional.one_hot(drawn_BN, VOCAB).float()
    walk = walk_tree(logits, token_BN, tree, greedy_rows(NUM_LANES), torch.zeros_like(lane_B))
    result = torch.zeros(NUM_LANES, tree.max_depth + 1 + NUM_RESULT_COLUMNS, dtype=torch.int64, device=options.device)
    run_walk(state, lane_B, drawn_BN, token_BN, torch.zeros(token_BN.numel(), HIDDEN, device=options.device), result)
    assert torch.equal(result[:, : tree.max_depth + 1], walk.token_ids_BL)
    for lane in range(NUM_LANES):
        right = [len(path) for path in paths[lane] if path == truth[lane][: len(path)]]
        assert int(walk.length_B[lane]) == max(right)
        assert walk.token_ids_BL[lane].tolist()[: max(right)] == truth[lane][1 : max(right) + 1]
        for level in range(max(right)):
            # what is kept of a level is of a node on such a path, and the first of them
            node = int(walk.node_BL[lane, level])
            assert node == paths[lane].index(truth[lane][: level + 1])
        for level in range(1, max(right)):
            # the credit for a draft goes to the first such node that a head has filled, or else to the first one
            holders = [node for node, path in enumerate(paths[lane]) if path == truth[lane][: level + 1]]
            credited = next((node for node in holders if topology.ranks[node] >= 0), holders[0])
            assert int(walk.credit_BL[lane, level - 1]) == credited
    assert torch.equal(result[:, -1], credited_nodes(walk, result[:, -3]))


def test_the_random_cases_cover_moves_stops_limits_and_full_paths():
    """Guards the test above: what it compares does happen."""
    seen = set()
    for name, topology in TREES.items():
        for seed in range(8):
            state = Lanes(seed + 100, topology)
            lane_B = torch.tensor([4, 1, 3, 0], device=options.device)
            token_BN = state.ints(0, VOCAB, 4, state.tree.num_nodes)
            drawn_BN = state.ints(0, VOCAB, 4, state.tree.num_nodes)
            logits = torch.nn.functional.one_hot(drawn_BN, VOCAB).float()
            walk = walk_tree(logits, token_BN, state.tree, greedy_rows(4), torch.zeros_like(lane_B))
            room_B = state.max_total[lane_B] - state.known[lane_B]
            kept_B, code_B = cut_walk(walk, state.stop_ids[lane_B], room_B, state.finished[lane_B] > 0)
            seen |= {f"code {code}" for code in code_B.tolist()} | {f"{name} kept {kept}" for kept in kept_B.tolist()}
    assert {"code 0", "code 1", "code 2", "preset kept 3", "bushy kept 2", "chain kept 2", "root kept 1", "root kept 0"} <= seen


def greedy_rows(num_rows: int) -> SamplingRows:
    zeros = torch.zeros(num_rows, dtype=torch.int64, device=options.device)
    return SamplingRows(
        temperature_R=zeros.float(),
        top_k_R=zeros,
        top_p_R=zeros.float(),
        min_p_R=zeros.float(),
        min_tokens_R=zeros,
        stop_ids_RW=zeros.unsqueeze(1) - 1,
        key_R=zeros,
        epsilon_R=zeros.float(),
        delta_R=zeros.float(),
        is_all_greedy=True,
        has_top_k=False,
        has_top_p=False,
        has_min_p=False,
        has_min_tokens=False,
    )
