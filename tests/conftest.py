"""Shared options. Tests marked `cuda` are skipped where there is no CUDA device."""

import importlib
import os
import sys

import pytest

from medusa_core.engine.environment import ENGINE_ENVIRONMENT
from tests import options

# before any test imports torch
for _name, _value in ENGINE_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# On a CPU, kernels run in Triton's interpreter. Triton reads this when it is imported, which is before options are parsed; the
# workers of pytest-xdist are not given the arguments, but inherit what the first process decided.
if "PYTEST_XDIST_WORKER" not in os.environ and not any(argument.startswith("--device") for argument in sys.argv):
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="torch device of the engine, sampling and verification suites")


def pytest_configure(config):
    options.device = config.getoption("--device")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def interpreter_counts_loops():
    """Loop bounds known to the device only: triton 3.6 converts them in a way that NumPy 2.4 no longer allows.

    The interpreter holds scalars as arrays of one element, and `int` of such an array is an error since NumPy 2.4.
    """
    if options.device != "cpu":
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index
    yield
    interpreter._patch_lang_tensor = patch_tensor
