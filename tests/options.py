"""Options of the test run, set by conftest.py before anything is collected."""

# where the engine, sampling and verification suites put their tensors: `pytest --device cuda`
device = "cpu"
