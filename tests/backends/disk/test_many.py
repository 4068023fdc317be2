"""The disk tier with many chunks: nothing that concerns them all stops the loop, or makes others wait for its end.

What is counted is steps, rows and calls, never milliseconds: those are the machine's.
"""

import contextlib
import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from lmcache_trio_backends.disk import DiskConfig, DiskTier, engine, recovery
from lmcache_trio_backends.disk.chunk_table import _GLANCES, ChunkTable
from lmcache_trio_backends.disk.config import Budget
from lmcache_trio_backends.disk.files import Files
from lmcache_trio_backends.disk.home import INDEX_NAME, Home, slab_name
from lmcache_trio_backends.disk.index_file import PAGE, IndexFile
from lmcache_trio_backends.disk.io_threads import IOThreads
from lmcache_trio_backends.disk.records import Row

from lmcache_trio._core.index.arena import Arena
from lmcache_trio.abc import ChunkKey
from lmcache_trio.testing.tier_contract import is_right, key_of, load_of, record_of

LENGTH = 64 << 10
NAMESPACE = b"\7" * 32
MANY = 5000
FULL = next(size for size in itertools.count(MANY * LENGTH, 4096) if Budget.of(size).slabs == MANY * LENGTH)
"""A tier of which so many chunks take every byte."""


def rows(count: int) -> list[Row]:
    """Chunks in chains of 8, in the index file's order, scattered over the slabs."""
    random = Random(0)
    places = random.sample(range(count), count)
    found, parent = [], b""
    for i in range(count):
        digest = random.randbytes(32)
        parent = parent if i % 8 else b""
        found.append(Row(NAMESPACE + digest, parent, places[i] * LENGTH, i + 1, i + 1, (LENGTH,), (i,)))
        parent = digest
    return sorted(found)


def key(row: Row) -> ChunkKey:
    return ChunkKey(row[0][:32], row[0][32:])


def disk_tier(path: Path, size: int = 512 << 20) -> DiskTier:
    return DiskTier(DiskConfig(path=str(path), size=size, slab_size=512 << 20))


