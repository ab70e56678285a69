"""Options that contradict each other, the heads or the machine are refused by name, not ignored."""

from __future__ import annotations

import json

import pytest

from medusa_core.config import CacheConfig, EngineConfig, ModelConfig, SpeculationConfig
from medusa_core.engine.build import assemble_engine, build_engine
from medusa_core.errors import ConfigError, ModelLoadError
from tests.equivalence.models import VOCAB_SIZE, oracle_heads, tiny_model


def config(**speculation: object) -> EngineConfig:
    return EngineConfig(model=ModelConfig(model="/nowhere", heads="none"), speculation=SpeculationConfig(**speculation))


def test_a_tree_without_heads_is_refused_before_the_model_is_looked_for():
    with pytest.raises(ConfigError, match="tree is 'chain-3', but heads is \"none\""):
        build_engine(config(tree="chain-3"), progress=False)


def test_a_tree_size_without_heads_and_lookup_is_refused_too():
    with pytest.raises(ConfigError, match='tree_size is 8, but heads is "none"'):
        build_engine(config(tree_size=8, prompt_lookup=False), progress=False)


@pytest.mark.parametrize("options", [{}, {"tree_size": 1}, {"tree_size": 8}, {"enabled": False, "tree": "chain-3", "tree_size": 4}])
def test_plain_decoding_needs_no_heads(options):
    with pytest.raises(ModelLoadError, match="/nowhere"):
        build_engine(config(**options), progress=False)


def test_a_rank_beyond_the_vocabulary_is_refused(tmp_path):
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps([[0], [VOCAB_SIZE]]))
    loaded = tiny_model("llama")
    with pytest.raises(ConfigError, match=f"rank {VOCAB_SIZE}, but the heads choose among {VOCAB_SIZE} tokens"):
        assemble_engine(EngineConfig(speculation=SpeculationConfig(tree=str(tree))), loaded, oracle_heads(loaded, [[1, 2, 3]]))


def test_a_cache_that_no_machine_can_hold_is_refused():
    with pytest.raises(ConfigError, match=r"1000000000000 blocks .* cannot be allocated\. Lower"):
        assemble_engine(EngineConfig(cache=CacheConfig(num_blocks=10**12)), tiny_model("llama"), None)
