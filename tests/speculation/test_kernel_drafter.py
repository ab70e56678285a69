"""Drafting by kernels in 8 bits guesses what the plain way guesses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medusa_core.model.int8_linear import to_int8
from medusa_core.model.projection import Projection
from medusa_core.model.sequential_heads import HeadsShape, SequentialHeads
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.drafter import SequentialDrafter, draft_tree, make_drafter
from medusa_core.speculation.kernel_drafter import KernelDrafter, suits
from medusa_core.tree.topology import TreeTopology
from tests import options

E, V, U = 32, 8192 + 40, 9000
TREE = TreeTopology(((0,), (1,), (0, 0), (2,), (1, 0), (0, 2), (1, 1), (0, 1), (1, 1, 0), (0, 0, 0), (0, 0, 1)))
# as the kernels' other tests
DTYPE = torch.float16


def rounded_(weight: torch.Tensor) -> None:
    """To the numbers that 8 bits hold, so that rounding again changes nothing."""
    values, scale = to_int8(weight)
    weight.copy_((values.float() * scale[:, None]).to(weight.dtype))


def parts(shape: HeadsShape, *, has_map: bool = True, has_bias: bool = False) -> tuple[SequentialHeads, SimpleNamespace]:
    """Heads and as much of a loaded model as drafting asks for."""
    torch.manual_seed(1)
    num_tokens = V if has_map else U
    token_map = torch.randperm(U)[:V].sort().values if has_map else None
    heads = SequentialHeads(shape, hidden_size=E, vocab_size=num_tokens, base_vocab_size=U, token_map_V=token_map)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    linear, embedding = nn.Linear(E, num_tokens, bias=has_bias), nn.Embedding(U, E)
    for module in (heads, linear, embedding):
        module.requires_grad_(False).to(options.device, DTYPE)
    for name, parameter in [*heads.named_parameters(), ("weight", linear.weight)]:
        if name.endswith("weight"):
            rounded_(parameter)
    if has_map:
        heads.draft_projection = Projection(linear)
    model = SimpleNamespace(get_input_embeddings=lambda: embedding)
    return heads, SimpleNamespace(model=model, project=Projection(linear))


@pytest.mark.parametrize(
    ("shape", "has_map", "has_bias"),
    [
        (HeadsShape(num_heads=3), True, False),
        (HeadsShape(num_heads=3, shares_blocks=False, mlp_size=48), True, True),
        (HeadsShape(num_heads=3), False, False),
    ],
)
@pytest.mark.parametrize("num_lanes", [1, 7])
@torch.inference_mode()
def test_trees_are_nearly_those_of_the_plain_way(shape, has_map, has_bias, num_lanes):
    heads, loaded = parts(shape, has_map=has_map, has_bias=has_bias)
    assert suits(heads, loaded)
    device = torch.device(options.device)
    tree = DeviceTree.create(TREE, device)
    hidden = torch.randn(num_lanes, E).to(device, DTYPE)
    root = torch.randint(U, (num_lanes,)).to(device)
    drafter = make_drafter(heads, loaded, has_kernels=True)
    assert type(drafter) is KernelDrafter
    assert type(make_drafter(heads, loaded)) is SequentialDrafter
    actual = draft_tree(drafter, hidden, root, tree)
    expected = draft_tree(SequentialDrafter(heads, loaded), hidden, root, tree)
    # a node below one that differs differs too; by level, so that a level that is wrong altogether shows
    for depth in range(1, TREE.max_depth + 1):
        is_equal = (actual == expected)[:, tree.depth_N == depth]
        assert is_equal.float().mean() >= 0.7, depth


@torch.inference_mode()
def test_levels_of_many_rows_are_drafted_the_plain_way():
    heads, loaded = parts(HeadsShape(num_heads=3))
    tree = DeviceTree.create(TREE, torch.device(options.device))
    # the widest level has two nodes with children on the second level
    hidden, root = torch.randn(33, E).to(options.device, DTYPE), torch.randint(U, (33,)).to(options.device)
    lists = [drafter(hidden, root, tree) for drafter in (KernelDrafter(heads, loaded), SequentialDrafter(heads, loaded))]
    assert torch.equal(*lists)


@torch.inference_mode()
def test_likely_tokens_of_neighbouring_ids_are_all_found():
    heads, loaded = parts(HeadsShape(num_heads=3), has_map=False, has_bias=True)
    loaded.project.linear.bias[100:110] = torch.linspace(1000.0, 2000.0, 10)
    tree = DeviceTree.create(TreeTopology(tuple((rank,) for rank in range(10))), torch.device(options.device))
    hidden, root = torch.randn(2, E).to(options.device, DTYPE), torch.tensor([3, 4], device=options.device)
    drafted = draft_tree(KernelDrafter(heads, loaded), hidden, root, tree)[:, 1:]
    assert drafted.tolist() == [list(range(109, 99, -1))] * 2


@pytest.mark.parametrize("choices", [((0,), (140,)), ((0,), (140,), (140, 0))])
@torch.inference_mode()
def test_ranks_beyond_the_tiles_are_drafted_the_plain_way(choices):
    heads, loaded = parts(HeadsShape(num_heads=3))
    tree = DeviceTree.create(TreeTopology.from_choices(choices), torch.device(options.device))
    hidden, root = torch.randn(2, E).to(options.device, DTYPE), torch.randint(U, (2,)).to(options.device)
    lists = [drafter(hidden, root, tree) for drafter in (KernelDrafter(heads, loaded), SequentialDrafter(heads, loaded))]
    assert torch.equal(*lists)


@pytest.mark.parametrize(
    "shape",
    [
        HeadsShape(num_heads=3, num_layers=2),
        HeadsShape(num_heads=3, is_sequential=False, shares_blocks=False),
        HeadsShape(num_heads=3, output="own"),
        HeadsShape(num_heads=3, output="low-rank"),
        HeadsShape(num_heads=3, has_markov_term=True),
    ],
)
def test_other_heads_are_left_to_the_plain_way(shape):
    heads, loaded = parts(shape)
    assert not suits(heads, loaded)
    assert type(make_drafter(heads, loaded, has_kernels=True)) is SequentialDrafter


def test_float32_is_left_to_the_plain_way():
    heads, loaded = parts(HeadsShape(num_heads=3))
    heads.float()
    assert not suits(heads, loaded)


def test_a_small_vocabulary_is_left_to_the_plain_way():
    heads, loaded = parts(HeadsShape(num_heads=3))
    heads.draft_projection = Projection(nn.Linear(E, 100, dtype=DTYPE))
    assert not suits(heads, loaded)
