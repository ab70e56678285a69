"""Plans become tokens: chunks, trees, commits and the end of a lane, one step at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from medusa_core.attention.context import LayerShape
from medusa_core.attention.kernel_context import BlockTables, tree_workspace
from medusa_core.attention.torch_backend import TorchAttention
from medusa_core.kernels.support import can_overlap_launches
from medusa_core.model.attention_hook import forward_hidden, install_attention, probe_layer_shapes
from medusa_core.outputs import FinishReason
from medusa_core.params import SamplingParams
from medusa_core.plan import BlockAppend, DecodeGroup, LaneJoin, LaneResult, PrefillChunk, Runner, StepPlan
from medusa_core.runtime.device_step import StepParts, hidden_stores
from medusa_core.runtime.graph_runner import MAX_CHUNKS, GraphRunner
from medusa_core.runtime.kv_store import KVStore
from medusa_core.runtime.lanes import LaneState
from medusa_core.runtime.runner import DeviceModel, ModelRunner
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.tree.topology import TreeTopology
from tests.equivalence.models import MAX_MODEL_LEN, tiny_model
from tests.grammars import no_grammars

PROMPT = [5, 17, 80, 9, 33, 60, 12, 44, 71]
NUM_TOKENS = 12
BLOCK_SIZE = 4
NUM_BLOCKS = 32
# A wrong branch first, so that the accepted path must be moved.
TREE = TreeTopology.from_choices([(0,), (1,), (1, 0), (1, 1), (1, 1, 0)])


@pytest.fixture(scope="module")
def continuation() -> list[int]:
    """The model's own greedy tokens, by the plainest of loops."""
    model = tiny_model("llama").model
    model.set_attn_implementation("eager")
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + NUM_TOKENS:
        logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


class ScriptedDraft:
    """Offers the true tokens where TREE has the path (1), (1, 1), (1, 1, 0), and junk elsewhere."""

    def __init__(self) -> None:
        self.next_tokens: list[int] = []

    def lists_of(self, tree: DeviceTree) -> Tensor:
        return tree.depth_N - 1

    def __call__(self, hidden_BE: Tensor, root_B: Tensor, tree: DeviceTree) -> Tensor:
        out = torch.full((hidden_BE.shape[0], tree.max_depth, tree.max_rank + 1), 1, dtype=torch.int64)
        for head, (token, rank) in enumerate(zip(self.next_tokens[: tree.max_depth], (1, 1, 0), strict=False)):
            out[0, head, rank] = token
        return out.to(hidden_BE.device)


def kernel_runner(model: DeviceModel, store: KVStore, lanes: LaneState, num_heads: int, shapes: list[LayerShape]) -> GraphRunner:
    """Captured on a GPU, in Triton's interpreter on a CPU."""
    parts = StepParts(
        model=model,
        lanes=lanes,
        kv_store=store,
        tables=BlockTables(table_PX=lanes.block_table_PX, block_size=BLOCK_SIZE, spare_slot=store.spare_slot),
        workspace=tree_workspace([(1, 6), (4, 6), (4, 1)], num_heads, shapes, model.device),
        tile_rows=4,
        **hidden_stores(lanes, TREE.max_depth + 1, 16),
        use_pdl=can_overlap_launches(model.device),
    )
    runner = GraphRunner(parts, TREE, no_grammars(), node_sizes=(1, 3, 6), max_rows=24, max_chunk_rows=16)
    runner.capture()
    return runner


@pytest.fixture(params=["eager", "kernels"])
def bench(request):
    return partial(Bench, kind=request.param)


