"""Published trees and trees from files."""

from collections import Counter

import pytest

from medusa_core.errors import ConfigError
from medusa_core.tree.presets import PRESET_NAMES, load_tree
from medusa_core.tree.topology import TreeTopology

PUBLISHED = [name for name in PRESET_NAMES if not name.startswith("chain-")]


def num_per_depth(topology):
    counts = Counter(topology.depths[1:])
    return [counts[depth] for depth in sorted(counts)]


def num_leaves(topology):
    return sum(not children for children in topology.children)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_trees_have_63_draft_nodes_and_ten_candidates_per_head(name):
    topology = load_tree(name)
    assert topology.num_nodes == 64
    assert topology.max_rank == 9
    assert topology.max_depth == (3 if name == "vicuna_33b_stage1" else 4)


@pytest.mark.parametrize(
    ("name", "per_depth", "leaves"),
    [
        ("mc_sim_7b_63", [10, 28, 23, 2], 42),
        ("vicuna_7b_stage2", [10, 23, 23, 7], 42),
        ("vicuna_33b_stage1", [10, 34, 19], 46),
    ],
)
def test_node_counts_of_the_paper_repository(name, per_depth, leaves):
    assert num_per_depth(load_tree(name)) == per_depth
    assert num_leaves(load_tree(name)) == leaves


def test_the_published_presets_are_all_there_and_differ():
    assert len(PUBLISHED) == 9
    assert len({load_tree(name) for name in PUBLISHED}) == 9


def test_chains_are_presets():
    assert load_tree("chain-3") == TreeTopology.chain(3)


@pytest.mark.parametrize("text", ["[[0], [1], [0, 3]]", '{"choices": [[0], [1], [0, 3]]}'])
def test_a_json_file_holds_a_tree(tmp_path, text):
    path = tmp_path / "tree.json"
    path.write_text(text)
    assert load_tree(path) == load_tree(str(path)) == TreeTopology(((0,), (1,), (0, 3)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0], [1", "cannot be read as JSON"),
        ('{"nodes": []}', "must hold a list of rank lists"),
        ("3", "must hold a list of rank lists"),
        ("[[0], 1]", "choice 1 must be a list of integers"),
        ("[[0], [true]]", r"choice \[true\] must be a list of integers"),
        ("[[0, 0]]", "comes before its parent"),
    ],
)
def test_a_file_without_a_tree_is_refused(tmp_path, text, message):
    path = tmp_path / "tree.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tree(path)


def test_an_unknown_name_lists_the_presets():
    with pytest.raises(ConfigError, match=r"'mc_sim_8b' is neither a preset nor a file.*mc_sim_7b_63, vicuna_7b_stage1"):
        load_tree("mc_sim_8b")


def test_a_folder_is_no_tree(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tree(tmp_path)
