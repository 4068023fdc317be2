"""What one client may have at one time: beyond it, a request is refused by the limit's name, and counted."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import trio
from support.server import HeapConfig, Opener, Peer, Refusal, Rig, digests, error_of

from lmcache_trio._transport.unix import PACKET
from lmcache_trio._wire.messages import (
    Answer,
    Done,
    ErrorKind,
    Finished,
    Lookup,
    NamespaceKnown,
    Ping,
    Pinned,
    Pong,
    Retrieve,
)
from lmcache_trio.config import Config, Limits

FIRST, MORE = b"\1", b"\2"


def fingerprint(number: int) -> bytes:
    return hashlib.sha256(b"layout %d" % number).digest()


def raw(client: Peer) -> Any:
    """Its connection over a socket, for bytes that are no message."""
    return client.connection


def limits_hit(rig: Rig) -> dict[str, int]:
    found: dict[str, int] = rig.counted()["limits"]
    return {name: count for name, count in found.items() if count}


def test_the_defaults_leave_room_for_an_engine_of_a_thousand_long_requests() -> None:
    requests, chunks = 1000, 128_000 // 64
    limits = Limits()
    assert limits.sessions >= 2 * requests
    assert limits.digests >= requests * chunks * 1.5
    assert limits.pins >= 2 * requests
    assert limits.pushes >= 2 * requests


async def test_sessions_beyond_the_limit_are_refused_by_name_until_one_ends(
    rigs: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigs(limits=Limits(sessions=2)) as rig:
        (scheduler, _), (other, _) = await rig.engine(), await rig.engine("other")
        await scheduler.lookup(1, digests(1))
        await scheduler.lookup(2, digests(1))
        for session in (3, 4):
            error = error_of(await scheduler.ask(Lookup, session, 0, b"".join(digests(1)), 1))
            assert error.kind is ErrorKind.MISUSE
            assert "limits.sessions" in error.message
        await scheduler.lookup(2, digests(1, "another"))  # one that is open may ask again
        await other.lookup(1, digests(1))
        await scheduler.end(1)
        await scheduler.lookup(3, digests(1))
        assert limits_hit(rig) == {"sessions": 2}
        assert rig.held("sessions") == {"sessions": 3}
        assert [record.getMessage() for record in caplog.records if "limits.sessions" in record.getMessage()] == [
            error.message
        ]


async def test_clients_beyond_the_limit_are_refused_by_name_until_one_leaves(
    rigs: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigs(limits=Limits(clients=2)) as rig:
        scheduler, _ = await rig.engine()
        for _ in range(2):
            with pytest.raises(Refusal, match=r"limits\.clients"):
                await rig.observer()
        again = await rig.scheduler(token=scheduler.token)  # in its own place
        again.connection.close()
        await rig.until(connections=1, welcomes=0)
        await rig.observer()
        assert limits_hit(rig) == {"clients": 2}
        assert rig.counted()["refused"] == 2
        assert sum("limits.clients" in line for line in caplog.messages) == 2


async def test_without_a_limit_of_its_own_clients_are_as_many_as_file_descriptors_allow(
    rigs: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda what: (64 + 4 * 11, 4096))
    async with rigs(address=f"unix://{tmp_path}/s.sock") as rig:
        observers = [await rig.observer() for _ in range(11)]
        with pytest.raises(Refusal, match=r"limits\.clients; not set, it follows from the server's 108 file"):
            await rig.observer()
        observers.pop().connection.close()
        await rig.until(connections=10, welcomes=0)
        observers.append(await rig.observer())
        for observer in observers:
            observer.connection.close()
        await rig.until(connections=0)


async def test_digests_beyond_the_limit_are_refused_and_the_session_keeps_what_it_has(rigs: Opener) -> None:
    async with rigs(limits=Limits(digests=10)) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 9, digests(6))
        assert (await scheduler.lookup(1, digests(6))).chunks == 6
        for session, start in ((1, 6), (2, 0)):
            error = error_of(await scheduler.ask(Lookup, session, start, b"".join(digests(5, "more")), start + 5))
            assert (error.kind, "limits.digests" in error.message) == (ErrorKind.MISUSE, True)
        assert (await scheduler.get(Answer, Lookup, 1, 6, b"", 6)).chunks == 6
        await scheduler.lookup(2, digests(4, "more"))
        await scheduler.lookup(1, digests(1), start=3)  # cut to three, and one more
        await scheduler.lookup(2, digests(2, "yet more"), start=4)
        await scheduler.end(1)
        await scheduler.end(2)
        await scheduler.lookup(3, digests(10))
        assert limits_hit(rig) == {"digests": 2}


async def test_a_lookup_that_is_refused_for_another_reason_takes_nothing_of_the_limit(rigs: Opener) -> None:
    async with rigs(limits=Limits(digests=4)) as rig:
        scheduler, _ = await rig.engine()
        await scheduler.lookup(1, digests(2))
        error_of(await scheduler.ask(Lookup, 1, 2, b"".join(digests(1)), 9))
        error_of(await scheduler.ask(Lookup, 2, 0, b"".join(digests(1)), 9))
        await scheduler.lookup(1, digests(2), start=2)
        assert limits_hit(rig) == {}


async def test_reads_beyond_the_limits_are_refused_until_one_ends(rigs: Opener) -> None:
    async with rigs(limits=Limits(pins=3, digests=8)) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(4))
        lease = (await scheduler.lookup(2, digests(4))).lease
        pins = [(await worker.get(Pinned, Retrieve, lease, 0, 1)).pin for _ in range(3)]
        error = error_of(await worker.ask(Retrieve, lease, 0, 1))
        assert (error.kind, "limits.pins" in error.message) == (ErrorKind.MISUSE, True)
        assert (await worker.get(Finished, Done, pins[0])).valid
        await worker.get(Pinned, Retrieve, lease, 0, 4)
        await worker.get(Finished, Done, pins[1])
        assert "limits.digests" in error_of(await worker.ask(Retrieve, lease, 0, 4)).message
        assert rig.held("pins") == {"pins": 2}
        assert limits_hit(rig) == {"pins": 1, "digests": 1}


async def test_a_client_that_reads_no_pushes_is_ended_and_others_are_told_on(
    rigs: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigs(limits=Limits(pushes=50)) as rig:
        scheduler, worker = await rig.engine()
        number = 0
        while rig.held("connections")["connections"] == 2:
            number += 1
            assert number < 5000  # the transport itself takes some
            await worker.register(fingerprint(number % 2))
        await rig.until(connections=1, queued_messages=0)
        assert limits_hit(rig) == {"pushes": 1}
        assert sum("limits.pushes" in record.getMessage() for record in caplog.records) == 1
        await worker.get(Pong, Ping)
        scheduler = await rig.scheduler(token=scheduler.token)
        assert (await scheduler.pushed(NamespaceKnown)).namespace


# --- namespaces -------------------------------------------------------------------------------------------------------


async def test_a_layout_that_no_engine_uses_and_that_holds_nothing_is_forgotten(rig: Rig) -> None:
    _, worker = await rig.engine()
    for number in range(200):
        await worker.register(fingerprint(number))
    assert rig.held("namespaces") == {"namespaces": 1}
    worker.connection.close()
    await rig.until(namespaces=0)


async def test_a_layout_with_chunks_is_kept_for_an_engine_that_comes_back_and_goes_with_its_last_chunk(
    rigs: Opener,
) -> None:
    async with rigs(HeapConfig(size=(64 << 10) * 2 + 4096), lease_share=1.0, write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(2))
        await worker.register(fingerprint(1))
        assert rig.held("namespaces") == {"namespaces": 2}
        await worker.register()
        assert (await scheduler.lookup(2, digests(2))).chunks == 2
        await scheduler.end(2)
        await worker.register(fingerprint(1))
        await rig.stored(scheduler, worker, 3, digests(2))
        assert rig.held("namespaces") == {"namespaces": 1}
        assert rig.counted()["evictions"] == 2


async def test_of_layouts_that_no_engine_uses_the_one_left_longest_ago_goes_first(rigs: Opener) -> None:
    async with rigs(limits=Limits(namespaces=3)) as rig:
        scheduler, worker = await rig.engine()
        for number in range(6):
            await worker.register(fingerprint(number))
            await rig.stored(scheduler, worker, number, digests(2))
        await rig.until(namespaces=4, chunks_ready=8, chunks_stale=0)
        assert limits_hit(rig) == {"namespaces": 2}
        found = []
        for number in reversed(range(6)):
            await worker.register(fingerprint(number))
            found.append((await scheduler.lookup(100 + number, digests(2))).chunks)
        assert found == [2, 2, 2, 2, 0, 0]


async def test_a_layout_that_is_dropped_while_it_is_read_and_written_ends_both(rigs: Opener) -> None:
    async with rigs(limits=Limits(namespaces=1)) as rig:
        scheduler, worker = await rig.engine()
        before = rig.held("slots_quarantined", "bytes_free", "pins", "reservations")
        await worker.register(fingerprint(0))
        await rig.stored(scheduler, worker, 1, digests(2))
        pinned = await worker.get(Pinned, Retrieve, (await scheduler.lookup(2, digests(2))).lease, 0, 2)
        made = await worker.reserve(2, digests(1, "more"), parent=digests(2)[1])
        for number in (1, 2):
            await worker.register(fingerprint(number))
            await rig.stored(scheduler, worker, 10 + number, digests(1))
        await worker.register(fingerprint(3))
        assert (await worker.get(Finished, Done, pinned.pin)).valid is False
        assert await worker.commit(made.reservation) == 0
        await scheduler.end(2)
        await rig.until(chunks_stale=0, chunks_quarantined=0, namespaces=2)
        assert rig.held("slots_quarantined", "pins", "reservations") == {
            name: before[name] for name in ("slots_quarantined", "pins", "reservations")
        }


async def test_a_load_for_a_layout_that_no_engine_uses_any_more_gets_no_slot(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    known = [message.namespace for message in worker.pushes if isinstance(message, NamespaceKnown)]
    namespace = known[0] if known else await worker.register()
    index = rig.server._parts.index
    await rig.stored(scheduler, worker, 1, digests(1))
    assert index.reserve_load(namespace, digests(1)[0], digests(2)[1], 0.0) is not None
    worker.connection.close()
    await rig.until(connections=1)
    assert index.reserve_load(namespace, digests(2)[1], digests(3)[2], 0.0) is None


def test_limits_are_a_table_of_the_configuration() -> None:
    from lmcache_trio import load_config

    assert load_config(sets=["limits.sessions=5"], environ={}).limits == Limits(sessions=5)
    assert Config().limits == Limits()


# --- unfinished messages ----------------------------------------------------------------------------------------------


async def test_of_clients_that_do_not_end_their_messages_the_one_that_began_first_is_ended(
    rigs: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigs(address=f"unix://{tmp_path}/s.sock", limits=Limits(unfinished_bytes=4 << 20)) as rig:
        begun = [await rig.observer() for _ in range(4)]
        for client in begun[:3]:
            with trio.fail_after(60):
                for i in range(24):  # 1.5 MiB each
                    await raw(client)._put_soon((MORE if i else FIRST) + bytes(PACKET))
        assert await begun[0].gone() == []
        for client in begun[1:]:
            await client.get(Pong, Ping)
        assert limits_hit(rig) == {"unfinished_bytes": 1}
        assert sum("did not end it" in record.getMessage() for record in caplog.records) == 1
        begun[1].connection.close()
        await rig.until(connections=2)
        for i in range(24):  # the lost one's have left room for these
            await raw(begun[3])._put_soon((MORE if i else FIRST) + bytes(PACKET))
        await begun[3].get(Pong, Ping)
        await begun[2].get(Pong, Ping)
        assert limits_hit(rig) == {"unfinished_bytes": 1}
        for client in begun:
            client.connection.close()


async def test_a_packet_that_is_none_of_ours_is_counted_and_logged(
    rigs: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigs(address=f"unix://{tmp_path}/s.sock") as rig:
        client = await rig.observer()
        await raw(client)._put_soon(b"\x09what")
        assert await client.gone() == []
        await rig.until(connections=0)
        assert rig.counted()["protocol_errors"] == 1
        assert any("unknown kind or length" in record.getMessage() for record in caplog.records)
        client.connection.close()
