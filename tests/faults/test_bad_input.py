"""Bad input over real sockets: it gets an ERROR reply or ends that one connection; a healthy client notices nothing."""

import contextlib
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
from support.faults import client_process
from support.faults.scene import Scenes

from lmcache_trio import Role
from lmcache_trio._transport import MAX_MESSAGE, Connection, dial_pair, introduce
from lmcache_trio._transport.unix import PACKET
from lmcache_trio._wire.codec import decode, encode
from lmcache_trio._wire.messages import (
    PROTOCOL_VERSION,
    Abort,
    Ack,
    Commit,
    Committed,
    CopiesEnded,
    Done,
    ErrorKind,
    ErrorReply,
    Finished,
    Hello,
    Lookup,
    LookupStatus,
    Message,
    Ping,
    Pong,
    Refused,
    Register,
    Reserve,
    Reset,
    Retrieve,
    Welcome,
)
from lmcache_trio.errors import Gone, Misuse


async def come_in(address: str, role: Role) -> Connection:
    welcome = decode(
        await introduce(address, encode(Hello(PROTOCOL_VERSION, "bad", random.randbytes(16), role, "bad")))
    )
    assert isinstance(welcome, Welcome)
    return await dial_pair(welcome.address)


async def last_words(connection: Connection) -> list[Message]:
    """What the server says until it ends the connection."""
    said: list[Message] = []
    with trio.fail_after(60):
        while True:
            try:
                message = decode(await connection.receive())
            except Gone:
                return said
            if not isinstance(message, Pong):
                said.append(message)


async def healthy_round(scheduler: Any, worker: Any, session: int) -> None:
    """A whole store, lookup and retrieve beside it."""
    digests = [session.to_bytes(2) * 16]
    assert await client_process.store(scheduler, worker, session, digests, b"h") == 1
    answer = await scheduler.lookup(session, digests)
    async with worker.retrieving(answer.lease, 0, 1) as chunks:
        assert bytes(chunks[0]) == b"h" * client_process.SHARD
    scheduler.end(session)


_chance = random.Random(7)
ENDING = {
    "an empty frame": b"",
    "an unknown opcode": b"\x7f",
    **{f"random bytes {i}": b"\xff" + _chance.randbytes(_chance.randrange(1, 400)) for i in range(8)},
    **{
        f"random bytes behind opcode {code}": bytes([code]) + _chance.randbytes(40) for code in (16, 18, 19, 21, 23, 41)
    },
    "half a request": encode(Lookup(1, 1, 0, bytes(64), 2))[:-7],
    "more than a request": encode(Ping(1)) + b"more",
    "a length beyond the frame": bytes([19]) + b"\xdd\xff\xff\xff\xff",
    "a hello once more": encode(Hello(PROTOCOL_VERSION, "x", b"t" * 16, Role.WORKER, "bad")),
    "a reply that only a server says": encode(Pong(1, b"boot")),
    "an error that only a server says": encode(ErrorReply(1, ErrorKind.GONE, "no")),
    "a digest of 31 bytes": bytes([19]) + encode(Lookup(1, 1, 0, bytes(32), 1))[1:].replace(bytes(32), bytes(31)),
}


