"""A real server, and engines' sides that are closed whatever happened."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lmcache_trio.testing.sides import ServerProcess, Side


@pytest.fixture
def live_server(tmp_path: Path) -> Iterator[ServerProcess]:
    server = ServerProcess(f"unix://{tmp_path}/s.sock")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def sides() -> Iterator[Callable[..., Side]]:
    """Makes engines' sides."""
    with ExitStack() as stack:

        def make(*args: Any, **kwargs: Any) -> Side:
            side = Side(*args, **kwargs)
            stack.callback(side.close)
            return side

        yield make
