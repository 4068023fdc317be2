"""A server and a client of one user find each other without an address, whatever XDG_RUNTIME_DIR each has."""

import logging
import os
from pathlib import Path

import pytest
import trio
import trio.testing

from lmcache_trio import Config, Unavailable, open_client, open_server
from lmcache_trio.adapters import SchedulerAdapter
from lmcache_trio.client import wait_server
from lmcache_trio.config import default_address, default_addresses

MEMORY = {"backend": "cpu", "size": 1 << 20}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Ours, and where a server with another environment is: folders of the test's own."""
    found = (f"unix://{tmp_path}/ours/server.sock", f"unix://{tmp_path}/theirs/server.sock")
    monkeypatch.setattr("lmcache_trio.client.default_addresses", lambda: found)
    return found


def test_a_client_knows_where_a_server_with_another_environment_listens() -> None:
    with_login, without = default_addresses({"XDG_RUNTIME_DIR": "/run/user/7"}), default_addresses({})
    assert with_login[0] == default_address({"XDG_RUNTIME_DIR": "/run/user/7"})
    assert without[0] == default_address({})
    assert without[0] in with_login

    there = f"/run/user/{os.getuid()}"
    assert default_address({"XDG_RUNTIME_DIR": there}) in without


async def test_a_server_at_the_other_default_address_is_found(places: tuple[str, str]) -> None:
    async with open_server(Config(address=places[1], memory=MEMORY, grace=0.1)) as server:
        with trio.fail_after(5):
            await wait_server(places[0])
            async with open_client(places[0]) as client:
                assert await client.ping() == server.boot


async def test_a_server_that_starts_later_at_either_is_waited_for(places: tuple[str, str]) -> None:
    for address in places:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_server, places[0])
            await trio.testing.wait_all_tasks_blocked()
            async with open_server(Config(address=address, memory=MEMORY, grace=0.1)):
                with trio.fail_after(5):
                    while nursery.child_tasks:
                        await trio.lowlevel.checkpoint()


async def test_where_nobody_listens_both_are_named(places: tuple[str, str]) -> None:
    with pytest.raises(Unavailable) as caught:
        async with open_client(places[0]):
            pass
    assert all(place in str(caught.value) for place in places)


async def test_an_address_that_was_given_is_the_only_one(places: tuple[str, str]) -> None:
    async with open_server(Config(address=places[0], memory=MEMORY, grace=0.1)):
        with pytest.raises(Unavailable):
            async with open_client(places[1]):
                pass


def test_an_engine_is_told_both(places: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lmcache_trio"):
        adapter = SchedulerAdapter(
            places[0], engine_id="e", identity=["model"], block_tokens=16, connect_timeout=0.2, lookup_timeout=1.0
        )
        adapter.shutdown()
    (line,) = caplog.messages
    assert all(place in line for place in places)
