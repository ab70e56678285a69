"""Attention kernels against the torch reference, over caches whose unused slots hold NaN."""

from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")

from medusa_core.attention.segments import AttentionParams, Segment
from medusa_core.attention.torch_backend import attend_reference
from medusa_core.kernels.attention import (
    AttentionTile,
    SplitWorkspace,
    chunk_attention,
    chunk_tile_rows,
    tree_attention,
    tree_splits,
)
from medusa_core.kernels.kv_cache import write_kv
from tests import options

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if options.device != "cpu" else [])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# small, so that short contexts take several blocks of keys and several row tiles
SMALL_TILE = AttentionTile(block_rows=16, block_keys=16, num_warps=4, num_stages=2)
AHEAD_TILE = replace(SMALL_TILE, reads_ahead=True)
CAN_PDL = options.device != "cpu" and torch.cuda.get_device_capability() >= (9, 0)


@dataclass
class Case:
    """Lanes with their own blocks, in random order, in a cache that is NaN wherever nothing was written."""

    bases: list[int]
    num_new: int
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    num_padding_lanes: int = 0
    seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        num_lanes, (num_heads, num_kv_heads), (key_dim, value_dim) = len(self.bases), self.heads, self.dims
        width = (max(self.bases) + self.num_new) // self.block_size + 2
        num_blocks = num_lanes * width + 3
        self.spare_slot = num_blocks * self.block_size
        order = torch.randperm(num_blocks, generator=generator)[: num_lanes * width].view(num_lanes, width)
        # rows of the table in another order than lanes of the step, one row in between
        rows = torch.randperm(num_lanes + 1, generator=generator)
        self.table = torch.full((num_lanes + 1, width), -1)
        self.lane_B = rows[:num_lanes]
        for lane, base in enumerate(self.bases):
            used = -(-(base + self.num_new) // self.block_size)
            self.table[self.lane_B[lane], :used] = order[lane, :used]
        if self.num_padding_lanes:
            self.lane_B = torch.cat([self.lane_B, rows[num_lanes:].repeat(self.num_padding_lanes)])
        self.base_B = torch.tensor(self.bases + [0] * self.num_padding_lanes)

        num_slots = self.spare_slot + self.block_size
        self.keys = torch.randn(num_slots, num_kv_heads, key_dim, generator=generator).to(self.dtype)
        self.values = torch.randn(num_slots, num_kv_heads, value_dim, generator=generator).to(self.dtype)
        is_written = torch.zeros(num_slots, dtype=torch.bool)
        is_written[self.spare_slot] = True
        for lane, base in enumerate(self.bases):
            is_written[self.context_slots()[lane, : base + self.num_new]] = True
        self.clean = (self.keys.clone(), self.values.clone())
        self.keys[~is_written] = torch.nan
        self.values[~is_written] = torch.nan
        num_rows = len(self.base_B) * self.num_new
        self.query = torch.randn(num_rows, num_heads, key_dim, generator=generator).to(self.dtype)
        self.sinks = torch.randn(num_heads, generator=generator).to(self.dtype) if self.has_sinks else None

    def context_slots(self):
        blocks_BX = self.table[self.lane_B]
        slots = blocks_BX.unsqueeze(2) * self.block_size + torch.arange(self.block_size)
        return torch.where(blocks_BX.unsqueeze(2) < 0, self.spare_slot, slots).flatten(1)

    def reference(self, depth_N, mask_NN):
        """[T, H, Dv] in float32, from the unrounded reference on a cache without NaN."""
        segment = Segment(0, self.base_B, depth_N, mask_NN, self.context_slots())
        query_BNHD = self.query.view(len(self.base_B), self.num_new, *self.query.shape[1:]).float()
        params = AttentionParams(
            scaling=self.dims[0] ** -0.5,
            window=self.window,
            softcap=self.softcap,
            sinks_H=None if self.sinks is None else self.sinks.float(),
        )
        return attend_reference(query_BNHD, self.clean[0].float(), self.clean[1].float(), segment, params).flatten(0, 1)

    def layer(self):
        """Arguments that both kernels share."""
        return {
            "key_slots_SGD": self.keys.to(options.device),
            "value_slots_SGD": self.values.to(options.device),
            "block_table_PX": self.table.to(options.device),
            "block_size": self.block_size,
            "spare_slot": self.spare_slot,
            "scaling": self.dims[0] ** -0.5,
            "window": self.window,
            "softcap": self.softcap,
            "sinks_H": None if self.sinks is None else self.sinks.to(options.device),
        }

    def assert_close(self, out, expected):
        assert out.dtype == self.dtype
        torch.testing.assert_close(out.cpu().float(), expected, atol=TOLERANCE[self.dtype], rtol=TOLERANCE[self.dtype])


def random_tree(num_nodes, seed=0):
    """Depths and ancestor mask of a random tree whose last node is deep."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.eye(num_nodes, dtype=torch.bool)
    depth = torch.zeros(num_nodes, dtype=torch.int64)
    for node in range(1, num_nodes):
        parent = int(torch.randint(max(0, node - 5), node, (), generator=generator))
        mask[node] |= mask[parent]
        depth[node] = depth[parent] + 1
    return depth, mask


def ancestor_bits(mask_NN):
    """int64: bit 63 is the sign."""
    bits = [sum(1 << j for j, seen in enumerate(row) if seen) for row in mask_NN.tolist()]
    return torch.tensor([value - (1 << 64) if value >= 1 << 63 else value for value in bits])


def run_tree(case, depth, mask, *, num_splits=1, workspace=None, tile=SMALL_TILE, query=None, use_pdl=False):
    return tree_attention(
        (case.query if query is None else query).to(options.device),
        lane_B=case.lane_B.to(options.device),
        base_B=case.base_B.to(options.device),
        depth_N=depth.to(options.device),
        ancestor_bits_N=ancestor_bits(mask).to(options.device),
        num_splits=num_splits,
        workspace=workspace,
        tile=tile,
        use_pdl=use_pdl,
        **case.layer(),
    )


def workspace_for(case, num_splits):
    return SplitWorkspace(case.query.shape[0] * case.heads[0] * num_splits, case.dims[1], options.device)


def check_tree(case, num_splits=1, tile=SMALL_TILE):
    depth, mask = random_tree(case.num_new, case.seed)
    expected = case.reference(depth, mask)
    for use_pdl in (False, True) if CAN_PDL else (False,):
        out = run_tree(
            case, depth, mask, num_splits=num_splits, workspace=workspace_for(case, num_splits), tile=tile, use_pdl=use_pdl
        )
        case.assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("num_nodes", [1, 4, 33, 64])
def test_tree_sizes(num_nodes, num_splits, dtype):
    check_tree(Case(bases=[0, 37], num_new=num_nodes, heads=(2, 1), dtype=dtype), num_splits)


@pytest.mark.parametrize("heads", [(2, 2), (7, 1), (14, 2), (8, 1), (20, 1)])
def test_query_heads_share_kv_heads(heads):
    check_tree(Case(bases=[21, 5], num_new=5, heads=heads), num_splits=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (8, 24), (96, 40)])
def test_head_dims(dims, dtype):
    check_tree(Case(bases=[30], num_new=4, dims=dims, dtype=dtype), num_splits=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [1, 3, 20])
@pytest.mark.parametrize("num_nodes", [1, 20])
def test_reading_ahead(num_nodes, num_splits, dtype):
    """Splits of one block, of several, and whose first block holds committed keys, nodes, or both."""
    check_tree(Case(bases=[0, 30, 64, 100], num_new=num_nodes, heads=(2, 1), dtype=dtype), num_splits, AHEAD_TILE)


@pytest.mark.parametrize("window", [1, 17])
def test_reading_ahead_of_a_window(window):
    check_tree(Case(bases=[0, 70], num_new=20, heads=(2, 1), dims=(8, 24), window=window, seed=1), 3, AHEAD_TILE)


@pytest.mark.parametrize("tile", [SMALL_TILE, AHEAD_TILE])
def test_what_the_kernel_before_writes_is_waited_for(tile):
    """Queries and the trees' keys and values, written over and over by the launches just before, in a captured chain."""
    case = Case(bases=[90, 7], num_new=6, heads=(4, 2), dims=(64, 64), block_size=16, dtype=torch.float16)
    depth, mask = random_tree(6)
    layer, workspace = case.layer(), workspace_for(case, 4)
    slots_T = torch.cat([case.context_slots()[lane, base : base + 6] for lane, base in enumerate(case.bases)])
    key_TGD, value_TGD, query_THD = (x.to(options.device) for x in (case.keys[slots_T], case.values[slots_T], case.query))
    inputs = {"lane_B": case.lane_B, "base_B": case.base_B, "depth_N": depth, "ancestor_bits_N": ancestor_bits(mask)}
    inputs = {name: value.to(options.device) for name, value in inputs.items()}
    slots_T, buffer_THD, results = slots_T.to(options.device), torch.empty_like(query_THD), []

    def chain():
        results.clear()
        for scale in (1.0, 0.0, 2.0, 1.0):
            torch.mul(query_THD, scale, out=buffer_THD)
            write_kv(key_TGD, value_TGD * scale, layer["key_slots_SGD"], layer["value_slots_SGD"], slots_T)
            results.append(
                tree_attention(buffer_THD, num_splits=4, workspace=workspace, tile=tile, use_pdl=CAN_PDL, **inputs, **layer)
            )

    chain()
    if options.device != "cpu":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        for _ in range(20):
            graph.replay()
    case.assert_close(results[0], case.reference(depth, mask))
    assert torch.equal(results[0], results[3])
    assert not torch.equal(results[1], results[0])
    assert not torch.equal(results[2], results[0])


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_block_sizes(block_size):
    check_tree(Case(bases=[0, 1, 50], num_new=7, block_size=block_size), num_splits=2)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 17, 100])
