"""Devices and dtypes behind "auto"."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medusa_core.errors import ConfigError
from medusa_core.model.device import choose_device, choose_dtype, has_fast_cpu_bf16


def test_a_named_dtype_is_taken_as_it_is() -> None:
    assert choose_dtype("float16", torch.device("cpu")) is torch.float16


def test_auto_on_a_cpu_is_bfloat16_or_float32() -> None:
    assert choose_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("", False),
    ],
)
def test_cpu_features_decide(tmp_path: Path, cpuinfo, expected) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert has_fast_cpu_bf16(path) is expected


def test_without_a_feature_list_bfloat16_is_not_assumed(tmp_path: Path) -> None:
    assert has_fast_cpu_bf16(tmp_path / "missing") is False


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cuda:x"])
def test_devices_that_do_not_exist_are_refused(name) -> None:
    with pytest.raises(ConfigError, match="device"):
        choose_device(name)
