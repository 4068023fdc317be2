"""The disk tier: the contract, restarts, corruption, capacity in physical bytes, refusals, and failures at run time."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from lmcache_trio_backends.disk import DiskConfig, DiskTier, engine, slabs
from lmcache_trio_backends.disk.admission import SecondHit
from lmcache_trio_backends.disk.home import INDEX_NAME, Home, slab_name
from lmcache_trio_backends.disk.index_file import IndexFile
from lmcache_trio_backends.disk.recovery import Recovery
from lmcache_trio_backends.disk.slabs import Slabs
from support import disk_worker

from lmcache_trio.abc import Record
from lmcache_trio.config import structure
from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.testing.faulty_tier import Fault, FaultyTier
from lmcache_trio.testing.tier_contract import (
    Footprint,
    MakeTier,
    TierContract,
    content,
    is_right,
    key_of,
    load_of,
    record_of,
)

MIB = 1 << 20


def disk_tier(path: Path, size: int = 24 * MIB, **settings: Any) -> DiskTier:
    return DiskTier(DiskConfig(path=str(path), size=size, **{"slab_size": 4 * MIB, **settings}))


def physical(path: Path) -> int:
    """Bytes that the file system has given away for it."""
    return sum(found.stat().st_blocks * 512 for found in [path, *path.rglob("*")])


def inside(path: Path) -> Path:
    """Where the files of the tier in *path* lie."""
    return Home(str(path)).inside


async def stored(tier: DiskTier, *numbers: int, lengths: tuple[int, ...] = (40_001, 4096)) -> list[bool]:
    return list(await tier.store([record_of(key_of(n), lengths) for n in numbers]))


async def loaded(tier: DiskTier, *numbers: int, lengths: tuple[int, ...] = (40_001, 4096)) -> list[bool]:
    """Which of them come back; every one that does must be right."""
    loads = [load_of(key_of(n), lengths) for n in numbers]
    hits = list(await tier.load(loads))
    assert all(is_right(load) for load, hit in zip(loads, hits, strict=True) if hit)
    return hits


class TestDisk(TierContract):
    @pytest.fixture
    def make_tier(self, tmp_path: Path) -> MakeTier:
        return lambda size: disk_tier(tmp_path / "kv", size)

    @pytest.fixture
    def footprint(self, tmp_path: Path) -> Footprint:
        return lambda: physical(tmp_path / "kv")


class TestDiskDirect(TierContract):
    @pytest.fixture
    def make_tier(self, tmp_path: Path) -> MakeTier:
        return lambda size: disk_tier(tmp_path / "kv", size, direct=True)


class TestDiskOutlivingPowerFailures(TierContract):
    @pytest.fixture
    def make_tier(self, tmp_path: Path) -> MakeTier:
        return lambda size: disk_tier(tmp_path / "kv", size, durability="power")


# ---- restarts


async def test_a_new_server_on_the_same_directory_finds_everything_and_the_same_usage(tmp_path: Path) -> None:
    one = disk_tier(tmp_path)
    async with one.open():
        assert all(await stored(one, *range(20)))
        used = one.statistics()["bytes_used"]
    other = disk_tier(tmp_path)
    async with other.open():
        assert all(await loaded(other, *range(20)))
        assert (other.statistics()["chunks"], other.statistics()["bytes_used"]) == (20, used)


async def test_recency_outlives_a_clean_restart(tmp_path: Path) -> None:
    lengths = (5 * MIB,)
    one = disk_tier(tmp_path)
    async with one.open():
        assert all(await stored(one, 0, 1, 2, lengths=lengths))
        assert await loaded(one, 0, lengths=lengths) == [True]
    other = disk_tier(tmp_path)
    async with other.open():
        assert all(await stored(other, 3, 4, lengths=lengths))
        assert list(await other.contains([key_of(n) for n in range(5)])) == [True, False, True, True, True]


async def test_a_slab_size_that_was_changed_leaves_the_directory_readable(tmp_path: Path) -> None:
    one = disk_tier(tmp_path, slab_size=2 * MIB)
    async with one.open():
        assert all(await stored(one, *range(8), lengths=(MIB + 5,)))
    other = disk_tier(tmp_path, slab_size=16 * MIB)
    async with other.open():
        assert all(await loaded(other, *range(8), lengths=(MIB + 5,)))


@pytest.mark.parametrize("size", [12 * MIB, 40 * MIB])
async def test_a_size_that_was_changed_holds_at_once(tmp_path: Path, size: int) -> None:
    one = disk_tier(tmp_path)
    async with one.open():
        assert all(await stored(one, *range(20), lengths=(MIB,)))
    other = disk_tier(tmp_path, size=size)
    async with other.open():
        hits = await loaded(other, *range(20), lengths=(MIB,))
        assert sum(hits) == (20 if size > 24 * MIB else other.statistics()["chunks"])
        assert any(hits)
        assert physical(tmp_path) <= size
        await stored(other, *range(100, 110), lengths=(MIB,))
        assert all(await loaded(other, 109, lengths=(MIB,)))
        assert physical(tmp_path) <= size


async def test_an_index_that_is_no_database_is_begun_anew(tmp_path: Path) -> None:
    one = disk_tier(tmp_path)
    async with one.open():
        await stored(one, 1)
    (inside(tmp_path) / INDEX_NAME).write_bytes(b"this is no database" * 1000)
    async with one.open():
        assert await loaded(one, 1) == [False]
        assert one.statistics()["bytes_taken"] == 0
        assert await stored(one, 1) == [True]


async def test_an_index_that_says_it_has_another_format_than_its_directory_is_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert await stored(tier, 1) == [True]
    with sqlite3.connect(inside(tmp_path) / INDEX_NAME) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    async with tier.open():
        assert "format 99" in caplog.text
        assert await loaded(tier, 1) == [False]
        assert await stored(tier, 1) == [True]


# ---- while the index is read


async def test_lookups_are_answered_by_query_while_the_index_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (tier := disk_tier(tmp_path)).open():
        await stored(tier, *range(10))
    gate = trio.Event()
    run = Recovery.run

    async def held_back(self: Recovery) -> None:
        self.under_way.set()
        await gate.wait()
        await run(self)

    monkeypatch.setattr(Recovery, "run", held_back)
    flip_a_bit(tmp_path, content(key_of(5))[0])
    async with tier.open():
        assert tier.statistics()["ready"] == 0
        assert list(await tier.contains([key_of(n) for n in (3, 99)])) == [True, False]
        assert await loaded(tier, 3, 99, 5) == [True, False, False]
        assert await stored(tier, 50) == [False]
        assert tier.statistics()["dropped_not_ready"] == 1
        gate.set()
        with trio.fail_after(5):
            await tier.delete(b"\7" * 32)  # waits until it is read
        assert tier.statistics()["ready"] == 1
        assert await stored(tier, 50) == [True]
        assert await loaded(tier, 3, 50, 5) == [True, True, False]
        assert tier.statistics()["corrupt"] == 1


# ---- wrong bytes


def flip_a_bit(path: Path, there: bytes) -> None:
    """In the slab where *there* lies."""
    for slab in inside(path).glob("lmcache-trio-slab-*"):
        at = slab.read_bytes().find(there)
        if at >= 0:
            with open(slab, "r+b") as file:
                file.seek(at + len(there) // 2)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 4]))
            return
    raise AssertionError("these bytes are in no slab")


async def test_a_flipped_bit_on_the_disk_is_a_miss_and_the_record_is_gone_and_its_space_free(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        await stored(tier, 1, 2)
        used = int(tier.statistics()["bytes_used"])
        flip_a_bit(tmp_path, content(key_of(1))[0])
        assert await loaded(tier, 1, 2) == [False, True]
        assert tier.statistics()["corrupt"] == 1
        assert list(await tier.contains([key_of(1)])) == [False]
        await tier.delete(b"\7" * 32)  # settles
        assert int(tier.statistics()["bytes_used"]) == used // 2
    async with tier.open():
        assert await loaded(tier, 1) == [False]
        assert tier.statistics()["corrupt"] == 1


async def test_a_slab_that_was_cut_short_is_a_miss(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        await stored(tier, *range(5))
        os.truncate(inside(tmp_path) / slab_name(0), 4096)
        assert await loaded(tier, *range(5)) == [False] * 5
        assert tier.statistics()["corrupt"] == 5


async def test_a_slab_that_is_gone_at_the_start_takes_its_own_chunks_with_it(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        await stored(tier, *range(12), lengths=(MIB,))
    (inside(tmp_path) / slab_name(1)).unlink()
    async with tier.open():
        assert await loaded(tier, *range(12), lengths=(MIB,)) == [True] * 4 + [False] * 4 + [True] * 4
        await tier.delete(b"\7" * 32)
        assert tier.statistics()["bytes_used"] == 8 * MIB
        assert all(await stored(tier, *range(20, 28), lengths=(MIB,)))


# ---- capacity


async def test_its_files_never_take_more_than_its_size(tmp_path: Path) -> None:
    size = 12 * MIB
    tier = disk_tier(tmp_path, size)
    async with tier.open():
        for n in range(0, 3000, 50):
            await stored(tier, *range(n, n + 50), lengths=(4096,))
            assert physical(tmp_path) <= size
        for n in range(5000, 5060):
            await stored(tier, n, lengths=(700_000,))
            assert physical(tmp_path) <= size
        assert int(tier.statistics()["evicted"]) > 50
        await tier.delete(key_of(0).namespace)
        assert physical(tmp_path) <= size
    assert physical(tmp_path) <= size


async def test_more_small_chunks_than_the_index_has_room_for_evict_each_other(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path, 4 * MIB)
    async with tier.open():
        for n in range(0, 900, 100):
            assert all(await stored(tier, *range(n, n + 100), lengths=(100,)))
        held = tier.statistics()
        assert int(held["bytes_index_planned"]) <= 256 << 10
        assert int(held["bytes_used"]) < int(held["bytes_capacity"]) - MIB // 2
        assert await loaded(tier, 899, lengths=(100,)) == [True]


async def test_eviction_takes_leaves_before_their_parents(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path)
    lengths = (4 * MIB,)
    chain = [key_of(n) for n in range(4)]
    async with tier.open():
        for i, key in enumerate(chain):
            parent = chain[i - 1].digest if i else b""
            assert list(await tier.store([record_of(key, lengths, parent)])) == [True]
        assert all(await stored(tier, 10, 11, lengths=lengths))
        assert list(await tier.contains(chain)) == [True, True, True, False]


async def test_two_chunk_sizes_share_one_capacity(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert all(await stored(tier, *range(200), lengths=(100_000,)))
        assert all([(await stored(tier, n, lengths=(3 * MIB,)))[0] for n in range(1000, 1012)])
        assert await loaded(tier, 1011, lengths=(3 * MIB,)) == [True]


async def test_a_chunk_may_lie_across_slabs(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path, slab_size=MIB)
    async with tier.open():
        assert all(await stored(tier, 1, 2, lengths=(3 * MIB + 77, 2 * MIB)))
        assert all(await loaded(tier, 1, 2, lengths=(3 * MIB + 77, 2 * MIB)))
        assert len(list(inside(tmp_path).glob("lmcache-trio-slab-*"))) >= 10


# ---- admission


async def test_second_hit_takes_a_chunk_when_it_is_offered_again(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path, admission="second_hit")
    async with tier.open():
        assert await stored(tier, 1, 2) == [False, False]
        assert await stored(tier, 1, 3) == [True, False]
        assert tier.statistics()["dropped_admission"] == 3


async def test_asking_for_a_chunk_is_no_second_hit(tmp_path: Path) -> None:
    """The lookup of a one-off prompt asks for it before it is stored: if that counted, all would be taken."""
    tier = disk_tier(tmp_path, admission="second_hit")
    async with tier.open():
        assert list(await tier.contains([key_of(1)])) == [False]
        assert await loaded(tier, 1) == [False]
        assert await stored(tier, 1) == [False]
        assert await stored(tier, 1) == [True]


def test_second_hit_remembers_a_bounded_number_of_chunks() -> None:
    admit = SecondHit(10)
    assert not admit(key_of(0))
    for n in range(1, 1000):
        assert not admit(key_of(n))
    assert len(admit) <= 20
    assert not admit(key_of(0))
    assert admit(key_of(999))


# ---- refusals


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"path": "/x", "size": "1KiB"}, "tiers.0.size"),
        ({"path": "", "size": "1GiB"}, "tiers.0.path"),
        ({"path": "d1", "size": "1GiB"}, "tiers.0.path"),
        ({"path": "/x", "size": "1GiB", "durability": "always"}, "tiers.0.durability"),
        ({"path": "/x", "size": "1GiB", "admission": "none"}, "tiers.0.admission"),
        ({"path": "/x", "size": "1GiB", "slab_size": 1}, "tiers.0.slab_size"),
        ({"path": "/x", "size": "1GiB", "threads": 0}, "tiers.0.threads"),
        ({"path": "/x", "size": "1GiB", "dirct": True}, "tiers.0.dirct"),
        ({"path": "/x"}, "tiers.0.size"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(table: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        structure(DiskConfig, table, "tiers.0")
    assert caught.value.key == key


async def test_a_second_server_is_refused_with_the_directory_and_the_first_ones_process(tmp_path: Path) -> None:
    async with disk_tier(tmp_path).open():
        with pytest.raises(ConfigError, match=f"(?s){tmp_path}.*process {os.getpid()};") as caught:
            async with disk_tier(tmp_path).open():
                pass
        assert caught.value.key == "path"
    async with disk_tier(tmp_path).open():
        pass


async def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError) as caught:
            async with disk_tier(path).open():
                pass
        assert caught.value.key == "path"


def _raise(number: int) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


async def test_a_file_system_without_o_direct_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def without_direct(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        return really(path, flags, mode, dir_fd=dir_fd) if not flags & os.O_DIRECT else _raise(22)()

    monkeypatch.setattr(os, "open", without_direct)
    with pytest.raises(ConfigError, match="O_DIRECT") as caught:
        async with disk_tier(tmp_path, direct=True).open():
            pass
    assert caught.value.key == "direct"
    assert not list(tmp_path.rglob("*probe*"))


# ---- failures at run time


async def test_a_directory_that_is_removed_is_unavailable_and_works_again_when_opened_again(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path / "kv")
    with pytest.raises(Unavailable, match="removed"):
        async with tier.open():
            await stored(tier, 1)
            shutil.rmtree(tmp_path / "kv")
            await stored(tier, 2)
    async with tier.open():
        assert await loaded(tier, 1) == [False]
        assert await stored(tier, 2) == [True]


async def test_a_full_disk_is_capacity_reached_and_its_chunks_evict_each_other_until_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert all(await stored(tier, 1, 2, lengths=(MIB,)))
        monkeypatch.setattr(slabs, "fallocate", _raise(28))
        assert all(await loaded(tier, 1, 2, lengths=(MIB,)))
        assert await stored(tier, 3, lengths=(3 * MIB,)) == [True]  # in place of both: the slab has 4
        assert await loaded(tier, 1, 2, lengths=(MIB,)) == [False, False]
        assert await stored(tier, 4, lengths=(5 * MIB,)) == [False]  # the slab has 4
        assert tier.statistics()["dropped_no_space"] == 1
        assert int(tier.statistics()["disk_full"]) > 1
    assert len([line for line in caplog.messages if "has no space" in line]) == 1
    async with tier.open():
        assert await stored(tier, 5, lengths=(MIB,)) == [True]
        monkeypatch.undo()
        caplog.set_level("INFO", "lmcache_trio.disk")
        assert await stored(tier, 4, lengths=(5 * MIB,)) == [True]
        assert await loaded(tier, 4, lengths=(5 * MIB,)) == [True]


async def test_an_index_that_cannot_be_written_fails_the_tier_until_it_is_opened_again(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        await stored(tier, 1)
        db = tier._index._db
        assert db is not None
        await tier._threads.index_thread.run(db.execute, "PRAGMA query_only = 1")
        with pytest.raises(Unavailable, match="readonly"):
            await stored(tier, 2)
        with pytest.raises(Unavailable, match="readonly"):
            await loaded(tier, 1)
    async with tier.open():
        assert await loaded(tier, 1, 2) == [True, False]
        assert tier.statistics()["chunks"] == 1
        assert await stored(tier, 2) == [True]


async def test_a_bad_sector_fences_once_and_its_record_is_gone(tmp_path: Path) -> None:
    tier = FaultyTier.around(disk_tier(tmp_path), [Fault("error", on="load", at=(1,))])
    async with tier.open():
        assert all(await tier.store([record_of(key_of(n)) for n in range(3)]))
        with pytest.raises(Unavailable, match="injected"):
            await tier.load([load_of(key_of(1))])
    async with tier.open():
        assert list(await tier.load([load_of(key_of(n)) for n in range(3)])) == [True, False, True]


async def test_a_disk_that_hangs_when_it_is_closed_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "CLOSE_SECONDS", 0.05)
    tier = disk_tier(tmp_path)
    blocked, release = os.pipe()
    async with trio.open_nursery() as nursery:
        async with tier.open():
            nursery.start_soon(tier._threads.index_thread.run, os.read, blocked, 1)
            await trio.testing.wait_all_tasks_blocked()
        assert "its disk hangs" in caplog.text
        with pytest.raises(Unavailable, match=f"in use by process {os.getpid()}"):
            async with tier.open():
                pass
        os.write(release, b".")
    os.close(blocked)
    os.close(release)


async def test_recency_and_periodic_flushes_come_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, flushed = trio.lowlevel.current_trio_token(), trio.Event()
    done: list[str] = []
    really: dict[str, Any] = {"touch": IndexFile.touch, "checkpoint": IndexFile.checkpoint, "flush": Slabs.flush}

    def spied(name: str) -> Any:
        def call(self: Any, *args: Any) -> Any:
            done.append(name)
            result = really[name](self, *args)
            if name == "checkpoint":
                token.run_sync_soon(flushed.set)
            return result

        return call

    monkeypatch.setattr(IndexFile, "touch", spied("touch"))
    monkeypatch.setattr(IndexFile, "checkpoint", spied("checkpoint"))
    monkeypatch.setattr(Slabs, "flush", spied("flush"))
    monkeypatch.setattr(engine, "FLUSH_SECONDS", 0.05)
    tier = disk_tier(tmp_path, durability="periodic")
    async with tier.open():
        assert await stored(tier, 1) == [True]
        assert await loaded(tier, 1) == [True]
        with trio.fail_after(5):
            await flushed.wait()
    assert done[-2:] == ["flush", "checkpoint"]
    assert "touch" in done


# ---- a killed server


WORKER = disk_worker.__file__


async def test_a_server_killed_in_its_writes_comes_back_with_hits_exact_usage_and_no_wrong_byte(tmp_path: Path) -> None:
    found = 0
    for seed in range(3):
        with subprocess.Popen([sys.executable, WORKER, str(tmp_path), str(seed)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(10 + 7 * seed):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        tier = disk_tier(tmp_path)
        async with tier.open():
            assert physical(tmp_path) <= 24 * MIB
            used = int(tier.statistics()["bytes_used"])
            hits = [n for n in range(60) if (await loaded(tier, n, lengths=(n * 10_000 + 1, 4096)))[0]]
            assert used == sum(4096 * (-(-(n * 10_000 + 1) // 4096) + 1) for n in hits)
            assert tier.statistics()["corrupt"] == 0
            found += len(hits)
    assert found > 10


async def test_a_record_without_bytes_is_not_taken(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert list(await tier.store([Record(key_of(1), b"", [])])) == [False]
        assert list(await tier.store([Record(key_of(1), b"", [memoryview(b"")])])) == [False]
        assert tier.statistics()["dropped_size"] == 2
