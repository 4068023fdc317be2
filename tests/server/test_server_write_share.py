"""What one engine may be writing at one time: a worker that never commits leaves others their part, and is named."""

import pytest
import trio
from support.server import HeapConfig, Opener, digests
from trio.testing import MockClock

from lmcache_trio._wire.codec import POSITIONS
from lmcache_trio._wire.messages import Abort, Ack

CHUNK = 64 << 10


def lines(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


async def test_a_live_worker_that_never_commits_leaves_the_others_room_and_is_named_once(
    rigs: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigs(HeapConfig(size=CHUNK * 16)) as rig:
        hanging, hangs = await rig.engine("hangs")
        for session in range(1, 6):
            await hanging.lookup(session, digests(4, str(session)))
            await hangs.reserve(session, digests(4, str(session)))
        scheduler, worker = await rig.engine("works")
        for session in range(1, 9):
            await rig.stored(scheduler, worker, session, digests(2, f"of {session}"))
        await hangs.reserve(5, digests(1, "once more"))
        assert rig.counted()["drops"]["share"] == 20 - 8 + 1
        assert rig.counted()["drops"].get("no_space", 0) == 0
        (line,) = lines(caplog, "write_share")
        assert "engine 'hangs'" in line
        assert "512 KiB" in line
        assert rig.held("bytes_writing") == {"bytes_writing": 8 * CHUNK}


async def test_a_worker_that_did_not_commit_in_time_is_named_once_with_what_it_holds(
    rigs: Opener, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with rigs(reservation_timeout=10.0) as rig:
        scheduler, worker = await rig.engine("hangs")
        await scheduler.lookup(1, digests(4))
        made = await worker.reserve(1, digests(2))
        await trio.sleep(5)
        await worker.reserve(1, digests(2, "more"))
        await trio.sleep(20)
        assert rig.held("bytes_quarantined") == {"bytes_quarantined": 4 * CHUNK}
        (line,) = lines(caplog, "reservation_timeout")
        assert "engine 'hangs'" in line
        assert "256 KiB" in line
        assert rig.counted()["reservations_expired"] == 2
        await worker.get(Ack, Abort, made.reservation)
        assert rig.held("bytes_quarantined") == {"bytes_quarantined": 2 * CHUNK}


async def test_one_engine_that_commits_fills_all_of_the_arena(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=CHUNK * 16)) as rig:
        scheduler, worker = await rig.engine()
        for session in range(1, 16):
            await rig.stored(scheduler, worker, session, digests(1, str(session)))
        assert rig.counted()["drops"].get("share", 0) == 0
        assert rig.held("chunks_ready") == {"chunks_ready": 15}


async def test_a_store_longer_than_the_share_keeps_its_leading_chunks(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=CHUNK * 16)) as rig:
        scheduler, worker = await rig.engine()
        await scheduler.lookup(1, digests(12))
        made = await worker.reserve(1, digests(12))
        assert (POSITIONS.unpack(made.positions), made.dropped) == (tuple(range(8)), {"share": 4})
        await worker.commit(made.reservation)
        rest = await worker.reserve(1, digests(12)[8:], parent=digests(12)[7])
        assert POSITIONS.unpack(rest.positions) == (0, 1, 2, 3)
