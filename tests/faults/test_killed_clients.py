"""Clients killed, or stopped and continued, in the middle of each operation: nothing of theirs stays or counts."""

import os
import signal
from typing import Any

import pytest
import trio
import trio.testing
from support.faults import client_process
from support.faults.scene import Scenes

from lmcache_trio import Client, Role, open_client
from lmcache_trio.errors import LMCacheTrioError

STORED = {"chunks_ready", "slots_ready", "bytes_ready", "bytes_free", "largest_hole"}
"""Of `held`, what chunks that are there change, and their places."""


def but_for_chunks(held: dict[str, Any]) -> dict[str, Any]:
    return {name: held[name] for name in held.keys() - STORED}


@pytest.mark.parametrize(
    ("point", "there"),
    [
        ("registering", {"engines": 2}),
        ("looking up", {"sessions": 50}),
        ("leased", {"sessions": 1, "leases": 1}),
        ("reading", {"leases": 1, "pins": 1}),
        ("reserved", {"reservations": 1, "slots_writing": 3}),
        ("half written", {"reservations": 1, "slots_writing": 3}),
        ("written", {"reservations": 1, "slots_writing": 3}),
    ],
)
async def test_a_client_killed_in_the_middle_is_forgotten_by_notification_and_half_a_slot_is_never_served(
    scenes: Scenes, point: str, there: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    async with scenes() as scene, client_process.engine(scene.server.address, "healthy") as (scheduler, worker):
        assert await client_process.store(scheduler, worker, 1, client_process.STORED, b"s") == 3
        before = scene.held()
        doomed = await scene.process(point)
        await scene.until(lambda held: all(held[name] >= count for name, count in there.items()))
        pidfd = os.pidfd_open(doomed.process.pid)
        doomed.process.kill()
        await trio.lowlevel.wait_readable(pidfd)  # it is dead, so its sockets are closed
        dead = trio.current_time()
        os.close(pidfd)
        await scene.until(lambda held: held == before)
        took = trio.current_time() - dead
        with capsys.disabled():
            print(
                f"\n[killed {point}: forgotten {took * 1000:.1f} ms after the kernel had closed its sockets]", end=" "
            )
        assert (await scheduler.lookup(2, client_process.NEW)).chunks == 0
        assert await client_process.store(scheduler, worker, 2, client_process.NEW, b"n") == 3
        for digests, fill in ((client_process.STORED, b"s"), (client_process.NEW, b"n")):
            answer = await scheduler.lookup(3, digests)
            async with worker.retrieving(answer.lease, 0, 3) as chunks:
                assert [bytes(chunk) for chunk in chunks] == [fill * client_process.SHARD] * 3
        scheduler.end(3)
        await scheduler.ping()
        assert but_for_chunks(scene.held()) == but_for_chunks(before)


@pytest.mark.parametrize("point", ["commit", "reset", "done"])
async def test_a_client_killed_with_its_last_word_under_way_leaves_all_or_nothing_of_it(
    scenes: Scenes, point: str
) -> None:
    """The server hears it, or does not; nobody is there for the reply."""
    async with scenes() as scene, client_process.engine(scene.server.address, "healthy") as (scheduler, worker):
        assert await client_process.store(scheduler, worker, 1, client_process.STORED, b"s") == 3
        before = scene.held()
        doomed = await scene.process(point)
        doomed.process.kill()
        await scene.until(lambda held: but_for_chunks(held) == but_for_chunks(before))
        stored, new = [await hits(scheduler, digests) for digests in (client_process.STORED, client_process.NEW)]
        assert stored in ((0, 3) if point == "reset" else (3,))
        assert new in ((0, 3) if point == "commit" else (0,))
        assert scene.held() == {**before, **chunks_of(before, stored + new)}
        for digests, there, fill in ((client_process.STORED, stored, b"s"), (client_process.NEW, new, b"X")):
            if not there:
                assert await client_process.store(scheduler, worker, 2, digests, fill) == 3
            answer = await scheduler.lookup(3, digests)
            async with worker.retrieving(answer.lease, 0, 3) as chunks:
                assert [bytes(chunk) for chunk in chunks] == [fill * client_process.SHARD] * 3
        scheduler.end(3)
        await scheduler.ping()
        assert but_for_chunks(scene.held()) == but_for_chunks(before)


async def hits(scheduler: Client, digests: list[bytes]) -> int:
    chunks = (await scheduler.lookup(9, digests)).chunks
    scheduler.end(9)
    await scheduler.ping()
    return chunks


def chunks_of(held: dict[str, Any], count: int) -> dict[str, int]:
    """What *held* says of *count* chunks, where it said it of three."""
    each, free = held["bytes_ready"] // 3, held["bytes_free"] + held["bytes_ready"]
    return {
        "chunks_ready": count,
        "slots_ready": count,
        "bytes_ready": count * each,
        "bytes_free": free - count * each,
        "largest_hole": free - count * each,
    }


async def test_a_welcome_whose_client_was_killed_is_withdrawn(
    scenes: Scenes, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr("lmcache_trio._server.connection.TAKE_UP", 0.1)
    async with scenes() as scene:
        await scene.until(lambda held: held["bytes_taken"] == held["bytes_size"])
        before = scene.held()
        doomed = await scene.process("welcomed")
        doomed.process.kill()
        await scene.until(lambda held: held == before)
        assert [path.name for path in tmp_path.iterdir()] == ["s.sock"]


async def test_a_stopped_writer_whose_blocks_went_to_another_publishes_nothing_when_it_is_continued(
    scenes: Scenes,
) -> None:
    async with scenes(reservation_timeout=0.5) as scene:
        async with client_process.engine(scene.server.address, "healthy") as (scheduler, worker):
            doomed = await scene.process("half written")
            doomed.process.send_signal(signal.SIGSTOP)
            await scene.until(lambda held: held["slots_writing"] == 0)
            assert scene.held()["slots_quarantined"] == 3
            # The blocks are another's now: the same prompt is stored anew, elsewhere, while the old copy still may run.
            assert await client_process.store(scheduler, worker, 1, client_process.NEW, b"n") == 3
            assert scene.held()["slots_quarantined"] == 3
            doomed.process.send_signal(signal.SIGCONT)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert scene.held()["slots_quarantined"] == 3  # it has not said yet that its copy ended
            await doomed.go_on()
            await doomed.says("ended")
            await scene.until(lambda held: held["slots_quarantined"] == held["reservations_ending"] == 0)
            assert scene.server.statistics()["counted"]["stored_chunks"] == 3
            answer = await scheduler.lookup(2, client_process.NEW)
            async with worker.retrieving(answer.lease, 0, 3) as chunks:
                assert [bytes(chunk) for chunk in chunks] == [b"n" * client_process.SHARD] * 3


async def test_a_stopped_worker_whose_blocks_went_to_another_request_publishes_nothing_when_it_is_continued(
    scenes: Scenes,
) -> None:
    """As before, with the adapter of a real engine process, which was reset and whose blocks were filled anew."""
    async with (
        scenes(chunk_tokens=64, size=4 << 20) as scene,
        open_client(scene.server.address, role=Role.SCHEDULER, engine="doomed") as ending,
        open_client(scene.server.address, role=Role.SCHEDULER, engine="healthy") as scheduler,
    ):
        doomed, healthy = await scene.worker("doomed"), await scene.worker("healthy")
        digests = b"".join(client_process.NEW).hex()
        await ending.lookup(1, client_process.NEW)
        await doomed.told(f"store 1 7 {digests}")
        await doomed.says("half")
        doomed.process.send_signal(signal.SIGSTOP)
        assert scene.held()["slots_writing"] == 3
        await ending.reset()
        await scene.until(lambda held: held["slots_writing"] == 0)
        assert scene.held()["slots_quarantined"] == 3
        await scheduler.lookup(1, client_process.NEW)
        await healthy.told(f"store 1 9 {digests}")
        await healthy.says("over")
        assert scene.held()["slots_quarantined"] == 3
        doomed.process.send_signal(signal.SIGCONT)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert scene.held()["slots_quarantined"] == 3  # it has not said yet that its copy ended
        await doomed.go_on()
        await doomed.says("over")
        await scene.until(lambda held: held["slots_quarantined"] == held["reservations_ending"] == 0)
        assert scene.server.statistics()["counted"]["stored_chunks"] == 3
        answer = await scheduler.lookup(2, client_process.NEW)
        await healthy.told(f"load {answer.lease.hex()}")
        await healthy.says("full of [9.0]")


async def test_what_one_process_stored_another_reads_byte_for_byte(scenes: Scenes) -> None:
    async with scenes() as scene:
        doomed = await scene.process("written", "writer")
        async with client_process.engine(scene.server.address, "reader") as (scheduler, worker):
            assert (await scheduler.lookup(1, client_process.NEW)).chunks == 0
            await doomed.go_on()
            await doomed.says("ended")
            answer = await scheduler.lookup(1, client_process.NEW)
            assert answer.chunks == 3
            async with worker.retrieving(answer.lease, 0, 3) as chunks:
                assert [bytes(chunk) for chunk in chunks] == [b"X" * client_process.SHARD] * 3
            doomed.process.kill()


async def test_a_stranger_cannot_use_anothers_lease_pin_or_reservation(scenes: Scenes) -> None:
    async with scenes() as scene, client_process.engine(scene.server.address, "one") as (scheduler, worker):
        await client_process.store(scheduler, worker, 1, client_process.STORED, b"s")
        answer = await scheduler.lookup(2, client_process.STORED)
        pinned = await worker.retrieve(answer.lease, 0, 3)
        reserved = await worker.reserve(2, b"", client_process.NEW)
        async with client_process.engine(scene.server.address, "other") as (_, stranger):
            with pytest.raises(LMCacheTrioError):
                await stranger.retrieve(answer.lease, 0, 1)
            assert await stranger.done(pinned.pin) is False
            with pytest.raises(LMCacheTrioError):
                await stranger.commit(reserved.reservation)
            await stranger.abort(reserved.reservation)
            assert scene.held()["reservations"] == scene.held()["pins"] == 1
        assert (await worker.commit(reserved.reservation)).published == 3
        assert await worker.done(pinned.pin)
