"""A server that goes away between its WELCOME and the connection that it named: no client waits for that for ever."""

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

import lmcache_trio.client
from lmcache_trio import Unavailable, open_client
from lmcache_trio._transport import dial_pair, listen
from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import PROTOCOL_VERSION, Welcome
from lmcache_trio.adapters import SchedulerAdapter
from lmcache_trio.testing.sides import ServerProcess, wait_until


@pytest.fixture
async def welcoming() -> AsyncIterator[str]:
    """The address of a server whose welcomes name a socket behind which nobody speaks NNG's protocol."""
    front = listen("tcp://127.0.0.1:0")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        pair = f"tcp://127.0.0.1:{mute.getsockname()[1]}"

        async def welcome() -> None:
            while True:
                introduction = await front.accept()
                introduction.reply(encode(Welcome(PROTOCOL_VERSION, pair, b"boot", 256)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(welcome)
            yield front.address
            nursery.cancel_scope.cancel()
    front.close()


async def test_a_welcome_that_leads_nowhere_is_given_up(welcoming: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_trio.client, "TAKE_UP", 0.1)
    with trio.fail_after(5), pytest.raises(Unavailable, match="did not open"):
        async with open_client(welcoming):
            pass


def test_an_adapter_whose_server_was_killed_behind_its_welcome_finds_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ServerProcess(f"unix://{tmp_path}/s.sock")
    server.start()
    real, killed = dial_pair, list[str]()

    async def kill_first(address: str, **trusted: Any) -> object:
        if not killed:
            killed.append(address)
            server.kill()
        return await real(address, **trusted)

    monkeypatch.setattr(lmcache_trio.client, "TAKE_UP", 0.5)
    monkeypatch.setattr(lmcache_trio.client, "dial_pair", kill_first)
    adapter = SchedulerAdapter(server.address, engine_id="e", identity=["m"], block_tokens=4, connect_timeout=0.1)
    try:
        wait_until(lambda: bool(killed))
        server.start()
        wait_until(lambda: adapter._link.client is not None)
    finally:
        adapter.shutdown()
        server.kill()
