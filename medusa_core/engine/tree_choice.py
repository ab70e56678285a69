"""Which tree an engine offers, and who picks its size each step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from medusa_core.config import SpeculationConfig
from medusa_core.errors import ConfigError
from medusa_core.model.calibration import Calibration
from medusa_core.scheduler.controller import FixedTreeSize, MeasuredTreeSize, TreeSizeController, tree_sizes
from medusa_core.scheduler.costs import StepCosts
from medusa_core.tree.merge import merge_typical, typical_gains
from medusa_core.tree.presets import load_tree
from medusa_core.tree.search import best_tree, node_acceptance
from medusa_core.tree.topology import MAX_NODES, TreeTopology

# What heads without a calibration are taken for, until live acceptance corrects it: the published accuracies of the Vicuna-7B heads
# (FasterDecoding/Medusa, assets/medusa_acc.csv), as the increments of top-1..5.
_TYPICAL_ACCURACY: tuple[tuple[float, ...], ...] = (
    (0.560, 0.112, 0.055, 0.033, 0.020),
    (0.316, 0.108, 0.061, 0.043, 0.034),
    (0.201, 0.087, 0.060, 0.035, 0.034),
    (0.147, 0.078, 0.049, 0.037, 0.029),
    (0.118, 0.069, 0.048, 0.037, 0.028),
)
_DEFAULT_PRESET = "mc_sim_7b_63"


@dataclass(frozen=True, slots=True)
class ChosenTree:
    """The largest tree an engine offers. name: for people. gains: what each draft node is expected to add to the tokens of a step;
    for a node of heads alone, how often it is right."""

    topology: TreeTopology
    name: str
    gains: tuple[float, ...]

    def expected_tokens(self, num_nodes: int) -> float:
        """Of a step with the first `num_nodes` nodes, root included; 1 for the root alone."""
        return 1.0 + sum(self.gains[: num_nodes - 1])


ROOT_ONLY = ChosenTree(TreeTopology(()), "none", ())


def choose_tree(config: SpeculationConfig, num_heads: int, calibration: Calibration | None) -> ChosenTree:
    """The tree for these options, heads and what was measured of them.

    "auto" takes the calibration's own tree, else the best one for its accuracies, and a published preset, cut to the heads there
    are, where nothing was calibrated; with prompt lookup, a chain of its nodes is part of the tree, and all of it without heads.
    A tree named by the user is taken as it is. It must fit the heads, and hold no lookup nodes without prompt lookup: ConfigError
    otherwise.
    """
    if not config.enabled or config.tree_size == 1:
        return ROOT_ONLY
    if config.tree != "auto":
        return _named_tree(config, num_heads, calibration)
    heads_tree = _heads_tree(num_heads, calibration)
    if not config.prompt_lookup:
        return heads_tree
    own = calibration.lookup_tree if calibration else None
    if calibration is not None and own is not None and own.head_depth <= num_heads:
        return ChosenTree(own, f"{heads_tree.name}+lookup", calibration.lookup_gains)
    topology, gains = merge_typical(heads_tree.topology, heads_tree.gains, MAX_NODES)
    return ChosenTree(topology, f"{heads_tree.name}+lookup" if num_heads else "lookup", gains)


def _named_tree(config: SpeculationConfig, num_heads: int, calibration: Calibration | None) -> ChosenTree:
    topology = load_tree(config.tree)
    if num_heads == 0 and topology.head_depth > 0:
        raise ConfigError(f"The tree {config.tree!r} needs heads, and there are none.", hint="Name some, or leave the tree out.")
    topology = TreeTopology.from_choices(topology.choices, num_heads=num_heads)
    if topology.lookup_depth > 0 and not config.prompt_lookup:
        raise ConfigError(
            f"The tree {config.tree!r} has nodes for prompt lookup (-1), which is off.", hint="Turn it on, or use another tree."
        )
    accuracy = calibration.rank_accuracy if calibration else _TYPICAL_ACCURACY
    return ChosenTree(topology, config.tree, typical_gains(topology, node_acceptance(topology, accuracy)))


def _heads_tree(num_heads: int, calibration: Calibration | None) -> ChosenTree:
    """Of heads alone."""
    if num_heads == 0:
        return ROOT_ONLY
    if calibration is None:
        topology, name, accuracy = load_tree(_DEFAULT_PRESET).limit_depth(num_heads), _DEFAULT_PRESET, _TYPICAL_ACCURACY
    elif calibration.tree is not None and calibration.tree.max_depth <= num_heads:
        return ChosenTree(calibration.tree, "calibrated", calibration.node_acceptance)
    else:
        accuracy = calibration.rank_accuracy[:num_heads]
        # Measured shares of neighbouring ranks can swap places by chance, and the search needs them in order.
        smoothed = [tuple(itertools.accumulate(head, min)) for head in accuracy]
        topology, name = best_tree(smoothed, MAX_NODES), "calibrated"
    return ChosenTree(topology, name, node_acceptance(topology, accuracy))


def offered_sizes(config: SpeculationConfig, topology: TreeTopology) -> tuple[int, ...]:
    """Every tree size that the controller may choose."""
    return tree_sizes(topology.num_nodes if config.tree_size == "auto" else min(config.tree_size, topology.num_nodes))


def choose_controller(
    config: SpeculationConfig,
    tree: ChosenTree,
    *,
    max_step_rows: int,
    measure_costs: Callable[[], StepCosts],
) -> TreeSizeController:
    """A fixed size if one was asked for (ConfigError if the tree has fewer nodes), else the measured rule.

    measure_costs: takes seconds, so it is called only where its answer is used.
    """
    if tree.topology.num_nodes == 1:
        return FixedTreeSize(1, max_step_rows=max_step_rows)
    if config.tree_size != "auto":
        if config.tree_size > tree.topology.num_nodes:
            raise ConfigError(
                f"tree_size is {config.tree_size}, but the tree has {tree.topology.num_nodes} nodes.",
                hint="Lower tree_size, or use a larger tree.",
            )
        return FixedTreeSize(config.tree_size, max_step_rows=max_step_rows)
    expected = {size: tree.expected_tokens(size) for size in tree_sizes(tree.topology.num_nodes)}
    return MeasuredTreeSize(expected, measure_costs(), max_step_rows=max_step_rows)