class Bench:
    """One runner, lane 2, and step numbers."""

    def __init__(
        self, eos_token_ids: tuple[int, ...] = (), *, kind: str = "eager", best_token: Callable[..., Tensor] | None = None
    ) -> None:
        loaded = tiny_model("llama")
        install_attention(loaded.model)
        self.draft = ScriptedDraft()
        model = DeviceModel(
            forward=partial(forward_hidden, loaded.model),
            project=loaded.project,
            drafter=self.draft,
            eos_token_ids=eos_token_ids,
            device=loaded.device,
            best_token=best_token and partial(best_token, loaded.project),
        )
        shapes = probe_layer_shapes(loaded.model)
        store = KVStore(shapes, NUM_BLOCKS, BLOCK_SIZE, torch.float32, loaded.device)
        lanes = LaneState(
            4,
            MAX_MODEL_LEN,
            NUM_BLOCKS,
            loaded.hidden_size,
            torch.float32,
            loaded.device,
            vocab_size=loaded.vocab_size,
            max_stop_ids=8,
        )
        self.runner: Runner
        if kind == "eager":
            self.runner = ModelRunner(
                model=model, topology=TREE, kv_store=store, lanes=lanes, attention=TorchAttention(), grammars=no_grammars()
            )
        else:
            self.runner = kernel_runner(model, store, lanes, loaded.model.config.num_attention_heads, shapes)
        self._step_id = 0

    def step(self, **plan: object) -> list[LaneResult]:
        self._step_id += 1
        result = self.runner.submit(StepPlan(step_id=self._step_id, **plan)).result()
        assert result.step_id == self._step_id
        return result.lanes

    def prefill(self, *, max_tokens: int = NUM_TOKENS) -> list[int]:
        (result,) = self.step(joins=[make_join(max_tokens)], chunks=[whole_chunk()])
        return result.token_ids

    def decode(self, num_nodes: int, next_tokens: list[int]) -> LaneResult:
        self.draft.next_tokens = next_tokens
        (result,) = self.step(decode_groups=[DecodeGroup(lanes=[2], num_nodes=num_nodes)])
        return result


def make_join(max_tokens: int, block_ids: tuple[int, ...] = (9, 3, 20, 5, 11, 30, 1, 14)) -> LaneJoin:
    return LaneJoin(
        lane=2,
        uid=70,
        token_ids=PROMPT,
        num_prompt_tokens=len(PROMPT),
        num_computed_tokens=0,
        max_total_tokens=len(PROMPT) + max_tokens,
        noise_key=0,
        params=SamplingParams(temperature=0.0),
        block_ids=list(block_ids),
    )


def node_bits(*nodes: int) -> int:
    return sum(1 << node for node in nodes)


def whole_chunk() -> PrefillChunk:
    return PrefillChunk(lane=2, start=0, num_tokens=len(PROMPT), is_last=True)


def test_the_last_chunk_draws_the_first_token(bench, continuation):
    assert bench().step(joins=[make_join(4)], chunks=[whole_chunk()]) == [LaneResult(lane=2, uid=70, token_ids=continuation[:1])]


def test_chunks_before_the_last_draw_nothing(bench, continuation):
    bench = bench()
    assert bench.step(joins=[make_join(4)], chunks=[PrefillChunk(lane=2, start=0, num_tokens=4, is_last=False)]) == []
    assert bench.step(chunks=[PrefillChunk(lane=2, start=4, num_tokens=1, is_last=False)]) == []
    (result,) = bench.step(chunks=[PrefillChunk(lane=2, start=5, num_tokens=4, is_last=True)])
    assert result.token_ids == continuation[:1]


def test_a_result_waits_for_its_chunks_though_they_draw_nothing(monkeypatch):
    """Or a long prompt would be launched as a whole, in front of all that comes meanwhile."""
    bench = Bench(kind="kernels")
    waits = []

    class Event:
        def __init__(self, device: torch.device) -> None:
            pass

        def synchronize(self) -> None:
            waits.append(self)

    monkeypatch.setattr("medusa_core.runtime.graph_runner.record_event", Event)
    assert bench.step(joins=[make_join(4)], chunks=[PrefillChunk(lane=2, start=0, num_tokens=4, is_last=False)]) == []
    assert len(waits) == 1
    assert bench.step(leaves=[2]) == []
    assert len(waits) == 1


def test_plain_steps(bench, continuation):
    bench = bench()
    tokens = bench.prefill()
    while len(tokens) < NUM_TOKENS:
        result = bench.decode(1, [])
        assert (result.num_draft_nodes, result.draft_depth, result.num_accepted) == (0, 0, 0)
        tokens += result.token_ids
    assert tokens == continuation
    assert result.finish_reason is FinishReason.LENGTH


