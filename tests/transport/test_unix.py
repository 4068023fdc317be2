"""Packets and parts of messages on unix sockets, and peers that keep to no rule."""

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from lmcache_trio import Config, open_client, open_server
from lmcache_trio._transport import MAX_MESSAGE
from lmcache_trio._transport.unix import PACKET, UnixLink
from lmcache_trio._wire.messages import Role
from lmcache_trio.errors import Gone, Misuse

WHOLE, FIRST, MORE, LAST = (bytes([kind]) for kind in range(4))
LARGE = 3 * MAX_MESSAGE // 4


@attrs.frozen
class Pair:
    """Two ends in one loop."""

    ours: UnixLink
    theirs: UnixLink


def raw_pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.setblocking(False)
    other.setblocking(False)
    return one, other


@asynccontextmanager
async def connected() -> AsyncIterator[Pair]:
    pair = Pair(*map(UnixLink, raw_pair()))
    with trio.fail_after(60):
        yield pair
    pair.ours.close()
    pair.theirs.close()


@asynccontextmanager
async def facing_raw() -> AsyncIterator[tuple[socket.socket, UnixLink]]:
    """A peer without manners, and our end."""
    raw, sock = raw_pair()
    link = UnixLink(sock)
    with raw, trio.fail_after(60):
        yield raw, link
    link.close()


# --- packets ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3 * PACKET + 2), min_size=1, max_size=6))
@example([PACKET - 1, PACKET, PACKET + 1, 2 * PACKET, 2 * PACKET + 1, 0])
@example([MAX_MESSAGE, MAX_MESSAGE - 1, 1])
def test_messages_of_any_sizes_arrive_whole_and_in_order(sizes: list[int]) -> None:
    messages = [os.urandom(size) for size in sizes]

    async def main() -> None:
        async with connected() as pair, trio.open_nursery() as nursery:

            async def send() -> None:
                for message in messages:
                    await pair.ours.send(message)

            nursery.start_soon(send)
            for message in messages:
                assert await pair.theirs.receive() == message

    trio.run(main)


@st.composite
def said(draw: Callable[..., Any]) -> tuple[list[bytes], list[bytes]]:
    """Packets that a peer may send, and the messages that they are."""
    packets, messages = [], []
    for _ in range(draw(st.integers(1, 4))):
        parts = draw(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5))
        for i, part in enumerate(parts):
            packets.append((MORE if i else FIRST) + part)
            for between in draw(st.lists(st.binary(max_size=20), max_size=2)):
                packets.append(WHOLE + between)
                messages.append(between)
        if draw(st.booleans()):  # else it was given up
            packets.append(LAST + b"end")
            messages.append(b"".join(parts) + b"end")
    return packets, messages


@settings(max_examples=100)
@given(said())
def test_whole_messages_come_between_the_parts_of_others_and_what_was_given_up_is_never_seen(
    spoken: tuple[list[bytes], list[bytes]],
) -> None:
    packets, messages = spoken

    async def main() -> None:
        async with facing_raw() as (raw, link):
            for packet in packets:
                raw.send(packet)
            assert [await link.receive() for _ in messages] == messages
            with pytest.raises(trio.WouldBlock):
                link.receive_nowait()

    trio.run(main)


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=8), max_size=8))
def test_any_packets_are_messages_or_the_end_of_that_connection(packets: list[bytes]) -> None:
    async def main() -> None:
        async with facing_raw() as (raw, link):
            for packet in packets:
                raw.send(packet)
            raw.shutdown(socket.SHUT_WR)
            with pytest.raises(Gone):
                while True:
                    await link.receive()

    trio.run(main)


