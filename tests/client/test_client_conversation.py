"""The client alone, against a scripted peer in the same loop: replies by id, pushes, losses and cancellations."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
import trio.testing

from lmcache_trio._transport import Connection, listen
from lmcache_trio._transport.memory import connection_pair
from lmcache_trio._wire.codec import decode, encode
from lmcache_trio._wire.messages import (
    PROTOCOL_VERSION,
    Abort,
    Ack,
    Answer,
    AnswerState,
    ArenaGrown,
    Done,
    Ended,
    ErrorKind,
    ErrorReply,
    Lookup,
    Message,
    NamespaceKnown,
    Ping,
    Pinned,
    Pong,
    Refused,
    Release,
    Reserve,
    Reserved,
    Retrieve,
    Welcome,
)
from lmcache_trio.client import Client, open_client, serve_connection
from lmcache_trio.errors import Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

WELCOME = Welcome(PROTOCOL_VERSION, "memory://x", b"boot", 256)


@attrs.frozen
class Peer:
    """The server's end, by hand."""

    connection: Connection

    async def hear(self) -> Message:
        with trio.fail_after(60):
            return decode(await self.connection.receive())

    async def say(self, message: Message) -> None:
        await self.connection.send(encode(message))


@asynccontextmanager
async def conversation(buffer: int | None = None) -> AsyncIterator[tuple[Client, Peer]]:
    near, far = connection_pair() if buffer is None else connection_pair(buffer=buffer)
    with trio.fail_after(60):
        async with serve_connection(near, WELCOME) as client:
            yield client, Peer(far)


async def test_replies_find_their_waiters_in_any_order() -> None:
    async with conversation() as (client, peer):
        boots: dict[str, bytes] = {}

        async def ping(name: str) -> None:
            boots[name] = await client.ping()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ping, "a")
            first = await peer.hear()
            nursery.start_soon(ping, "b")
            second = await peer.hear()
            assert isinstance(first, Ping)
            assert isinstance(second, Ping)
            await peer.say(Pong(second.id, b"second"))
            await peer.say(Pong(first.id, b"first"))
        assert boots == {"a": b"first", "b": b"second"}


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (ErrorKind.UNAVAILABLE, Unavailable),
        (ErrorKind.GONE, Gone),
        (ErrorKind.MISUSE, Misuse),
        (ErrorKind.PROTOCOL, ProtocolError),
    ],
)
async def test_an_error_reply_raises_its_branch_of_the_tree(kind: ErrorKind, error: type[LMCacheTrioError]) -> None:
    async with conversation() as (client, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_with, peer, ErrorReply(1, kind, "because"))
            with pytest.raises(error, match="because"):
                await client.ping()


async def answer_with(peer: Peer, reply: Message) -> None:
    heard = await peer.hear()
    await peer.say(attrs.evolve(reply, id=heard.id))  # type: ignore[attr-defined,misc]


async def test_a_reply_of_the_wrong_kind_is_the_servers_fault() -> None:
    async with conversation() as (client, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_with, peer, Ack(1))
            with pytest.raises(ProtocolError, match="Ack where Pong"):
                await client.ping()


async def test_after_a_reply_of_the_wrong_kind_nothing_is_believed_and_the_other_waiters_are_told_why() -> None:
    async with conversation() as (client, peer):
        told: list[object] = []
        for _ in range(2):
            client.request_nowait(Ping(client.new_id()), told.append)
        for said in (Ack(1), Pong(2, b"boot")):
            peer.connection.send_nowait(encode(said))
        with trio.fail_after(60):
            await peer.connection.wait_closed()
        wrong, other = told
        assert isinstance(wrong, ProtocolError)
        assert isinstance(other, Unavailable)
        assert "Ack where Pong" in str(other)


@pytest.mark.parametrize(
    "said",
    [
        *(Pong(7, b"boot"), ErrorReply(7, ErrorKind.GONE, "of what?"), NamespaceKnown(7, b"n")),
        *(Pong(0, b"boot"), Ack(0), ErrorReply(0, ErrorKind.PROTOCOL, "a last word")),
        *(Ping(1), Ended(1), WELCOME),
    ],
    ids=repr,
)
async def test_what_is_not_due_and_is_no_push_ends_the_connection_is_logged_and_passed_to_nobody(
    said: Message, caplog: pytest.LogCaptureFixture
) -> None:
    passed_on: list[Message] = []
    async with conversation() as (client, peer):
        client.on_push = passed_on.append
        await peer.say(said)
        with trio.fail_after(60):
            await client.wait_closed()
        with pytest.raises(Unavailable):
            await client.ping()
        assert not passed_on
        (record,) = caplog.records
        assert "the server" in record.getMessage()


async def test_a_request_is_answered_once_also_when_its_reply_was_forgotten() -> None:
    async with conversation() as (client, peer):
        told: list[object] = []
        client.request_nowait(Ping(client.new_id()), told.append)
        client.forget(1)
        await peer.say(Pong(1, b"boot"))
        await trio.testing.wait_all_tasks_blocked()
        assert not client.lost
        await peer.say(Pong(1, b"boot"))
        await trio.testing.wait_all_tasks_blocked()
        assert client.lost
        assert not told


