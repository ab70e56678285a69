"""Shared options. Tests marked `cuda` are skipped where there is no CUDA device."""

import os

import pytest

from medusa_core.engine.environment import ENGINE_ENVIRONMENT
from tests import options

# before any test imports torch
for _name, _value in ENGINE_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="torch device of the engine, sampling and verification suites")


def pytest_configure(config):
    options.device = config.getoption("--device")
    if options.device == "cpu":
        # Kernel tests run in Triton's interpreter; triton reads this when a kernel is declared.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