@pytest.mark.parametrize(
    "packets",
    [
        *([b""], [b"\x04"], [b"\xffx"], [MORE + b"x"], [LAST + b"x"], [FIRST], [FIRST + b"x", MORE]),
        [FIRST + b"x", LAST],
        [FIRST + b"x", LAST + b"x", LAST + b"x"],
        [WHOLE + bytes(PACKET + 1)],
        [WHOLE + bytes(2 * PACKET)],
        [FIRST + b"x", *[MORE + b"x"] * 64],
    ],
)
async def test_what_is_no_part_of_a_message_ends_the_connection_on_both_sides(packets: list[bytes]) -> None:
    async with facing_raw() as (raw, link):
        link.send_nowait(b"before")
        for packet in packets:
            raw.send(packet)
        with pytest.raises(Gone):
            while True:
                await link.receive()
        if packets != [b""]:  # which looks as the end does
            await link.wait_closed()
            with pytest.raises(Gone):
                link.send_nowait(b"after")
            with contextlib.suppress(ConnectionResetError):
                assert raw.recv(100) == WHOLE + b"before"
            assert raw.recv(100) in (WHOLE + b"before", b"")


async def test_parts_that_never_end_are_bounded_and_do_not_hold_the_loop_up() -> None:
    async with facing_raw() as (raw, link):
        sent, ended = 0, False

        async def endless() -> None:
            nonlocal sent, ended
            kind = FIRST
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                while True:
                    try:
                        raw.send(kind + bytes(PACKET))
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(raw)
                    else:
                        sent += 1
                        kind = MORE
            ended = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(endless)
            with pytest.raises(Gone, match="ended"):
                await link.receive()
        assert ended
        assert sent < MAX_MESSAGE // PACKET + 10


async def test_parts_begun_anew_for_ever_leave_others_their_turn() -> None:
    async with facing_raw() as (raw, link):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for _ in range(30):
            raw.send(FIRST + b"x")
        with pytest.raises(trio.WouldBlock):
            link.receive_nowait()
        assert raw.send(FIRST + b"y")  # there is more than one look takes; what is left is still there
        raw.send(LAST + b"z")
        assert await link.receive() == b"yz"


async def test_a_large_message_is_for_send_and_never_taken_in_part() -> None:
    async with connected() as pair:
        with pytest.raises(trio.WouldBlock):
            pair.ours.send_nowait(bytes(PACKET + 1))
        pair.ours.send_nowait(bytes(PACKET))
        assert await pair.theirs.receive() == bytes(PACKET)
        with pytest.raises(trio.WouldBlock):
            pair.theirs.receive_nowait()
        with pytest.raises(Misuse):
            await pair.ours.send(bytes(MAX_MESSAGE + 1))


async def test_another_thread_sends_between_the_parts_of_a_large_message() -> None:
    async with connected() as pair:
        large = os.urandom(LARGE)

        def host() -> int:
            sent = 0
            while sent < 200:
                with contextlib.suppress(trio.WouldBlock):
                    pair.ours.send_nowait(b"%d" % sent)
                    sent += 1
            return sent

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.ours.send, large)
            nursery.start_soon(trio.to_thread.run_sync, host)
            got = [await pair.theirs.receive() for _ in range(201)]
        assert sorted(got, key=len)[-1] == large
        assert [message for message in got if message != large] == [b"%d" % i for i in range(200)]


async def test_a_large_send_that_was_cancelled_was_not_sent_and_the_next_arrives_intact() -> None:
    async with connected() as pair:
        with trio.move_on_after(0.05) as scope:
            await pair.ours.send(os.urandom(LARGE))
        assert scope.cancelled_caught
        large = os.urandom(LARGE)
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await pair.ours.send(large)
                await pair.ours.send(b"small")

            nursery.start_soon(send)
            assert await pair.theirs.receive() == large
            assert await pair.theirs.receive() == b"small"


async def test_a_peer_that_dies_in_the_middle_of_a_message_leaves_nothing_of_it() -> None:
    async with connected() as pair:
        await pair.ours.send(b"whole")
        with trio.move_on_after(0.05):
            await pair.ours.send(bytes(LARGE))
        pair.ours.close()
        assert await pair.theirs.receive() == b"whole"
        with pytest.raises(Gone):
            await pair.theirs.receive()


