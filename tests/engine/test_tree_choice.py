"""Which tree is offered for which heads and options, and who picks its size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_core.config import SpeculationConfig
from medusa_core.engine.tree_choice import ROOT_ONLY, ChosenTree, choose_controller, choose_tree
from medusa_core.errors import ConfigError
from medusa_core.model.calibration import Calibration
from medusa_core.scheduler.controller import TreeSizeController
from medusa_core.scheduler.costs import CostCurve, PackedCosts
from medusa_core.tree.merge import MAX_LOOKUP_DEPTH
from medusa_core.tree.presets import load_tree
from medusa_core.tree.topology import TreeTopology, lookup_chain


def calibrated(*accuracy: tuple[float, ...], **tree: object) -> Calibration:
    return Calibration(rank_accuracy=accuracy, num_tokens=1000, source="a test", **tree)


CALIBRATION = calibrated((0.5, 0.2, 0.1), (0.3, 0.1, 0.05))


def choose(num_heads: int = 4, calibration: Calibration | None = None, **options: object) -> tuple[TreeTopology, str]:
    """Of heads alone, unless the options say otherwise."""
    tree = choose_tree(SpeculationConfig(**{"prompt_lookup": False, **options}), num_heads, calibration)
    assert len(tree.gains) == tree.topology.num_nodes - 1
    return tree.topology, tree.name


@pytest.mark.parametrize("prompt_lookup", [False, True])
@pytest.mark.parametrize("options", [{"enabled": False}, {"tree_size": 1}, {"tree_size": 1, "tree": "chain-2"}])
def test_without_speculation_the_tree_is_the_root(options, prompt_lookup):
    assert choose(calibration=CALIBRATION, prompt_lookup=prompt_lookup, **options) == (ROOT_ONLY.topology, "none")


def test_without_heads_the_tree_is_the_root():
    assert choose(num_heads=0) == (ROOT_ONLY.topology, "none")


def test_without_calibration_a_published_tree_is_cut_to_the_heads():
    topology, name = choose(num_heads=2)
    assert name == "mc_sim_7b_63"
    assert topology.max_depth == 2
    assert set(topology.choices) < set(load_tree(name).choices)
    assert choose(num_heads=4)[0] == load_tree("mc_sim_7b_63")


def test_a_calibration_builds_the_tree():
    topology, name = choose(num_heads=2, calibration=CALIBRATION)
    assert name == "calibrated"
    # Best first: 0.5, then 0.2 before 0.5 * 0.3 ...
    assert topology.choices[:3] == ((0,), (1,), (0, 0))
    assert topology.num_nodes == 13  # 1 + 3 + 9: every path that these ranks have


def test_heads_that_are_not_there_are_no_part_of_the_tree():
    assert choose(num_heads=1, calibration=CALIBRATION)[0].max_depth == 1


def test_a_calibration_out_of_order_is_accepted():
    """Shares of neighbouring ranks can swap by chance."""
    topology, _ = choose(num_heads=2, calibration=calibrated((0.4, 0.02, 0.03), (0.1, 0.2, 0.0)))
    assert topology.choices[0] == (0,)
    assert topology.num_nodes > 3


def test_a_calibrations_own_tree_comes_first():
    own = TreeTopology.from_choices([(1,), (1, 2)])
    calibration = calibrated((0.5, 0.2, 0.1), (0.3, 0.1, 0.05), tree=own, node_acceptance=(0.4, 0.25))
    tree = choose_tree(SpeculationConfig(prompt_lookup=False), 2, calibration)
    assert tree == ChosenTree(own, "calibrated", (0.4, 0.25))
    assert [tree.expected_tokens(num_nodes) for num_nodes in (1, 2, 3)] == [1.0, 1.4, 1.65]
    # It is of no use where there are fewer heads, and a tree named by the user comes before it.
    assert choose(num_heads=1, calibration=calibration)[0].max_depth == 1
    assert choose(num_heads=2, calibration=calibration, tree="chain-2") == (load_tree("chain-2"), "chain-2")


def test_a_named_tree_is_taken_as_it_is():
    topology, name = choose(calibration=CALIBRATION, tree="chain-3")
    assert (topology, name) == (load_tree("chain-3"), "chain-3")


def test_without_heads_the_tree_is_the_lookup_chain():
    topology, name = choose(num_heads=0, prompt_lookup=True)
    assert (topology.choices, name) == (lookup_chain(MAX_LOOKUP_DEPTH), "lookup")


def test_prompt_lookup_joins_the_heads_tree():
    topology, name = choose(num_heads=2, prompt_lookup=True)
    assert name == "mc_sim_7b_63+lookup"
    assert (topology.head_depth, topology.lookup_depth) == (2, MAX_LOOKUP_DEPTH)
    # both are there from the smallest sizes on
    assert (topology.prefix(8).head_depth, topology.prefix(8).lookup_depth) == (2, 4)
    topology, name = choose(num_heads=2, calibration=CALIBRATION, prompt_lookup=True)
    assert name == "calibrated+lookup"
    assert {choice for choice in topology.choices if choice[0] >= 0} == set(choose(2, CALIBRATION)[0].choices)


def test_a_calibrations_own_tree_with_lookup_comes_first():
    own = TreeTopology.from_choices([(1,), (1, 2)])
    with_lookup = TreeTopology.from_choices([(1,), (-1,), (-1, -1), (1, 2)])
    gains = (0.4, 0.2, 0.15, 0.1)
    both = {"tree": own, "node_acceptance": (0.4, 0.25), "lookup_tree": with_lookup, "lookup_gains": gains}
    calibration = calibrated((0.5, 0.2, 0.1), (0.3, 0.1, 0.05), **both)
    tree = choose_tree(SpeculationConfig(), 2, calibration)
    assert tree == ChosenTree(with_lookup, "calibrated+lookup", gains)
    assert [tree.expected_tokens(num_nodes) for num_nodes in (2, 4, 5)] == pytest.approx([1.4, 1.75, 1.85])
    assert choose(num_heads=2, calibration=calibration)[0] == own
    # measured for two heads
    assert choose(num_heads=1, calibration=calibration, prompt_lookup=True)[0].head_depth == 1


def test_a_file_may_hold_a_lookup_chain(tmp_path: Path):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps([[0], [-1], [-1, -1]]))
    tree = choose_tree(SpeculationConfig(tree=str(path)), 4, CALIBRATION)
    assert tree.topology.choices == ((0,), (-1,), (-1, -1))
    assert all(gain > 0 for gain in tree.gains)
    with pytest.raises(ConfigError, match="prompt lookup"):
        choose(tree=str(path))


def test_a_tree_of_heads_where_there_are_none_is_refused():
    with pytest.raises(ConfigError, match="needs heads, and there are none"):
        choose(num_heads=0, tree="chain-3", prompt_lookup=True)


def test_a_tree_from_a_file(tmp_path: Path):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps([[0], [1], [0, 0]]))
    assert choose(tree=str(path)) == (TreeTopology.from_choices([(0,), (1,), (0, 0)]), str(path))


def test_a_tree_deeper_than_the_heads_is_refused():
    with pytest.raises(ConfigError, match="needs 3 heads, the model has 2"):
        choose(num_heads=2, tree="chain-3")


def test_an_unknown_tree_is_refused():
    with pytest.raises(ConfigError, match=r"oak.*mc_sim_7b_63"):
        choose(tree="oak")


def make_controller(
    tree: str, *, seconds_per_row: float = 0.0, calibration: Calibration | None = None, **options: object
) -> tuple[TreeSizeController, list[str]]:
    """The controller, and one entry for each time costs were measured."""
    measured = []

    def measure() -> PackedCosts:
        measured.append("measured")
        forward = CostCurve(((1, 1.0 + seconds_per_row), (64, 1.0 + 64 * seconds_per_row)))
        return PackedCosts(forward=forward, draft=CostCurve(((1, 0.0),)))

    config = SpeculationConfig(**options)
    chosen = choose_tree(SpeculationConfig(tree=tree), 4, calibration)
    return choose_controller(config, chosen, max_step_rows=1024, measure_costs=measure), measured


@pytest.mark.parametrize("tree_size", [2, 5, 8, 63, 64])
def test_a_fixed_size(tree_size):
    controller, measured = make_controller("mc_sim_7b_63", tree_size=tree_size)
    assert controller.choose(1) == tree_size
    assert measured == []


def test_a_fixed_size_shrinks_where_the_rows_do_not_fit():
    controller, _ = make_controller("mc_sim_7b_63", tree_size=40)
    assert controller.choose(25) == 40
    assert controller.choose(26) == 32


def test_a_size_larger_than_the_tree_is_refused():
    with pytest.raises(ConfigError, match="tree_size is 8, but the tree has 4 nodes"):
        make_controller("chain-3", tree_size=8)


def test_a_tree_of_the_root_alone_needs_no_measurement():
    measured = []
    controller = choose_controller(
        SpeculationConfig(), ROOT_ONLY, max_step_rows=64, measure_costs=lambda: measured.append("measured")
    )
    assert (controller.choose(1), measured) == (1, [])


@pytest.mark.parametrize("calibration", [None, calibrated((0.5, 0.2), (0.3, 0.1), (0.2, 0.1), (0.1, 0.1))])
def test_auto_takes_what_is_worth_its_cost(calibration):
    topology = "mc_sim_7b_63"
    free, measured = make_controller(topology, calibration=calibration)
    assert measured == ["measured"]
    assert free.choose(1) >= 16
    dear, _ = make_controller(topology, calibration=calibration, seconds_per_row=10.0)
    assert dear.choose(1) == 1
    between, _ = make_controller(topology, calibration=calibration, seconds_per_row=0.03)
    assert 1 < between.choose(1) < free.choose(1)
