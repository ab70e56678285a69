"""The load-time probe tells heads that fit from heads that do not; calibration files are read and checked."""

from __future__ import annotations

import json
import logging
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medusa_core.errors import ConfigError, ModelLoadError
from medusa_core.model.calibration import Calibration, calibration_path, find_calibration, load_calibration, save_calibration
from medusa_core.model.demo import demo_heads_path
from medusa_core.model.heads import MedusaHeads
from medusa_core.model.probe import probe_heads, probe_token_ids
from medusa_core.tree.topology import TreeTopology

NUM_TOKENS, K, E = 60, 2, 32


@pytest.fixture
def constant(model_folder, load):
    """A model that says one token whatever it reads, and a text in which it has said so."""
    loaded = load(model_folder("phi"))
    with torch.no_grad():
        for parameter in loaded.project.linear.parameters():
            parameter.zero_()
        loaded.project.linear.bias[7] = 1.0
    return loaded, [7] * NUM_TOKENS


def _heads() -> MedusaHeads:
    return MedusaHeads(torch.zeros(1, K, E, E), torch.zeros(1, K, E))


def test_heads_that_repeat_a_repetitive_model_are_right(constant, caplog) -> None:
    loaded, token_ids = constant
    with caplog.at_level(logging.WARNING):
        result = probe_heads(_heads(), loaded, token_ids)
    assert result.top1 == result.top10 == (1.0, 1.0)
    assert result.num_positions == (NUM_TOKENS - 1, NUM_TOKENS - 2)
    assert caplog.text == ""


def test_heads_that_never_guess_right_are_announced(constant, caplog) -> None:
    loaded, token_ids = constant
    heads = MedusaHeads(
        torch.zeros(1, K, E, E), torch.zeros(1, K, E), draft_projection=loaded.project.restricted_to(torch.arange(20, 40)),
        token_map_V=torch.arange(20, 40),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        result = probe_heads(heads, loaded, token_ids)
    assert result.top1 == (0.0, 0.0)
    assert "hardly fit" in caplog.text


def test_positions_where_the_text_leaves_the_models_path_do_not_count(constant) -> None:
    loaded, token_ids = constant
    token_ids[30] = 8
    # One position leads to the odd token directly, and for head 2 one more leads over it.
    assert probe_heads(_heads(), loaded, token_ids).num_positions == (NUM_TOKENS - 2, NUM_TOKENS - 4)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_text_shorter_than_the_heads_reach_counts_nothing_there(constant, num_tokens) -> None:
    loaded, token_ids = constant
    assert probe_heads(_heads(), loaded, token_ids[:num_tokens]).num_positions == (num_tokens - 1, 0)


def test_the_passage_comes_in_the_models_tokens_and_fits_it(model_folder, load, tokenizer) -> None:
    folder = model_folder()
    tokenizer.save_pretrained(folder)
    assert len(probe_token_ids(load(folder, max_model_len=50))) == 50


def test_the_bundled_calibration_belongs_to_the_bundled_heads() -> None:
    path = find_calibration(demo_heads_path())
    assert path is not None
    calibration = load_calibration(path)
    num_heads = load_file(demo_heads_path())["blocks.0.0.bias_SJ"].shape[0]
    assert [len(head) for head in calibration.rank_accuracy] == [10] * num_heads
    assert calibration.tree is not None
    assert calibration.tree.max_depth <= num_heads
    assert calibration.lookup_tree is not None
    assert calibration.lookup_tree.head_depth <= num_heads
    # lookup is worth it
    assert sum(calibration.lookup_gains) > sum(calibration.node_acceptance)
    top1 = [head[0] for head in calibration.rank_accuracy]
    assert top1 == sorted(top1, reverse=True)


def _calibration(**changes: object) -> str:
    return json.dumps({"format": 1, "rank_accuracy": [[0.5, 0.2], [0.3, 0.1]], "num_tokens": 10, "source": "x"} | changes)


def test_calibrations_are_found_beside_a_file_and_in_a_folder(tmp_path: Path) -> None:
    heads = tmp_path / "heads.safetensors"
    heads.touch()
    assert find_calibration(heads) is None
    (tmp_path / "medusa_calibration.json").write_text(_calibration())
    assert find_calibration(tmp_path) == find_calibration(heads) == tmp_path / "medusa_calibration.json"
    (tmp_path / "heads.calibration.json").write_text(_calibration())
    assert find_calibration(heads) == tmp_path / "heads.calibration.json"


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", "{}", _calibration(format=2), _calibration(rank_accuracy=[]), _calibration(rank_accuracy=[[]]),
        _calibration(rank_accuracy=[[1.5]]), _calibration(rank_accuracy=[[0.9, 0.9]]), _calibration(rank_accuracy=[["x"]]),
        _calibration(tree=[[0]]), _calibration(tree=[[0]], node_acceptance=[]), _calibration(tree=[[0, 0]], node_acceptance=[0.5]),
        _calibration(tree=[[0], [0, 0]], node_acceptance=[0.2, 0.5]), _calibration(tree=[[0]], node_acceptance=[1.5]),
        _calibration(tree=[[0], [0, 0], [0, 0, 0]], node_acceptance=[0.5, 0.2, 0.1]),
        _calibration(tree=[[0], [1]], node_acceptance=[0.6, 0.5]),
        _calibration(tree=[[0], [0, 0], [0, 1]], node_acceptance=[0.6, 0.4, 0.3]),
        _calibration(tree=[[0], [-1]], node_acceptance=[0.5, 0.1]),
        _calibration(lookup_tree=[[0], [-1]]), _calibration(lookup_tree=[[0], [-1]], lookup_gains=[0.5]),
        _calibration(lookup_tree=[[0], [-1]], lookup_gains=[0.5, 1.5]), _calibration(lookup_tree=[[-1, -1]], lookup_gains=[0.5]),
        _calibration(lookup_tree=[[0], [0, 0], [0, 0, 0]], lookup_gains=[0.5, 0.4, 0.3]),
    ],
)  # fmt: skip
def test_malformed_calibrations_are_refused(tmp_path: Path, content) -> None:
    path = tmp_path / "a.calibration.json"
    path.write_text(content)
    with pytest.raises(ModelLoadError, match="calibration"):
        load_calibration(path)


