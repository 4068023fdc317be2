"""What the disk tier does when the disk does not take what it was to keep: nothing fails in silence."""

import errno
import os
import resource
import shutil
import sqlite3
from pathlib import Path
from random import Random

import pytest
import trio
from lmcache_trio_backends.disk import DiskConfig, DiskTier, engine
from lmcache_trio_backends.disk.index_file import IndexFile
from lmcache_trio_backends.disk.records import Row
from lmcache_trio_backends.disk.slabs import Slabs

from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.tier_contract import is_right, key_of, load_of, record_of

MIB = 1 << 20


def disk_tier(path: Path, durability: str) -> DiskTier:
    return DiskTier(DiskConfig(path=str(path), size=24 * MIB, slab_size=4 * MIB, durability=durability))


class FailingFlush:
    """`Slabs.flush`, which fails in its first *times* calls. `called` is set in the loop after each."""

    def __init__(self, times: int) -> None:
        self.calls = 0
        self.called = trio.Event()
        self._times = times
        self._token = trio.lowlevel.current_trio_token()
        self._really = Slabs.flush

    def __call__(self, slabs: Slabs) -> None:
        self.calls += 1
        self._token.run_sync_soon(self.called.set)
        if self.calls <= self._times:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._really(slabs)


async def test_a_periodic_flush_that_fails_fails_the_tier_until_it_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = FailingFlush(times=1)
    monkeypatch.setattr(Slabs, "flush", lambda slabs: flush(slabs))
    monkeypatch.setattr(engine, "FLUSH_SECONDS", 0.02)
    tier = disk_tier(tmp_path, "periodic")
    async with tier.open():
        assert list(await tier.store([record_of(key_of(1))])) == [True]
        with trio.fail_after(5):
            await flush.called.wait()
            with pytest.raises(Unavailable, match="Input/output error"):
                while True:  # until the loop has heard of it
                    await tier.contains([key_of(1)])
        with pytest.raises(Unavailable, match="Input/output error"):
            await tier.store([record_of(key_of(2))])
        with pytest.raises(Unavailable, match="Input/output error"):
            await tier.load([load_of(key_of(1))])
        with pytest.raises(Unavailable, match="Input/output error"):
            await tier.delete(key_of(1).namespace)
    flush.called = trio.Event()
    async with tier.open():
        assert list(await tier.store([record_of(key_of(3))])) == [True]
        with trio.fail_after(5):
            await flush.called.wait()  # the promise is kept again
        load = load_of(key_of(3))
        assert list(await tier.load([load])) == [True]
        assert is_right(load)


async def test_a_flush_that_fails_in_one_store_fails_those_that_come_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of bytes that it lost once: the next flush succeeds, and says nothing of them."""
    flush = FailingFlush(times=1)
    monkeypatch.setattr(Slabs, "flush", lambda slabs: flush(slabs))
    tier = disk_tier(tmp_path, "power")
    async with tier.open():
        for number in (1, 2):
            with pytest.raises(Unavailable, match="Input/output error"):
                await tier.store([record_of(key_of(number))])
    async with tier.open():
        assert list(await tier.contains([key_of(1), key_of(2)])) == [False, False]
        assert list(await tier.store([record_of(key_of(1))])) == [True]


# ---- the index file's log


def some_rows(count: int, generation: int) -> list[Row]:
    random = Random(0)
    keys = [random.randbytes(64) for _ in range(count)]
    return sorted(Row(key, b"", 4096 * n, generation, 1, (1,), (0,)) for n, key in enumerate(keys))


def test_a_log_that_cannot_be_written_back_fails_and_stays_within_its_room(tmp_path: Path) -> None:
    """SQLite keeps a failure of the checkpoints that it makes itself to itself, and lets the log grow on."""
    room = MIB
    index = IndexFile(tmp_path / "index", room=64 * MIB, wal_room=room, flush=False)
    index.open()
    rows = some_rows(20_000, 1)
    batches = [rows[i : i + index.batch] for i in range(0, len(rows), index.batch)]
    for batch in batches:
        index.publish(batch)
    assert (tmp_path / "index-wal").stat().st_size <= room
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert (tmp_path / "index").stat().st_size > 2 * room
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * room, limits[1]))  # what lies behind can't be written, the log can
    try:
        with pytest.raises(sqlite3.Error):
            for batch in reversed(batches):
                index.touch([(n, row[0], row[3]) for n, row in enumerate(batch, 2)])
                assert (tmp_path / "index-wal").stat().st_size <= room
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "index-wal").stat().st_size <= room
    index.close()
    index.open()
    assert len(index.page(b"", 30_000)) == 20_000
    index.close()


@pytest.mark.parametrize(("room", "stays"), [(MIB, True), (MIB // 2, False)])
def test_the_log_that_a_killed_server_left_is_written_back_at_the_start_only_where_it_is_too_long(
    tmp_path: Path, room: int, stays: bool
) -> None:
    """A start would wait for the disk, and be late."""
    rows = some_rows(2000, 1)
    (tmp_path / "left").mkdir()
    index = IndexFile(tmp_path / "index", room=64 * MIB, wal_room=MIB, flush=False)
    index.open()
    for i in range(0, len(rows), index.batch):
        index.publish(rows[i : i + index.batch])
    for name in ("index", "index-wal"):
        shutil.copy(tmp_path / name, tmp_path / "left" / name)
    index.close()
    length = (tmp_path / "left" / "index-wal").stat().st_size
    assert MIB // 2 < length < MIB * 3 // 4
    index = IndexFile(tmp_path / "left" / "index", room=64 * MIB, wal_room=room, flush=False)
    index.open()
    assert ((tmp_path / "left" / "index-wal").stat().st_size >= length) == stays
    assert index.page(b"", 3000) == rows
    index.close()


# ---- directories


async def test_a_lock_that_could_not_be_written_is_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk without a byte left: else this very process would keep itself out when there is room again."""

    def full(fd: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tier = disk_tier(tmp_path, "process")
    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(Unavailable, match="No space left"):
        async with tier.open():
            pass
    monkeypatch.undo()
    async with tier.open():
        assert list(await tier.store([record_of(key_of(1))])) == [True]


@pytest.mark.parametrize("durability", ["process", "power"])
async def test_the_parents_of_a_directory_that_is_made_are_flushed_where_a_power_failure_is_to_be_outlived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    flushed: list[str] = []
    really = os.fsync

    def fsync(fd: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
        really(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "new" / "newer" / "kv"
    async with disk_tier(path, durability).open():
        pass
    parents = [str(tmp_path), str(tmp_path / "new"), str(tmp_path / "new" / "newer")]
    if durability == "power":
        assert flushed[:3] == parents
    else:
        assert not set(flushed) & set(parents)
    flushed.clear()
    async with disk_tier(path, durability).open():
        pass
    assert flushed == []
