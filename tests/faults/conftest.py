"""A server in the test's loop, over real sockets, and client processes that are killed or stopped."""

from pathlib import Path

import pytest
from support.faults.scene import Scenes, open_scene


@pytest.fixture
def scheme() -> str:
    """Of the server's address; tests of what hangs on the transport set it."""
    return "unix"


@pytest.fixture
def scenes(tmp_path: Path, scheme: str) -> Scenes:
    """Opens servers, with settings of the test's own."""
    return lambda **settings: open_scene(f"{scheme}://{tmp_path}/s.sock", **settings)