def test_gains_may_grow_along_a_path(tmp_path: Path) -> None:
    """Where lookup has the first tokens as well as the heads."""
    path = tmp_path / "a.calibration.json"
    path.write_text(_calibration(lookup_tree=[[-1], [0], [0, 1], [-1, -1]], lookup_gains=[0.5, 0.1, 0.2, 0.3]))
    calibration = load_calibration(path)
    assert (calibration.tree, calibration.lookup_tree.lookup_depth) == (None, 2)
    assert calibration.lookup_gains == (0.5, 0.1, 0.2, 0.3)


@pytest.mark.parametrize("has_tree", [False, True])
def test_a_saved_calibration_is_read_back(tmp_path: Path, has_tree) -> None:
    heads = tmp_path / "heads.safetensors"
    heads.touch()
    # thirds round up to more than 1 in all
    accuracy = ((1 / 3, 1 / 3, 1 / 3), (2 / 3, 1 / 6, 1 / 6))
    tree = {"tree": TreeTopology(((0,), (0, 2))), "node_acceptance": (2 / 3, 1 / 3)} if has_tree else {}
    tree |= {"lookup_tree": TreeTopology(((0,), (-1,))), "lookup_gains": (2 / 3, 1 / 9)} if has_tree else {}
    saved = Calibration(rank_accuracy=accuracy, num_tokens=42, source="a test", **tree)
    save_calibration(saved, calibration_path(heads))
    read = load_calibration(find_calibration(heads))
    assert (read.num_tokens, read.source) == (saved.num_tokens, saved.source)
    assert (read.tree, read.lookup_tree) == (saved.tree, saved.lookup_tree)
    assert list(chain(*read.rank_accuracy, read.node_acceptance, read.lookup_gains)) == pytest.approx(
        list(chain(*accuracy, saved.node_acceptance, saved.lookup_gains)), abs=2e-5
    )


def test_a_calibration_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    saved = Calibration(rank_accuracy=((0.5,),), num_tokens=1, source="a test")
    with pytest.raises(ConfigError, match=r"calibration\.json cannot be written.*--output"):
        save_calibration(saved, tmp_path / "none" / "a.calibration.json")
