"""What only NNG can break, and rude peers of it. What it shares with unix sockets is in `test_processes`."""

import socket

import pynng
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_trio import _transport
from lmcache_trio._transport import MAX_MESSAGE, over_nng
from lmcache_trio.errors import Gone, LMCacheTrioError, Unavailable


@pytest.fixture
def near() -> str:
    return "tcp://127.0.0.1:0"


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


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
    with trio.fail_after(60), socket.socket() as garbled, pynng.Req0() as rude:
        garbled.connect(_host_and_port(rendezvous.address))
        garbled.send(b"GET / HTTP/1.1\r\n\r\n")
        rude.dial(rendezvous.address, block=True)
        rude.send(bytes(65_537))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_transport.introduce, rendezvous.address, b"hello")
            introduction = await rendezvous.accept()
            assert introduction.hello == b"hello"
            introduction.reply(b"")
    rendezvous.close()


@settings(max_examples=30)
@given(st.binary(max_size=64))
def test_raw_bytes_on_a_pairs_socket_end_at_most_themselves(noise: bytes) -> None:
    async def main() -> None:
        listener = _transport.listen_pair("tcp://127.0.0.1:0")
        with trio.fail_after(60):
            with socket.socket() as raw:
                raw.connect(_host_and_port(listener.address))
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


async def test_a_listener_that_does_not_speak_nngs_protocol_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(over_nng, "_HANDSHAKE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute, trio.fail_after(60):
        with pytest.raises(Unavailable, match="does not speak NNG"):
            await _transport.introduce(f"tcp://127.0.0.1:{mute.getsockname()[1]}", b"hello")