@pytest.mark.parametrize("role", [Role.SCHEDULER, Role.WORKER])
async def test_what_is_no_sentence_or_out_of_place_ends_that_one_connection(
    scenes: Scenes, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_trio._server.connection.LAST_WORD", 0.02)
    async with scenes() as scene, client_process.engine(scene.server.address, "healthy") as (scheduler, worker):
        for session, (what, frame) in enumerate(ENDING.items(), 1):
            bad = await come_in(scene.server.address, role)
            await bad.send(encode(Ping(9)))
            await bad.send(frame)
            said = await last_words(bad)
            assert [getattr(message, "kind", None) for message in said] == [ErrorKind.PROTOCOL], what
            bad.close()
            await healthy_round(scheduler, worker, session)
            await scene.until(lambda held: held["connections"] == 2)
        assert scene.server.statistics()["counted"]["protocol_errors"] == len(ENDING)
        assert scene.held()["engines"] == 1


def rude_over_unix(address: str) -> Callable[[], None]:
    """Take up *address*; then say a message that is too large, in as many parts as are taken."""
    rude = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    rude.connect(address.removeprefix("unix://"))

    def say() -> None:
        with rude, contextlib.suppress(OSError):
            for i in range(MAX_MESSAGE // PACKET + 1):
                rude.send(bytes([2 if i else 1]) + bytes(PACKET))

    return say


async def test_a_message_that_is_too_large_ends_that_one_connection(scenes: Scenes) -> None:
    async with scenes() as scene, client_process.engine(scene.server.address, "healthy") as (scheduler, worker):
        hello = Hello(PROTOCOL_VERSION, "bad", random.randbytes(16), Role.OBSERVER, "")
        welcome = decode(await introduce(scene.server.address, encode(hello)))
        assert isinstance(welcome, Welcome)
        say = rude_over_unix(welcome.address)
        await scene.until(lambda held: held["connections"] == 3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, say)
            await healthy_round(scheduler, worker, 1)
            await scene.until(lambda held: held["connections"] == 2)
        await healthy_round(scheduler, worker, 2)


REFUSED = [
    *(Register(5, b"f" * 32, 4096, 16), Retrieve(5, b"l" * 16, 0, 1), Done(5, b"p" * 16), Commit(5, b"r" * 16)),
    *(Reserve(5, 1, b"", bytes(32)), Abort(5, b"r" * 16), CopiesEnded(5, b"t" * 16)),
]


async def test_what_is_not_for_a_role_to_say_gets_an_error_and_the_connection_goes_on(scenes: Scenes) -> None:
    said_by_workers = [Lookup(5, 1, 0, bytes(32), 1), LookupStatus(5, 1), Reset(5)]
    async with scenes() as scene, client_process.engine(scene.server.address, "healthy") as (scheduler, worker):
        for role, requests in ((Role.SCHEDULER, REFUSED), (Role.WORKER, said_by_workers)):
            bad = await come_in(scene.server.address, role)
            for request in requests:
                await bad.send(encode(request))
                reply = decode(await bad.receive())
                assert isinstance(reply, ErrorReply), request
                assert (reply.id, reply.kind) == (5, ErrorKind.MISUSE)
            await bad.send(encode(Ping(6)))
            assert isinstance(decode(await bad.receive()), Pong)
            bad.close()
            await healthy_round(scheduler, worker, int(role is Role.WORKER) + 1)


async def test_unknown_ids_and_the_same_id_twice_get_replies_and_the_connection_goes_on(scenes: Scenes) -> None:
    async with scenes() as scene, client_process.engine(scene.server.address, "healthy") as (scheduler, worker):
        bad = await come_in(scene.server.address, Role.WORKER)
        for request, reply, kind in (
            (Retrieve(5, b"l" * 16, 0, 1), ErrorReply, ErrorKind.GONE),
            (Commit(5, b"r" * 16), ErrorReply, ErrorKind.GONE),
            (CopiesEnded(5, b"t" * 16), ErrorReply, ErrorKind.MISUSE),
            (Abort(5, b"r" * 16), Ack, None),
            (Done(5, b"p" * 16), Finished, None),
        ):
            await bad.send(encode(request))
            said = decode(await bad.receive())
            assert isinstance(said, reply), request
            assert getattr(said, "kind", None) is kind
        for _ in range(2):
            await bad.send(encode(Ping(6)))
        for _ in range(2):  # a server keeps no list of ids: it answers what it is asked
            assert decode(await bad.receive()) == Pong(6, scene.server.boot)
        assert not isinstance(said, Committed)
        bad.close()
        await healthy_round(scheduler, worker, 1)


@pytest.mark.parametrize(
    ("hello", "word"),
    [
        (Hello(99, "bad", b"t" * 16, Role.WORKER, "e"), "version"),
        (Hello(PROTOCOL_VERSION, "bad", b"short", Role.WORKER, "e"), "token"),
        (Hello(PROTOCOL_VERSION, "bad", b"t" * 16, Role.WORKER, ""), "engine"),
        (Hello(PROTOCOL_VERSION, "bad", b"t" * 16, Role.WORKER, "e", 2, 2), "shard"),
        (Hello(PROTOCOL_VERSION, "bad", b"t" * 16, Role.SCHEDULER, "healthy"), "has a scheduler"),
        (Ping(1), "Hello"),
    ],
)
async def test_a_hello_that_is_out_of_order_is_refused_in_words(scenes: Scenes, hello: Message, word: str) -> None:
    async with scenes() as scene, client_process.engine(scene.server.address, "healthy") as (scheduler, worker):
        refused = decode(await introduce(scene.server.address, encode(hello)))
        assert isinstance(refused, Refused)
        assert word in refused.reason
        await healthy_round(scheduler, worker, 1)
        assert scene.held()["connections"] == 2


async def test_our_own_client_refuses_to_say_what_is_too_large(scenes: Scenes) -> None:
    async with scenes() as scene, client_process.engine(scene.server.address, "healthy") as (_, worker):
        with pytest.raises(Misuse, match="larger than"):
            worker._connection.send_nowait(bytes(MAX_MESSAGE + 1))
        await worker.ping()
