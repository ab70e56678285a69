"""A tiny model with heads, for servers that are started as programs."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from tests.engine.tiny_model import HIDDEN_SIZE, NUM_HEADS, heads_tensors, save_tiny_model


@pytest.fixture(scope="package")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Options of a server by field name: the tiny model in float32 on the CPU, under the name `tiny`, with long contexts."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    heads = tmp_path_factory.mktemp("heads")
    save_file(heads_tensors(HIDDEN_SIZE), heads / "medusa_lm_head.safetensors")
    (heads / "config.json").write_text(json.dumps({"medusa_num_heads": NUM_HEADS, "medusa_num_layers": 1}))
    return {
        "model": str(folder),
        "heads": str(heads),
        "dtype": "float32",
        "device": "cpu",
        "num_blocks": 4096,
        "served_model_name": ["tiny"],
    }
