"""One server process for the package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.server_process import Server, ServerSlot


@pytest.fixture(scope="package")
def slot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerSlot]:
    slot = ServerSlot(tmp_path_factory.mktemp("servers"))
    yield slot
    slot.clear()


@pytest.fixture
def server(slot: ServerSlot) -> Server:
    """A server on the demo model. Default options but one: where plain steps are faster, `auto` would leave the trees untested."""
    return slot.get("--tree-size", "8")
