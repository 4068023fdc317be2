"""Addresses of every transport, and a pair of connected ends at each."""

from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio

from lmcache_trio import _transport
from lmcache_trio._transport import Connection


@attrs.frozen
class Ends:
    """Two connected ends."""

    server: Connection
    client: Connection


@pytest.fixture(params=["memory", "ipc", "tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a rendezvous can be opened; a TCP one takes any free port."""
    return {"memory": "memory://server", "ipc": f"ipc://{tmp_path}/s", "tcp": "tcp://127.0.0.1:0"}[request.param]


@pytest.fixture
async def ends(address: str) -> AsyncIterator[Ends]:
    listener = _transport.listen_pair(address)
    with trio.fail_after(5):
        client = await _transport.dial_pair(listener.address)
        server = await listener.accept()
    yield Ends(server, client)
    server.close()
    client.close()