def test_right_drafts_are_accepted_and_committed(bench, continuation):
    bench = bench()
    tokens = bench.prefill()
    result = bench.decode(6, continuation[1:4])
    assert (result.token_ids, result.num_accepted) == (continuation[1:5], 3)
    assert result.credit == node_bits(2, 4, 5)
    assert (result.num_draft_nodes, result.draft_depth, result.finish_reason) == (5, 3, None)
    # What follows sees the accepted path in the cache.
    assert bench.decode(1, []).token_ids == continuation[5:6]
    assert bench.decode(6, continuation[6:8]).token_ids == continuation[6:9]
    assert tokens == continuation[:1]


def test_greedy_lanes_take_the_short_way_to_the_token(continuation):
    num_rows = []

    def best_token(project, hidden_TE):
        num_rows.append(len(hidden_TE))
        return project(hidden_TE).argmax(dim=-1)

    bench = Bench(kind="kernels", best_token=best_token)
    assert bench.prefill() == continuation[:1]
    assert bench.decode(6, continuation[1:4]).token_ids == continuation[1:5]
    # the draws of a prefill step, and the nodes of a tree
    assert {MAX_CHUNKS, 6} <= set(num_rows)


def test_wrong_drafts_cost_nothing_but_the_step(bench, continuation):
    bench = bench()
    bench.prefill()
    result = bench.decode(6, [2, 2, 2])
    assert (result.token_ids, result.num_accepted, result.credit) == (continuation[1:2], 0, 0)
    assert bench.decode(6, continuation[2:5]).token_ids == continuation[2:6]


def test_a_smaller_tree_is_the_start_of_the_larger_one(bench, continuation):
    bench = bench()
    bench.prefill()
    result = bench.decode(3, continuation[1:4])
    assert (result.num_draft_nodes, result.draft_depth, result.token_ids) == (2, 1, continuation[1:3])


def test_the_length_limit_cuts_a_path_and_ends_the_lane(bench, continuation):
    bench = bench()
    bench.prefill(max_tokens=3)
    result = bench.decode(6, continuation[1:4])
    assert (result.token_ids, result.finish_reason) == (continuation[1:3], FinishReason.LENGTH)
    assert (result.num_accepted, result.credit) == (2, node_bits(2, 4))
    # A step that was launched before the end was known.
    late = bench.decode(6, continuation[3:6])
    assert (late.token_ids, late.num_accepted, late.credit) == ([], 0, 0)


def test_eos_inside_a_path_ends_it(bench, continuation):
    bench = bench(eos_token_ids=(continuation[2],))
    bench.prefill()
    result = bench.decode(6, continuation[1:4])
    assert (result.token_ids, result.finish_reason) == (continuation[1:3], FinishReason.STOP)
    assert result.credit == node_bits(2, 4)


def test_blocks_come_as_they_are_needed_and_lanes_are_used_again(bench, continuation):
    bench = bench()
    assert bench.step(joins=[make_join(4, block_ids=(7,))]) == []
    assert bench.step(block_appends=[BlockAppend(lane=2, block_ids=[2, 8, 4])]) == []
    (result,) = bench.step(chunks=[whole_chunk()])
    assert result.token_ids == continuation[:1]
    assert bench.step(leaves=[2]) == []
    assert bench.prefill() == continuation[:1]
    assert bench.decode(6, continuation[1:4]).token_ids == continuation[1:5]


@pytest.mark.long
def test_timing_steps_leaves_the_runner_as_it_was(continuation):
    bench = Bench(kind="kernels")
    assert isinstance(bench.runner, GraphRunner)
    seconds = bench.runner.measure_decode()
    assert set(seconds) == {(lanes, nodes) for nodes in (1, 3, 6) for lanes in (1, 2, 4)}
    assert min(seconds.values()) > 0
    assert bench.prefill() == continuation[:1]
    assert bench.decode(6, continuation[1:4]).token_ids == continuation[1:5]
    assert bench.decode(1, []).token_ids == continuation[5:6]
