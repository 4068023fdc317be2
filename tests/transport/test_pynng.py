"""What only NNG can break, and rude peers of it. What it shares with unix sockets is in `test_processes`."""

import socket
from pathlib import Path

import pynng
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_trio import _transport
from lmcache_trio._transport import MAX_MESSAGE
from lmcache_trio.errors import Gone, LMCacheTrioError


@pytest.fixture
def near(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/s"


async def test_an_oversize_message_ends_its_own_connection_and_no_other(near: str) -> None:
    with trio.fail_after(60):
        healthy_listener, listener = _transport.listen_pair(near), _transport.listen_pair(near)
        healthy = await _transport.dial_pair(healthy_listener.address)
        beside = await healthy_listener.accept()
        with pynng.Pair0() as rude:
            rude.dial(listener.address, block=True)
            connection = await listener.accept()
            rude.send(bytes(MAX_MESSAGE + 1))
            await connection.wait_closed()
            with pytest.raises(Gone):
                await connection.receive()
        await healthy.send(b"well")
        assert await beside.receive() == b"well"
    for end in (connection, healthy, beside):
        end.close()


async def test_an_oversize_or_garbled_introduction_does_not_disturb_the_rendezvous(near: str) -> None:
    rendezvous = _transport.listen(near)
    with trio.fail_after(60), socket.socket(socket.AF_UNIX) as garbled, pynng.Req0() as rude:
        garbled.connect(near.removeprefix("ipc://"))
        garbled.send(b"GET / HTTP/1.1\r\n\r\n")
        rude.dial(near, block=True)
        rude.send(bytes(65_537))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_transport.introduce, near, b"hello")
            introduction = await rendezvous.accept()
            assert introduction.hello == b"hello"
            introduction.reply(b"")
    rendezvous.close()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64))
def test_raw_bytes_on_a_pairs_socket_end_at_most_themselves(tmp_path: Path, noise: bytes) -> None:
    async def main() -> None:
        listener = _transport.listen_pair(f"ipc://{tmp_path}/s")
        with trio.fail_after(60):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(listener.address.removeprefix("ipc://"))
                raw.send(noise)
            try:
                client = await _transport.dial_pair(listener.address)
                server = await listener.accept()
                await client.send(b"well")
                assert await server.receive() == b"well"
            except LMCacheTrioError:  # the noise was a whole handshake and took the place
                assert noise.startswith(b"\0SP\0")
            else:
                client.close()
                server.close()
            finally:
                listener.close()

    trio.run(main)
