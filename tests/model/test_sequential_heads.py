"""Heads that know the tokens in between: along a path, down a tree, and in files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medusa_core.errors import ConfigError, HeadsMismatchError
from medusa_core.model.checkpoint import load_heads
from medusa_core.model.int8_linear import Int8Linear, as_int8
from medusa_core.model.projection import Projection
from medusa_core.model.sequential_heads import HeadsShape, SequentialHeads
from medusa_core.model.sequential_layout import save_sequential
from medusa_core.speculation.device_tree import DeviceTree
from medusa_core.speculation.drafter import draft_tree, make_drafter
from medusa_core.tree.topology import TreeTopology
from tests.training.shapes import SHAPES

E, V = 32, 320  # of the `loaded` model
K = 2
TREE = TreeTopology(((0,), (1,), (0, 0), (2,), (1, 0), (0, 2), (1, 1), (0, 1)))
OURS = [name for name in SHAPES if not SHAPES[name].is_published]


def random_heads(shape: HeadsShape, token_map: torch.Tensor | None = None) -> SequentialHeads:
    torch.manual_seed(0)
    vocab_size = V if token_map is None else len(token_map)
    heads = SequentialHeads(shape, hidden_size=E, vocab_size=vocab_size, base_vocab_size=V, token_map_V=token_map)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    return heads.requires_grad_(False)


def save(heads: SequentialHeads, path, dtype=torch.float32, token_map=None):
    save_sequential(heads, path, dtype=dtype, metadata={}, token_map_V=token_map)
    return path


@pytest.mark.parametrize("has_token_map", [False, True])
@pytest.mark.parametrize("shape", OURS)
def test_every_node_of_a_tree_is_what_its_path_leads_to(loaded, tmp_path, shape, has_token_map):
    token_map = torch.randperm(V)[:100] if has_token_map else None
    heads = load_heads(save(random_heads(SHAPES[shape], token_map), tmp_path / "heads.safetensors", token_map=token_map), loaded)
    hidden, root = torch.randn(3, E), torch.tensor([5, 7, 300])
    tree = DeviceTree.create(TREE, torch.device("cpu"))
    tokens = draft_tree(make_drafter(heads, loaded), hidden, root, tree)
    assert torch.equal(tokens[:, 0], root)
    embed = loaded.model.get_input_embeddings()
    for node, choice in enumerate(TREE.choices, start=1):
        before = tokens[:, [0, TREE.parents[node]]] if len(choice) == 2 else tokens[:, [0, 0]]
        lists = heads.candidates_along(hidden, before, 3, project=loaded.project, embed=embed)
        assert torch.equal(tokens[:, node], lists[:, len(choice) - 1, choice[-1]]), choice
    if SHAPES[shape].is_sequential or SHAPES[shape].has_markov_term:
        other = draft_tree(make_drafter(heads, loaded), hidden, root + 1, tree)
        assert not torch.equal(other[:, 1:], tokens[:, 1:]), "the root's token makes no difference"


@pytest.mark.parametrize("shape", OURS)
def test_what_is_saved_is_what_is_loaded(loaded, tmp_path, shape):
    token_map = torch.randperm(V)[:100]
    heads = random_heads(SHAPES[shape], token_map)
    again = load_heads(save(heads, tmp_path / "heads.safetensors", token_map=token_map), loaded)
    assert isinstance(again, SequentialHeads)
    assert (again.num_heads, again.num_layers, again.draft_vocab_size) == (K, SHAPES[shape].num_layers, 100)
    assert again.layout == heads.layout
    for name, parameter in heads.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter)


def test_files_of_heads_are_readable_as_any_new_file_is(tmp_path):
    path = save(random_heads(HeadsShape(num_heads=K)), tmp_path / "heads.safetensors")
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert not list(tmp_path.glob("*.partial"))


def test_eight_bits_are_near(loaded, tmp_path):
    heads = random_heads(SHAPES["sequential, all at once"])
    path = save(heads, tmp_path / "heads.safetensors", dtype=torch.int8)
    assert {tensor.dtype for name, tensor in load_file(path).items() if name.endswith(".weight")} == {torch.int8}
    again = load_heads(path, loaded)
    for name, parameter in heads.state_dict().items():
        error = (again.state_dict()[name] - parameter).abs()
        assert (error <= parameter.abs().amax(dim=-1, keepdim=True) * (0.51 / 127 if name.endswith(".weight") else 0.01)).all()


def test_without_a_token_map_the_first_ids_are_drafted_from(loaded, tmp_path):
    path = save(random_heads(HeadsShape(num_heads=K)), tmp_path / "heads.safetensors")
    assert load_heads(path, loaded, draft_vocab_size=64).draft_vocab_size == 64
    assert load_heads(path, loaded, draft_vocab_size=None).draft_vocab_size is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.0.down.weight"), r"no tensor blocks\.0\.0\.down"),
        (lambda t: t.pop("blocks.0.0.bias_SJ"), r"no tensor blocks\.0\.0\.bias_SJ"),
        (lambda t: t.update({"surprise": torch.zeros(1, 1)}), "no tensors of such heads: surprise"),
        (lambda t: t.update({"blocks.0.0.down.weight": torch.zeros(E + 1, 4 * E)}), r"has shape \[33, 128\]"),
        (lambda t: t.update({"token_map": torch.tensor([V])}), "outside the base vocabulary"),
        (lambda t: t.update({"blocks.0.0.gate_up.weight": torch.zeros(8 * E, E)}), r"gate_up.weight has shape \[256, 32\]"),
        (lambda t: t.update({"blocks.0.0.bias_SJ": torch.tensor(1.0)}), "must be a matrix"),
        (lambda t: t.update({"surprise_scale": torch.zeros(1, 1)}), "no tensors of such heads: surprise_scale"),
        (lambda t: t.update({"blocks.0.0.down.weight": torch.zeros(E, 4 * E, dtype=torch.int32)}), "floating point or int8"),
        (lambda t: t.update({"blocks.0.3000000.down.weight": torch.zeros(1, 1)}), "incomplete"),
        (lambda t: t.update({"own.0.weight": torch.zeros(V + 80, E)}), "know 400 tokens"),
        (lambda t: t.update({"markov.weight": torch.zeros(V, 4), "own.0.weight": torch.zeros(V, E)}), "do not belong together"),
        (lambda t: t.update({"blocks.0.0.down.weight": torch.zeros(E, 4 * E, dtype=torch.int8)}), "a scale per row"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(loaded, tmp_path, change, message):
    path = save(random_heads(HeadsShape(num_heads=K)), tmp_path / "heads.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(HeadsMismatchError, match=message):
        load_heads(tmp_path / "other.safetensors", loaded)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_heads": 0},
        {"mlp_size": -1},
        {"mlp_size": 0},
        {"is_sequential": False},
        {"output": "own", "has_markov_term": True},
        {"output": "low-rank", "rank": 0},
    ],
)
def test_shapes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        HeadsShape(**wrong)


@pytest.mark.parametrize("shape", OURS)
def test_heads_rounded_to_eight_bits_guess_nearly_the_same(loaded, tmp_path, shape):
    token_map = torch.randperm(V)[:100]
    path = save(random_heads(SHAPES[shape], token_map), tmp_path / "heads.safetensors", token_map=token_map)
    exact, rounded = load_heads(path, loaded), load_heads(path, loaded)
    rounded.use_int8()
    hidden, before = torch.randn(50, E), torch.randint(V, (50, K))
    embed = loaded.model.get_input_embeddings()
    lists = [heads.candidates_along(hidden, before, 1, project=loaded.project, embed=embed) for heads in (exact, rounded)]
    assert (lists[0] == lists[1]).float().mean() >= 0.8
    assert any(isinstance(module, Int8Linear) for module in rounded.modules())


def test_layers_that_cannot_be_rounded_stay():
    with_bias = nn.Linear(8, 8)
    assert as_int8(with_bias) is with_bias
    tower = nn.Sequential(nn.Linear(8, 8))
    assert as_int8(tower) is tower


def test_nothing_in_eight_bits_is_nothing():
    rounded = as_int8(nn.Linear(64, 8, bias=False))
    assert isinstance(rounded, Int8Linear)
    assert torch.equal(rounded(torch.zeros(2, 64)), torch.zeros(2, 8))


@pytest.mark.cuda
@pytest.mark.parametrize("shape", OURS)
def test_a_level_on_a_gpu_is_near_the_plain_one(shape):
    heads = random_heads(SHAPES[shape])
    embedding, linear = nn.Embedding(V, E), nn.Linear(E, V, bias=False)
    linear.weight.data.mul_(4.0)
    parts = [module.requires_grad_(False).bfloat16().float() for module in (heads, embedding, linear)]
    state, lists = torch.randn(2, 4, E).bfloat16().float(), torch.randint(V, (2, 4, 3))
    parent, rank = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])

    def step(device, dtype):
        heads, embedding, linear = (part.to(device, dtype) for part in parts)
        with torch.inference_mode():
            states, found = heads.step(
                1, state.to(device, dtype), lists.to(device), parent.to(device), rank.to(device), 1,
                project=Projection(linear), embed=embedding,
            )  # fmt: skip
        return states.float().cpu(), found.cpu()

    expected, expected_lists = step("cpu", torch.float32)
    actual, actual_lists = step("cuda", torch.bfloat16)
    assert (actual - expected).norm() / expected.norm() <= 2e-2
    assert (actual_lists == expected_lists).float().mean() >= 0.7