async def test_what_came_is_read_though_the_peer_left_something_unread() -> None:
    async with connected() as pair:
        pair.theirs.send_nowait(b"unread")
        pair.ours.send_nowait(b"1")
        pair.ours.send_nowait(b"2")
        pair.ours.close()  # the kernel tells of a reset first
        await pair.theirs.wait_closed()
        assert [await pair.theirs.receive(), await pair.theirs.receive()] == [b"1", b"2"]
        with pytest.raises(Gone):
            await pair.theirs.receive()


async def test_any_number_of_tasks_wait_for_the_end_and_a_cancelled_one_leaves_it_to_the_others() -> None:
    async with connected() as pair:
        ended = []

        async def wait(name: str) -> None:
            await pair.theirs.wait_closed()
            ended.append(name)

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as first:
                    first.start_soon(wait, "first")
                    await wait_all_tasks_blocked()
                    nursery.start_soon(wait, "second")
                    nursery.start_soon(wait, "third")
                    await wait_all_tasks_blocked()
                    scope.cancel()
            pair.ours.send_nowait(b"no end")
            await wait_all_tasks_blocked()
            assert ended == []
            pair.ours.close()
        assert sorted(ended) == ["second", "third"]


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM])
async def test_a_packet_that_the_kernel_does_not_take_ends_the_connection_on_both_sides(code: int) -> None:
    async with connected() as pair:
        fail_once(pair.ours, code)
        with pytest.raises(Gone, match="has ended"):
            await pair.ours.send(b"lost")
        with pytest.raises(Gone):
            await pair.ours.send(b"what follows must not arrive without it")
        await pair.ours.wait_closed()
        with pytest.raises(Gone):
            await pair.theirs.receive()


def fail_once(link: UnixLink, code: int) -> None:
    send = link._send

    def refuse(packet: Any, flags: int) -> int:
        link._send = send
        raise OSError(code, os.strerror(code))

    link._send = refuse  # type: ignore[assignment]


# --- a conversation ---------------------------------------------------------------------------------------------------


async def test_with_a_notice_that_was_lost_the_session_is_gone_at_the_server(tmp_path: Path) -> None:
    near = f"unix://{tmp_path}/s"
    config = Config(address=near, memory={"backend": "cpu", "size": 1 << 20}, grace=0.0)
    async with open_server(config) as server:
        async with open_client(near, role=Role.SCHEDULER, engine="e") as scheduler:
            with trio.fail_after(60):
                await scheduler.lookup(1, [b"d" * 32])
                assert server.statistics()["held"]["sessions"] == 1
                link = scheduler._connection
                assert isinstance(link, UnixLink)
                fail_once(link, errno.ENOBUFS)
                with contextlib.suppress(Gone):
                    scheduler.end(1)
                await scheduler.wait_closed()
        await wait_all_tasks_blocked()
        held = server.statistics()["held"]
        assert (held["sessions"], held["connections"]) == (0, 0)


async def test_large_messages_and_small_ones_keep_their_order_both_ways(tmp_path: Path) -> None:
    near = f"unix://{tmp_path}/s"
    config = Config(address=near, memory={"backend": "cpu", "size": 1 << 20}, grace=0.0)
    payloads = [bytes([i]) * (LARGE if i % 3 == 1 else 10) for i in range(9)]
    async with open_server(config), open_client(near) as client:
        back: list[bytes] = []
        all_back = trio.Event()

        def on_echo(frame: bytes) -> None:
            back.append(frame[1:])
            if len(back) == len(payloads):
                all_back.set()

        client.on_echo = on_echo
        for payload in payloads:
            client.echo_nowait(payload)
        with trio.fail_after(60):
            await all_back.wait()
            assert back == payloads
            await client.ping()