def test_windows(window, num_splits):
    """Also narrower than the tree is deep; for a long lane whole blocks lie outside."""
    depth, _ = random_tree(20, 1)
    assert depth.max() > 3
    check_tree(Case(bases=[0, 9, 70], num_new=20, heads=(2, 1), window=window, seed=1), num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_softcap_and_sinks(num_splits):
    case = Case(bases=[3, 40], num_new=6, softcap=2.0, has_sinks=True)
    check_tree(case, num_splits)
    check_tree(replace(case, softcap=None), num_splits)
    check_tree(replace(case, has_sinks=False, window=8), num_splits)


def test_bit_63_is_the_last_node_alone():
    """Where only the sign bit tells, the 64th node sees itself and the others do not."""
    case = Case(bases=[2], num_new=64)
    depth, mask = torch.zeros(64, dtype=torch.int64), torch.eye(64, dtype=torch.bool)
    case.assert_close(run_tree(case, depth, mask), case.reference(depth, mask))


def test_more_splits_than_work_and_replays():
    """Counters return to zero whatever the lengths, and results repeat to the bit."""
    case = Case(bases=[0, 90, 3], num_new=4)
    depth, mask = random_tree(4)
    workspace = workspace_for(case, 16)
    first = run_tree(case, depth, mask, num_splits=16, workspace=workspace)
    assert not workspace.counters.any()
    second = run_tree(case, depth, mask, num_splits=16, workspace=workspace)
    assert torch.equal(first, second)
    case.assert_close(first, case.reference(depth, mask))
    other = Case(bases=[60, 0, 11], num_new=4, seed=2)
    other.assert_close(run_tree(other, depth, mask, num_splits=16, workspace=workspace), other.reference(depth, mask))


def test_padding_lanes_do_not_disturb_the_others():
    case = Case(bases=[5, 33], num_new=4, num_padding_lanes=3)
    depth, mask = random_tree(4)
    out = run_tree(case, depth, mask, num_splits=2, workspace=workspace_for(case, 2))
    live = 2 * case.num_new
    case.assert_close(out[:live], case.reference(depth, mask)[:live])
    # all nodes of a padding lane read the one spare slot
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_default_tiles(dtype):
    """The tile chosen by shape, here one with more rows than one tile holds and a context of two blocks."""
    case = Case(bases=[70, 0], num_new=16, heads=(14, 2), dims=(64, 64), block_size=16, dtype=dtype)
    check_tree(case, num_splits=min(4, tree_splits(2, 16, 14, 2)), tile=None)


def test_queries_may_be_a_view_of_a_wider_product():
    case = Case(bases=[12], num_new=4, heads=(4, 2))
    depth, mask = random_tree(4)
    wide = torch.full((4, 9, 16), torch.nan)
    wide[:, 2:6] = case.query
    case.assert_close(run_tree(case, depth, mask, query=wide[:, 2:6]), case.reference(depth, mask))


def test_int32_depths_and_a_given_output():
    case = Case(bases=[12], num_new=4, window=6)
    depth, mask = random_tree(4)
    out = torch.empty(4, 4, 16, device=options.device)
    returned = tree_attention(
        case.query.to(options.device),
        lane_B=case.lane_B.to(options.device),
        base_B=case.base_B.to(options.device),
        depth_N=depth.int().to(options.device),
        ancestor_bits_N=ancestor_bits(mask).to(options.device),
        out_THDv=out,
        **case.layer(),
    )
    assert returned is out
    case.assert_close(out, case.reference(depth, mask))


def test_a_workspace_that_does_not_fit_is_refused():
    case = Case(bases=[12], num_new=4)
    depth, mask = random_tree(4)
    with pytest.raises(ValueError, match="needs a workspace"):
        run_tree(case, depth, mask, num_splits=2)
    with pytest.raises(ValueError, match="partial rows"):
        run_tree(case, depth, mask, num_splits=2, workspace=SplitWorkspace(31, 16, options.device))
    with pytest.raises(ValueError, match="partial rows"):
        run_tree(case, depth, mask, num_splits=2, workspace=SplitWorkspace(32, 8, options.device))


def test_too_many_nodes_are_refused():
    case = Case(bases=[1], num_new=65)
    with pytest.raises(ValueError, match="65 nodes"):
        run_tree(case, torch.zeros(65, dtype=torch.int64), torch.eye(64, dtype=torch.bool))


@pytest.mark.parametrize(("bases", "most_programs"), [(1, 528), (16, 528), (1024, 2048)])
@pytest.mark.parametrize("num_nodes", [1, 16, 64])
def test_splits_fill_the_chip_and_no_more(num_nodes, bases, most_programs):
    splits = tree_splits(bases, num_nodes, 14, 2)
    assert 1 <= splits <= 32
    assert splits == 1 or splits * bases * 2 <= most_programs


# prompt chunks


def run_chunks(case, tile_rows, tile=SMALL_TILE, num_unused=1, out=None):
    """Every lane's rows as one chunk, cut into tiles; tiles in reverse order, unused ones in front."""
    tiles = [(-1, -1, 0, -1)] * num_unused
    for lane, base in reversed(list(enumerate(case.bases))):
        for start in range(0, case.num_new, tile_rows):
            num_rows = min(tile_rows, case.num_new - start)
            tiles.append((int(case.lane_B[lane]), lane * case.num_new + start, num_rows, base + start))
    lane_Q, row_Q, num_rows_Q, position_Q = torch.tensor(tiles, dtype=torch.int32).to(options.device).t().contiguous()
    return chunk_attention(
        case.query.to(options.device),
        tile_lane_Q=lane_Q,
        tile_row_Q=row_Q,
        tile_num_rows_Q=num_rows_Q,
        tile_position_Q=position_Q,
        tile_rows=tile_rows,
        out_THDv=out,
        tile=tile,
        **case.layer(),
    )


def check_chunks(case, tile_rows, tile=SMALL_TILE):
    depth = torch.arange(case.num_new)
    mask = torch.ones(case.num_new, case.num_new, dtype=torch.bool).tril()
    case.assert_close(run_chunks(case, tile_rows, tile), case.reference(depth, mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tile_rows", "num_rows"), [(1, 7), (6, 40), (8, 1), (8, 24), (40, 40)])
def test_chunks(tile_rows, num_rows, dtype):
    """Tiles that are full, cut short, and longer than a block of rows and heads."""
    check_chunks(Case(bases=[0, 19], num_new=num_rows, dtype=dtype), tile_rows)


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (8, 24)])
@pytest.mark.parametrize("heads", [(2, 2), (7, 1), (8, 1), (14, 2)])
def test_chunks_of_other_heads(heads, dims):
    check_chunks(Case(bases=[9], num_new=12, heads=heads, dims=dims), tile_rows=5)


@pytest.mark.parametrize("window", [1, 5, 30])
def test_chunks_with_windows(window):
    check_chunks(Case(bases=[0, 60], num_new=23, window=window, block_size=16), tile_rows=8)


def test_chunks_with_softcap_and_sinks():
    check_chunks(Case(bases=[7, 20], num_new=9, softcap=3.0, has_sinks=True, window=12, block_size=1), tile_rows=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_with_default_tiles(dtype):
    case = Case(bases=[70], num_new=20, heads=(14, 2), dims=(64, 64), block_size=16, dtype=dtype)
    check_chunks(case, chunk_tile_rows(14, 2), tile=None)


def test_rows_of_no_tile_stay_as_they_were():
    case = Case(bases=[4, 4], num_new=3)
    out = torch.full((8, 4, 16), 7.0, device=options.device)
    case.query = torch.cat([case.query, case.query[:2]])
    run_chunks(case, 2, num_unused=5, out=out)
    assert (out[6:] == 7.0).all()
    assert (out[:6] != 7.0).all()


@pytest.mark.parametrize(("heads", "expected"), [((14, 2), 9), ((8, 8), 64), ((64, 8), 8), ((128, 1), 1)])
def test_chunk_tile_rows(heads, expected):
    assert chunk_tile_rows(*heads) == expected