async def test_a_lost_connection_raises_in_every_waiter_at_once() -> None:
    failures: list[str] = []

    async def ping(client: Client) -> None:
        try:
            await client.ping()
        except Unavailable:
            failures.append("ping")

    async def lookup(client: Client) -> None:
        try:
            await client.lookup(1, [bytes(32)])
        except Unavailable:
            failures.append("lookup")

    async with conversation() as (client, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ping, client)
            nursery.start_soon(lookup, client)
            for _ in range(2):
                heard = await peer.hear()
                if isinstance(heard, Lookup):
                    await peer.say(Answer(heard.id, 1, heard.id, AnswerState.PENDING))
            peer.connection.close()
            await client.wait_closed()
        assert sorted(failures) == ["lookup", "ping"]
        with pytest.raises(Unavailable):
            await client.ping()
        client.end(1)  # no error: a server that is gone has forgotten it
        assert not client._waiters


async def test_bytes_that_are_no_message_end_the_connection() -> None:
    async with conversation() as (client, peer):
        await peer.connection.send(b"\xffgarbage")
        await client.wait_closed()
        with pytest.raises(Unavailable):
            await client.ping()


async def test_a_pending_lookup_waits_for_its_push_and_for_no_other() -> None:
    async with conversation() as (client, peer):
        async with trio.open_nursery() as nursery:

            async def server() -> None:
                ask = await peer.hear()
                assert isinstance(ask, Lookup)
                await peer.say(Answer(ask.id, 7, ask.id, AnswerState.PENDING))
                await peer.say(Answer(0, 7, ask.id + 100, AnswerState.ANSWERED, 9, b"other"))
                await peer.say(Answer(0, 7, ask.id, AnswerState.ANSWERED, 2, b"lease"))

            nursery.start_soon(server)
            answer = await client.lookup(7, [bytes(32)] * 3)
        assert (answer.chunks, answer.lease) == (2, b"lease")
        assert not client._answers


async def test_a_cancelled_lookup_is_released_and_forgotten() -> None:
    async with conversation() as (client, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.lookup, 7, [bytes(32)])
            assert isinstance(await peer.hear(), Lookup)
            nursery.cancel_scope.cancel()
        assert await peer.hear() == Release(7)
        assert not client._answers


async def test_what_comes_for_a_cancelled_reserve_is_aborted() -> None:
    async with conversation() as (client, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.reserve, 7, b"", [bytes(32)])
            asked = await peer.hear()
            nursery.cancel_scope.cancel()
        assert isinstance(asked, Reserve)
        await peer.say(Reserved(asked.id, b"r", bytes(4), bytes(8)))
        abort = await peer.hear()
        assert isinstance(abort, Abort)
        assert abort.reservation == b"r"
        await peer.say(Ack(abort.id))
        await trio.testing.wait_all_tasks_blocked()
        assert not client._waiters


async def test_what_comes_for_a_cancelled_retrieve_is_let_go() -> None:
    async with conversation() as (client, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.retrieve, b"lease", 0, 1)
            asked = await peer.hear()
            nursery.cancel_scope.cancel()
        assert isinstance(asked, Retrieve)
        await peer.say(Pinned(asked.id, b"pin", bytes(8)))
        done = await peer.hear()
        assert isinstance(done, Done)
        assert done.pin == b"pin"


async def test_pushes_are_known_to_the_client_and_passed_on() -> None:
    pushes: list[Message] = []
    async with conversation() as (client, peer):
        client.on_push = pushes.append
        await peer.say(ArenaGrown(8192))
        await peer.say(NamespaceKnown(0, b"n" * 32))
        await trio.testing.wait_all_tasks_blocked()
        assert pushes == [ArenaGrown(8192), NamespaceKnown(0, b"n" * 32)]
        assert (client.taken, client.namespace) == (8192, b"n" * 32)


async def test_order_is_kept_when_the_socket_has_no_room() -> None:
    async with conversation(buffer=2) as (client, peer):
        for session in range(20):
            client.end(session)
        assert [await peer.hear() for _ in range(20)] == [Ended(session) for session in range(20)]


async def test_a_server_that_does_not_read_is_refused_requests_and_sent_all_notices() -> None:
    async with conversation(buffer=1) as (client, peer):
        for session in range(2000):
            client.end(session)
        with pytest.raises(Unavailable, match="does not read"):
            await client.ping()
        assert not client._due
        assert not client._waiters
        assert [await peer.hear() for _ in range(2000)] == [Ended(session) for session in range(2000)]


async def test_an_exception_in_the_body_comes_out_as_itself() -> None:
    with pytest.raises(KeyError):
        async with conversation():
            raise KeyError("mine")


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (encode(attrs.evolve(WELCOME, version=99)), ProtocolError, r"version 99 .* this client \d+: install the same"),
        (encode(Pong(1, b"boot")), ProtocolError, "Pong came where Welcome or Refused was expected"),
        (b"\xffgarbage", ProtocolError, "opcode 255"),
        (encode(Refused(ErrorKind.PROTOCOL, "another version")), ProtocolError, "refused: another version"),
        (encode(Refused(ErrorKind.MISUSE, "no engine")), Misuse, "refused: no engine"),
        (encode(Refused(ErrorKind.UNAVAILABLE, "full")), Unavailable, "refused: full"),
    ],
)
async def test_an_answer_at_the_door_that_lets_nobody_in_raises_with_the_servers_address(
    answer: bytes, error: type[LMCacheTrioError], words: str
) -> None:
    door = listen("memory://door")

    async def turn_away() -> None:
        (await door.accept()).reply(answer)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turn_away)
            with pytest.raises(error, match=f"the server at memory://door.*{words}"):
                async with open_client("memory://door"):
                    raise AssertionError("it was let in")
    door.close()
