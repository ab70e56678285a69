"""Which tree an engine offers, and who picks its size each step."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from medusa_core.config import SpeculationConfig
from medusa_core.errors import ConfigError
from medusa_core.scheduler.controller import FixedTreeSize, MeasuredTreeSize, TreeSizeController, tree_sizes
from medusa_core.scheduler.costs import StepCosts
from medusa_core.tree.presets import load_tree
from medusa_core.tree.search import best_tree, expected_tokens
from medusa_core.tree.topology import MAX_NODES, TreeTopology

RankAccuracy = tuple[tuple[float, ...], ...]

# What heads without a calibration are taken for, until live acceptance corrects it: the published accuracies of the Vicuna-7B heads
# (FasterDecoding/Medusa, assets/medusa_acc.csv), as the increments of top-1..5.
_TYPICAL_ACCURACY: RankAccuracy = (
    (0.560, 0.112, 0.055, 0.033, 0.020),
    (0.316, 0.108, 0.061, 0.043, 0.034),
    (0.201, 0.087, 0.060, 0.035, 0.034),
    (0.147, 0.078, 0.049, 0.037, 0.029),
    (0.118, 0.069, 0.048, 0.037, 0.028),
)
_DEFAULT_PRESET = "mc_sim_7b_63"
ROOT_ONLY = TreeTopology(())


def choose_topology(config: SpeculationConfig, num_heads: int, calibration: RankAccuracy | None) -> tuple[TreeTopology, str]:
    """The largest tree the engine will offer, and its name for people.

    "auto" searches the best tree for the calibrated accuracies, and takes a published preset, cut to the heads there are, where
    nothing was calibrated. A tree named by the user must fit the heads: ConfigError otherwise.
    """
    if num_heads == 0 or not config.enabled or config.tree_size == 1:
        return ROOT_ONLY, "none"
    if config.tree != "auto":
        topology = TreeTopology.from_choices(load_tree(config.tree).choices, num_heads=num_heads)
        return topology, config.tree
    if calibration is not None:
        # Measured shares of neighbouring ranks can swap places by chance, and the search needs them in order.
        smoothed = [tuple(itertools.accumulate(accuracy, min)) for accuracy in calibration[:num_heads]]
        return best_tree(smoothed, MAX_NODES), "calibrated"
    return load_tree(_DEFAULT_PRESET).limit_depth(num_heads), _DEFAULT_PRESET


def offered_sizes(config: SpeculationConfig, topology: TreeTopology) -> tuple[int, ...]:
    """Every tree size that the controller may choose."""
    return tree_sizes(topology.num_nodes if config.tree_size == "auto" else min(config.tree_size, topology.num_nodes))


def choose_controller(
    config: SpeculationConfig,
    topology: TreeTopology,
    calibration: RankAccuracy | None,
    *,
    max_step_rows: int,
    measure_costs: Callable[[], StepCosts],
) -> TreeSizeController:
    """A fixed size if one was asked for (ConfigError if the tree has fewer nodes), else the measured rule.

    measure_costs: takes seconds, so it is called only where its answer is used.
    """
    if topology.num_nodes == 1:
        return FixedTreeSize(1, max_step_rows=max_step_rows)
    if config.tree_size != "auto":
        if config.tree_size > topology.num_nodes:
            raise ConfigError(
                f"tree_size is {config.tree_size}, but the tree has {topology.num_nodes} nodes.",
                hint="Lower tree_size, or use a larger tree.",
            )
        return FixedTreeSize(config.tree_size, max_step_rows=max_step_rows)
    accuracy = calibration or _TYPICAL_ACCURACY
    expected = {size: expected_tokens(topology, accuracy, size) for size in tree_sizes(topology.num_nodes)}
    return MeasuredTreeSize(expected, measure_costs(), max_step_rows=max_step_rows)