@pytest.fixture
def many(tmp_path: Path) -> list[Row]:
    """What the directory `tmp_path` holds: as a killed server would leave it, without its bytes."""
    config = disk_tier(tmp_path).config
    files = Files(config, Budget.of(config.size), Home(config.path))
    files.open(False)
    found = rows(MANY)
    for i in range(0, MANY, files.index.batch):
        files.index.publish(found[i : i + files.index.batch])
    files.close()
    with open(Home(config.path).inside / slab_name(0), "wb") as slab:
        slab.truncate(512 << 20)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each question to the index file, and how many rows it gave or names it asked for."""
    done: list[tuple[str, int]] = []
    page, find, erase = IndexFile.page, IndexFile.find, IndexFile.erase

    def spy(name: str, size: int) -> None:
        done.append((name, size))

    monkeypatch.setattr(IndexFile, "page", lambda s, a, n: _noted(page(s, a, n), lambda r: spy("page", len(r))))
    monkeypatch.setattr(IndexFile, "find", lambda s, k: _noted(find(s, k), lambda r: spy("find", len(k))))
    monkeypatch.setattr(IndexFile, "erase", lambda s, d: _noted(erase(s, d), lambda r: spy("erase", len(d))))
    return done


def _noted(value: Any, note: Any) -> Any:
    note(value)
    return value


async def test_a_question_waits_for_one_page_of_the_reading_and_not_for_its_end(
    tmp_path: Path, many: list[Row], asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "SMALL", 0)
    tier = disk_tier(tmp_path)
    async with tier.open():
        before = len(asked)
        assert list(await tier.contains([key(many[-1]), key_of(1)])) == [True, False]
        assert [what for what, _ in asked[before:]].count("page") <= 2
        assert tier.statistics()["ready"] == 0
        await tier.delete(key_of(1).namespace)  # waits until all is read
        assert tier.statistics()["chunks"] == MANY


@pytest.mark.parametrize("small", [True, False])
async def test_a_small_index_is_read_before_the_tier_is_open_and_a_large_one_after_that(
    tmp_path: Path, many: list[Row], monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    with contextlib.closing(sqlite3.connect(Home(str(tmp_path)).inside / INDEX_NAME)) as db:
        (pages,), (free,) = (db.execute(f"PRAGMA {count}").fetchone() for count in ("page_count", "freelist_count"))
    monkeypatch.setattr(recovery, "SMALL", (pages - free) * PAGE - (0 if small else 1))
    tier = disk_tier(tmp_path)
    async with tier.open():
        known = int(tier.statistics()["chunks"])
        assert known == MANY if small else known <= recovery.PAGE_ROWS
        assert tier.statistics()["ready"] == small
        assert list(await tier.contains([key(many[-1]), key_of(1)])) == [True, False]


async def test_what_was_read_already_is_answered_without_the_index_file(
    tmp_path: Path, many: list[Row], asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "SMALL", 0)
    tier = disk_tier(tmp_path)
    async with tier.open():
        while not tier.statistics()["chunks"]:  # a page is read
            await trio.lowlevel.checkpoint()
        first = [key(row) for row in many[:100]]
        assert list(await tier.contains(first)) == [True] * 100
        assert list(await tier.load([load_of(one, (LENGTH,)) for one in first])) == [False] * 100  # those are holes
        assert not [size for what, size in asked if what == "find"]
        assert tier.statistics()["corrupt"] == 100
        await tier.delete(key_of(1).namespace)
        assert tier.statistics()["chunks"] == MANY - 100


async def test_a_namespace_is_absent_at_once_and_erased_in_pieces(
    tmp_path: Path, many: list[Row], asked: list[tuple[str, int]]
) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.delete, NAMESPACE)
            await trio.testing.wait_all_tasks_blocked()
            assert list(await tier.contains([key(row) for row in many])) == [False] * MANY
            assert tier.statistics()["chunks"] == 0
        erased = [size for what, size in asked if what == "erase"]
        assert sum(erased) == MANY
        assert max(erased) < 300
        assert tier.statistics()["bytes_used"] == 0
    async with tier.open():
        assert list(await tier.contains([key(row) for row in many[:50]])) == [False] * 50


def publish(path: Path, found: list[Row], forgotten_to: int) -> None:
    """What a server leaves that was killed after it forgot all up to that generation."""
    config = disk_tier(path).config
    files = Files(config, Budget.of(config.size), Home(config.path))
    files.open(False)
    files.index.publish(found)
    files.index.forget(NAMESPACE, forgotten_to)
    files.close()


async def test_what_a_killed_deletion_left_is_dead_and_its_bytes_are_free(tmp_path: Path, many: list[Row]) -> None:
    newer = Row(many[7][0], b"", 0, MANY + 1, MANY + 1, (LENGTH,), (0,))  # in bytes that were another's
    publish(tmp_path, [newer], MANY)
    for _ in range(3):
        tier = disk_tier(tmp_path)
        async with tier.open():
            assert list(await tier.contains([key(row) for row in many])) == [row[0] == newer[0] for row in many]
            assert (tier.statistics()["chunks"], tier.statistics()["bytes_used"]) == (1, LENGTH)


async def test_a_dead_row_is_not_found_by_query_either(
    tmp_path: Path, many: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, [], MANY)
    monkeypatch.setattr(recovery, "SMALL", 0)
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert tier.statistics()["ready"] == 0
        assert list(await tier.contains([key(row) for row in many[-50:]])) == [False] * 50


async def test_a_generation_is_never_given_again_after_all_were_forgotten(tmp_path: Path, many: list[Row]) -> None:
    one = ChunkKey(NAMESPACE, b"\1" * 32)
    tier = disk_tier(tmp_path)
    async with tier.open():
        await tier.delete(NAMESPACE)
    for _ in range(2):
        async with tier.open():
            assert list(await tier.store([record_of(one, (LENGTH,))])) == [True]
    async with tier.open():
        assert list(await tier.contains([one])) == [True]


async def test_a_deletion_of_very_many_returns_when_it_is_for_good_and_not_when_all_is_erased(
    tmp_path: Path, many: list[Row], asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "DELETE_BATCHES", 1)
    tier = disk_tier(tmp_path)
    async with tier.open():
        await tier.delete(NAMESPACE)
        assert sum(size for what, size in asked if what == "erase") < MANY // 2
        assert list(await tier.contains([key(row) for row in many])) == [False] * MANY
    async with tier.open():
        assert list(await tier.contains([key(row) for row in many])) == [False] * MANY
        assert (tier.statistics()["chunks"], tier.statistics()["bytes_used"]) == (0, 0)


async def test_a_deletion_that_is_cancelled_early_is_for_good(tmp_path: Path, many: list[Row]) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.delete, NAMESPACE)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert tier.statistics()["chunks"] == 0
    async with tier.open():
        assert list(await tier.contains([key(row) for row in many[:50]])) == [False] * 50
        assert tier.statistics()["bytes_used"] == 0


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> trio.Semaphore:
    """Each erasure of a batch of rows takes one of these, and waits where none is left."""
    permitted = trio.Semaphore(0)
    ask = IOThreads.ask

    async def gated(worker: IOThreads, fn: Any, *args: Any) -> Any:
        if fn.__name__ == "erase":
            await permitted.acquire()
        return await ask(worker, fn, *args)

    monkeypatch.setattr(IOThreads, "ask", gated)
    return permitted


async def test_who_needs_room_waits_for_one_piece_of_a_deletion_and_not_for_its_end(
    tmp_path: Path, many: list[Row], pieces: trio.Semaphore
) -> None:
    assert Budget.of(FULL).slabs == MANY * LENGTH
    tier = disk_tier(tmp_path, FULL)
    async with tier.open():
        assert tier.statistics()["bytes_used"] == tier.statistics()["bytes_capacity"] == MANY * LENGTH
        stored = trio.Event()

        async def store() -> None:
            assert list(await tier.store([record_of(key_of(1), (LENGTH,))])) == [True]
            assert int(tier.statistics()["bytes_used"]) > MANY * LENGTH // 2
            stored.set()

        async with trio.open_nursery() as nursery:
            for task in (lambda: tier.delete(NAMESPACE), store):
                nursery.start_soon(task)
                await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):  # the deletion's own, the maintenance's and the store's: they take turns
                pieces.release()
            try:
                with trio.fail_after(60):
                    await stored.wait()
            finally:
                for _ in range(MANY):  # no piece can be cancelled
                    pieces.release()
        assert tier.statistics()["bytes_used"] == LENGTH
        load = load_of(key_of(1), (LENGTH,))
        assert list(await tier.load([load])) == [True]
        assert is_right(load)


def full_table(count: int) -> ChunkTable:
    table = ChunkTable(Arena(), capacity=1 << 40, index_room=1 << 30)
    table.restore(rows(count))
    for _ in table.rebuild(count * LENGTH, table.order()):
        pass
    return table


def test_a_million_late_entries_are_put_right_a_few_at_a_time() -> None:
    table = full_table(MANY)
    found = sorted(rows(MANY), key=lambda row: row[4])
    for row in found:
        table.touch(key(row))
    calls = 0
    while not table.evict(1):
        calls += 1
        assert table.searching
    assert calls == MANY // 8 // _GLANCES  # a leaf a chain
    assert not table.searching
    assert not table.contains(key(found[7]))  # the end of the chain that was touched first


def test_every_step_of_the_rebuilding_is_small() -> None:
    table = ChunkTable(Arena(), capacity=1 << 40, index_room=1 << 30)
    table.restore(rows(MANY))
    steps: Iterator[None] = table.rebuild(MANY * LENGTH, table.order())
    assert sum(1 for _ in steps) > 2 * MANY // recovery.PAGE_ROWS


def test_what_is_read_of_a_page_is_what_was_written(tmp_path: Path) -> None:
    index = IndexFile(tmp_path / "index", room=1 << 20, wal_room=1 << 20, flush=False)
    index.open()
    assert index.page(b"", 10) == []
    assert index.find([b"x" * 64]) == []
    odd: list[Row] = [
        Row(b"\0" * 64, b"", 0, 1, 0, (1,), (0,)),
        Row(b"\xff" * 64, b"\0" * 32, (1 << 60), (1 << 60) + 1, 5, (0, (1 << 48) - 1), ((1 << 64) - 1, 0)),
    ]
    index.publish(odd)
    assert index.page(b"", 10) == odd
    assert index.page(odd[0][0], 10) == odd[1:]
    assert index.page(b"", 1) == odd[:1]
    assert sorted(index.find([row[0] for row in odd])) == odd
    index.close()
