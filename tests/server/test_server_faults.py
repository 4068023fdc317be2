"""Bad input, bugs, deaf clients, and the end of a server: each failure ends in its own scope."""

import contextlib
import struct
from typing import Any

import pytest
import trio
import trio.testing
from support.server import Opener, Rig, digests, error_of

from lmcache_trio import Unavailable, open_client
from lmcache_trio._server.answers import answer_of
from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import (
    PROTOCOL_VERSION,
    Answer,
    AnswerState,
    Commit,
    Committed,
    Done,
    Ended,
    ErrorKind,
    Hello,
    LookupStatus,
    Ping,
    Pong,
    Release,
    Role,
    Taken,
)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x7f",
        b"\xff" * 9,
        encode(Ping(1))[:-1],
        encode(Ping(1)) + b"more",
        encode(Hello(PROTOCOL_VERSION, "x", b"t" * 16, Role.WORKER, "e")),
        encode(Pong(1, b"b")),
        struct.pack("B", 19) + b"\xdd\xff\xff\xff\xff",
    ],
)
async def test_bytes_that_are_no_request_end_that_one_connection_and_a_neighbour_notices_nothing(
    rig: Rig, frame: bytes
) -> None:
    scheduler, worker = await rig.engine()
    bad = await rig.worker("bad")
    await scheduler.lookup(1, digests(1))
    made = await worker.reserve(1, digests(1))
    await bad.connection.send(frame)
    said = await bad.gone()
    assert [getattr(message, "kind", None) for message in said] == [ErrorKind.PROTOCOL]
    await rig.until(connections=2)
    assert await worker.commit(made.reservation) == 1
    assert (await scheduler.lookup(2, digests(1))).chunks == 1
    assert rig.counted()["protocol_errors"] == 1


async def test_a_bug_in_one_handler_is_answered_counted_and_logged_and_ends_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, worker = await rig.engine()

    def broken(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(type(rig.server._parts.index), "unpin", broken)
    error = error_of(await worker.ask(Done, b"p"))
    assert error.kind is ErrorKind.UNAVAILABLE
    assert "a bug" in error.message
    assert rig.counted()["handler_bugs"] == 1
    assert [record.exc_info is not None for record in caplog.records] == [True]
    await worker.get(Pong, Ping)
    await scheduler.get(Pong, Ping)


async def test_a_client_that_reads_nothing_is_read_no_further_and_slows_no_other(rig: Rig) -> None:
    deaf, other = await rig.observer(), await rig.observer()
    sent = 0
    for _ in range(2):  # until there is no room, and it is not made either
        with contextlib.suppress(trio.WouldBlock):
            while True:
                deaf.connection.send_nowait(encode(Ping(sent + 1)))
                sent += 1
        await trio.testing.wait_all_tasks_blocked()
    assert 200 < sent < 2000
    assert rig.held("queued_messages")["queued_messages"] <= 2
    await other.get(Pong, Ping)
    for number in range(1, sent + 1):
        assert (await deaf.reply(number)) == Pong(number, rig.server.boot)


# --- the end --------------------------------------------------------------------------------------------------------


async def test_leaving_waits_for_copies_under_way_and_gives_out_nothing_more(rigs: Opener) -> None:
    async with trio.open_nursery() as nursery:
        stop, stopped = trio.Event(), trio.Event()
        rig: Any = None

        async def serve(task_status: trio.TaskStatus[Any]) -> None:
            async with rigs(grace=60.0) as made:
                task_status.started(made)
                await stop.wait()
            stopped.set()

        rig = await nursery.start(serve)
        scheduler, worker = await rig.engine()
        await scheduler.lookup(1, digests(2))
        made = await worker.reserve(1, digests(2))
        stop.set()
        await trio.testing.wait_all_tasks_blocked()
        assert not stopped.is_set()
        assert (await worker.reserve(1, digests(2, "more"))).dropped == {"stopping": 2}
        # An engine that starts meanwhile must wait for the next server, and not take it for a wrong setting
        with pytest.raises(Unavailable, match="the server is stopping"):
            async with open_client(rig.server.address):
                pass
        assert (await worker.get(Committed, Commit, made.reservation)).published == 2
        with trio.fail_after(60):
            await stopped.wait()
        await worker.gone()


async def test_a_copy_that_does_not_end_holds_the_end_up_for_the_grace_only(
    rigs: Opener, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigs(grace=7.0) as rig:
        scheduler, worker = await rig.engine()
        await scheduler.lookup(1, digests(2))
        assert (await worker.reserve(1, digests(2))).reservation
        start = trio.current_time()
    assert trio.current_time() - start == pytest.approx(7.0)
    assert caplog.messages == ["the grace is over: copies of clients were cut off"]
    await worker.gone()


async def test_ended_for_a_session_that_is_not_there_is_let_pass(rig: Rig) -> None:
    scheduler = await rig.scheduler()
    await scheduler.tell(Ended(77))
    await scheduler.tell(Release(77))
    await scheduler.tell(Taken(77, b"x" * 16))
    await scheduler.get(Pong, Ping)


# --- where tiers come in ----------------------------------------------------------------------------------------------


async def test_a_lookup_that_a_tier_takes_on_is_pending_until_it_is_pushed_and_cancelled_when_it_is_not_wanted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, _ = await rig.engine()
    answers, sessions, cancelled = rig.server._parts.answers, [], []

    def prefetch(client: Any, engine: Any, session: Any, message: Any, wanted: list[bytes]) -> None:
        assert wanted == digests(2)
        sessions.append((client, session))

    monkeypatch.setattr(answers, "look_up", prefetch)
    monkeypatch.setattr(answers, "cancel", lambda session: cancelled.append(session.number))
    asked = await scheduler.lookup(1, digests(2))
    assert asked.state is AnswerState.PENDING
    assert (await scheduler.get(Answer, LookupStatus, 1)).state is AnswerState.PENDING
    client, session = sessions[0]
    assert session.answer(asked.asked, 0)
    client.send(answer_of(session, 0))
    pushed = await scheduler.pushed(Answer)
    assert (pushed.id, pushed.asked, pushed.state) == (0, asked.id, AnswerState.ANSWERED)
    cancelled.clear()
    await scheduler.lookup(2, digests(2))
    await scheduler.lookup(2, digests(2))
    await scheduler.tell(Release(2))
    await scheduler.end(1)
    await scheduler.get(Pong, Ping)
    assert cancelled == [2, 2, 1]
