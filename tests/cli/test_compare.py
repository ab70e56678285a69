"""Where two outputs differ, and whether that was a near-tie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medusa_core.cli.compare import TOLERANCE_UNITS, Rescore, first_difference, rescore
from medusa_core.config import DtypeName, ModelConfig
from medusa_core.model.loader import load_model
from medusa_core.params import SamplingParams
from medusa_core.sampling.noise import gumbel
from medusa_core.scheduler.noise import noise_key
from tests.engine.tiny_model import save_tiny_model

PROMPT = [5, 9, 33, 70]
GREEDY = SamplingParams(temperature=0.0)


@pytest.mark.parametrize(
    ("left", "right", "index"),
    [
        ([], [], None),
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([4, 2], [1, 2], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1], 1),
        ([], [7], 0),
    ],
)
def test_first_difference(left, right, index):
    assert first_difference(left, right) == index


def test_a_near_tie_is_within_the_tolerance():
    assert Rescore(3, (1, 2), gap=0.5, tolerance=0.5).is_near_tie
    assert not Rescore(3, (1, 2), gap=0.5001, tolerance=0.5).is_near_tie
    assert not Rescore(3, (1, 2), gap=float("nan"), tolerance=0.5).is_near_tie


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("compare") / "tiny")


def config(folder: Path, dtype: DtypeName = "bfloat16") -> ModelConfig:
    return ModelConfig(model=str(folder), dtype=dtype, device="cpu")


def ranked(folder: Path, tokens: list[int], dtype: DtypeName = "bfloat16") -> tuple[list[int], torch.Tensor]:
    """Token ids by falling logit behind `tokens`, and the float32 logits, from the weights as they are in `dtype`."""
    model = load_model(config(folder, dtype), progress=False).model.float()
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits.argsort(descending=True).tolist(), logits


def test_a_wrong_token_is_no_near_tie(folder):
    best, logits = ranked(folder, PROMPT)
    score = rescore(config(folder), PROMPT, GREEDY, [best[200]], [best[0]], 0)
    assert (score.index, score.tokens) == (0, (best[200], best[0]))
    assert score.gap == pytest.approx(float(logits[best[0]] - logits[best[200]]), rel=1e-4)
    assert not score.is_near_tie


def test_tokens_before_the_difference_count(folder):
    output = [8, 60, 12]
    best, logits = ranked(folder, [*PROMPT, *output[:2]])
    score = rescore(config(folder), PROMPT, GREEDY, [*output[:2], best[1]], [*output[:2], best[0]], 2)
    assert score.gap == pytest.approx(float(logits[best[0]] - logits[best[1]]), rel=1e-3)
    assert score.tolerance == pytest.approx(TOLERANCE_UNITS * 2**-7 * float(logits.abs().max()), rel=1e-4)


def test_twins_are_a_near_tie(tmp_path):
    """Two tokens with the same row in lm_head have the same logit."""
    folder = save_tiny_model(tmp_path / "twins")
    model = load_model(config(folder, "float32"), progress=False).model
    model.lm_head.weight[41] = model.lm_head.weight[40]
    model.save_pretrained(folder)
    score = rescore(config(folder), PROMPT, GREEDY, [41], [40], 0)
    assert (score.gap, score.is_near_tie) == (0.0, True)


def test_the_tolerance_is_tiny_in_float32(folder):
    best, _ = ranked(folder, PROMPT, "float32")
    wide, narrow = (rescore(config(folder, dtype), PROMPT, GREEDY, [best[1]], [best[0]], 0) for dtype in ("bfloat16", "float32"))
    assert narrow.tolerance < wide.tolerance / 10_000
    assert not narrow.is_near_tie


@pytest.mark.parametrize("seed", [1, 2**63 - 1, -5])
def test_sampled_scores_include_temperature_and_noise(folder, seed):
    params = SamplingParams(temperature=0.5, seed=seed)
    _, logits = ranked(folder, [*PROMPT, 8])
    key = noise_key(seed, 0)
    key_1 = torch.tensor([key - 2**64 if key >= 2**63 else key])
    scores = logits / 0.5 + gumbel(key_1, torch.tensor([1]), torch.arange(len(logits), dtype=torch.int32))[0]
    best, second = scores.topk(2).indices.tolist()
    score = rescore(config(folder), PROMPT, params, [8, second], [8, best], 1)
    assert score.gap == pytest.approx(float(scores[best] - scores[second]), rel=1e-3)
    assert score.tolerance == pytest.approx(2 * TOLERANCE_UNITS * 2**-7 * float(logits.abs().max()), rel=1e-4)
