"""Slabs that are short or missing, and an index that is gone: only what lay there is lost, and the log says so."""

import logging
import os
import shutil
from pathlib import Path

import pytest
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from lmcache_trio_backends.disk.home import FORMAT, INDEX_NAME, slab_name

from lmcache_trio.testing.tier_contract import is_right, key_of, load_of, record_of

MIB = 1 << 20
SLAB = 2 * MIB
LENGTH = 400_000
"""Of a chunk: 5.2 in a slab, so that some lie in two."""
COUNT = 40
"""16 MiB: eight slabs."""


def disk_tier(path: Path, size: int = 24 * MIB) -> DiskTier:
    return DiskTier(DiskConfig(path=str(path), size=size, slab_size=SLAB))


def inside(path: Path) -> Path:
    return path / f"lmcache-trio-format-{FORMAT}"


async def loaded(tier: DiskTier, *numbers: int) -> list[bool]:
    loads = [load_of(key_of(n), (LENGTH,)) for n in numbers]
    hits = list(await tier.load(loads))
    assert all(is_right(load) for load, hit in zip(loads, hits, strict=True) if hit)
    return hits


async def filled(tier: DiskTier) -> list[tuple[int, int]]:
    """Store all. Where each lies: its first byte, and the one behind its last."""
    async with tier.open():
        assert all(await tier.store([record_of(key_of(n), (LENGTH,)) for n in range(COUNT)]))
        table = tier._table
        places = [table.begin_read(key_of(n), (LENGTH,)) for n in range(COUNT)]
        assert all(place is not None for place in places)
        for place in places:
            assert place is not None
            table.end_read(place)
        return [(place.offset, place.offset + LENGTH) for place in places if place is not None]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def halve(path: Path) -> None:
    os.truncate(path, SLAB // 2 + 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [cut, halve, empty, os.unlink])
@pytest.mark.parametrize("which", [(0,), (3,), (7,), (0, 1, 4), tuple(range(8))])
async def test_a_slab_that_is_short_or_missing_loses_its_own_chunks_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: "object", which: tuple[int, ...]
) -> None:
    tier = disk_tier(tmp_path)
    places = await filled(tier)
    gone = []
    for slab in which:
        path = inside(tmp_path) / slab_name(slab)
        kept = {cut: SLAB - 4096, halve: SLAB // 2, empty: 0, os.unlink: 0}[damage]  # type: ignore[index]
        gone.append((slab * SLAB + kept, (slab + 1) * SLAB))
        damage(path)  # type: ignore[operator]
    there = [all(end <= start or last <= begin for start, last in gone) for begin, end in places]
    assert any(there) == (which != tuple(range(8)) or damage in (cut, halve))
    caplog.set_level(logging.INFO, "lmcache_trio.disk")
    caplog.clear()
    async with tier.open():
        assert await loaded(tier, *range(COUNT)) == there
        held = tier.statistics()
        assert (held["chunks"], held["corrupt"]) == (sum(there), 0)
        if all(there):
            return
        assert (held["lost_slabs"], held["lost_index"]) == (COUNT - sum(there), 0)
        (line,) = [line for line in caplog.messages if "lost with their slabs" in line]
        assert f"{COUNT - sum(there)} chunks are lost" in line
        await tier.delete(b"\7" * 32)
        assert tier.statistics()["bytes_used"] == sum(there) * -(-LENGTH // 4096) * 4096
        assert all(await tier.store([record_of(key_of(n), (LENGTH,)) for n in range(COUNT)]))
        assert await loaded(tier, *range(COUNT)) == [True] * COUNT
    caplog.clear()
    async with tier.open():
        assert await loaded(tier, *range(COUNT)) == [True] * COUNT
    assert not caplog.messages


async def test_an_index_that_is_gone_says_so_and_its_slabs_are_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = disk_tier(tmp_path)
    await filled(tier)
    (inside(tmp_path) / INDEX_NAME).unlink()
    async with tier.open():
        assert await loaded(tier, *range(COUNT)) == [False] * COUNT
        assert (tier.statistics()["lost_index"], tier.statistics()["chunks"]) == (1, 0)
        (line,) = [line for line in caplog.messages if INDEX_NAME in line]
        assert "gone" in line
        assert "8 slabs" in line


async def test_a_new_directory_has_lost_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = disk_tier(tmp_path)
    await filled(tier)
    async with tier.open():
        held = tier.statistics()
        assert (held["lost_index"], held["lost_slabs"], held["corrupt"]) == (0, 0, 0)
    assert not caplog.messages


async def test_many_chunks_that_fail_verification_are_two_lines_of_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = disk_tier(tmp_path)
    await filled(tier)
    slabs = [inside(tmp_path) / slab_name(n) for n in (1, 2)]
    shutil.copy(slabs[0], tmp_path.parent / "aside")
    shutil.copy(slabs[1], slabs[0])
    shutil.copy(tmp_path.parent / "aside", slabs[1])
    async with tier.open():
        hits = await loaded(tier, *range(COUNT))
        failed = COUNT - sum(hits)
        assert 10 <= failed <= 14
        assert tier.statistics()["corrupt"] == failed
    lines = [line for line in caplog.messages if "failed verification" in line]
    assert len(lines) == 2
    assert f"{failed - 1} more chunks" in lines[1]
