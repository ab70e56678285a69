"""Triton's interpreter, as these tests need it."""

import pytest

from tests import options


@pytest.fixture(scope="session", autouse=True)
def interpreter_counts_loops():
    """Loop bounds known to the device only: triton 3.6 converts them in a way that NumPy 2.4 no longer allows.

    The interpreter holds scalars as arrays of one element, and `int` of such an array is an error since NumPy 2.4.
    """
    if options.device != "cpu":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index
    yield
    interpreter._patch_lang_tensor = patch_tensor
