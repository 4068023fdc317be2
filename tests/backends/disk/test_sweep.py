"""Every kind of damage to every file of a disk tier: no wrong byte, no more lost than was damaged, and it says so."""

import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import trio
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from lmcache_trio_backends.disk.home import FORMAT, INDEX_NAME, slab_name

from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.tier_contract import is_right, key_of, load_of, record_of

MIB = 1 << 20
LENGTHS = (60_001, 4096)
COUNT = 90
WAL_NAME = f"{INDEX_NAME}-wal"
SLABS = [slab_name(number) for number in range(6)]
SAYS = ("corrupt", "lost_slabs", "lost_index", "lost_changes")
FLIPS = 12

Files = dict[str, bytes]


def disk_tier(path: Path) -> DiskTier:
    return DiskTier(DiskConfig(path=str(path), size=12 * MIB, slab_size=MIB))


def inside(path: Path) -> Path:
    return path / f"lmcache-trio-format-{FORMAT}"


def copy_of(path: Path) -> Files:
    """Of a tier that is open: what a kill would leave."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Files]:
    """A directory as a kill leaves it, with a third of its rows in the log alone; and as it was earlier."""
    path = tmp_path_factory.mktemp("left")
    older: Files = {}
    newer: Files = {}

    async def make() -> None:
        tier = disk_tier(path)
        async with tier.open():
            assert all(await tier.store([record_of(key_of(n), LENGTHS) for n in range(1000, 1000 + COUNT // 2)]))
            older.update(copy_of(path))
            await tier.delete(key_of(0).namespace)
            assert all(await tier.store([record_of(key_of(n), LENGTHS) for n in range(COUNT * 2 // 3)]))
            await tier._threads.ask(tier._index.checkpoint)
            for n in range(COUNT * 2 // 3, COUNT):
                assert all(await tier.store([record_of(key_of(n), LENGTHS)]))
            newer.update(copy_of(path))

    trio.run(make)
    return newer, older


def damaged(kind: str, name: str, newer: Files, older: Files, random: Random) -> Iterator[Files]:
    """Ways in which the file *name* of *newer* is damaged by *kind*."""
    name = str(Path(f"lmcache-trio-format-{FORMAT}", name))
    raw = newer[name]
    if kind == "flip":
        for _ in range(FLIPS):
            at = random.randrange(len(raw))
            yield {**newer, name: raw[:at] + bytes([raw[at] ^ 1 << random.randrange(8)]) + raw[at + 1 :]}
    elif kind == "cut":
        for length in (0, 1, len(raw) // 2, len(raw) - 4097, len(raw) - 1):
            yield {**newer, name: raw[:length]}
    elif kind == "delete":
        yield {other: content for other, content in newer.items() if other != name}
    elif kind == "swap":
        for _ in range(3):  # two of its pages; of a slab also the whole with another
            one, two = random.sample(range(len(raw) // 4096), 2)
            pages = [raw[i * 4096 : (i + 1) * 4096] for i in range(-(-len(raw) // 4096))]
            pages[one], pages[two] = pages[two], pages[one]
            yield {**newer, name: b"".join(pages)}
        if "slab" in name:
            other = str(Path(name).with_name(SLABS[4]))
            yield {**newer, name: newer[other], other: raw}
    elif name in older:
        yield {**newer, name: older[name]}


async def look(path: Path) -> tuple[set[int], DiskTier]:
    """Which chunks come back, each right; once it can be opened. An index may be found damaged when it is read."""
    tier = disk_tier(path)
    for _ in range(3):
        try:
            async with tier.open():
                await tier.delete(b"\7" * 32)  # until all is read
                loads = [load_of(key_of(n), LENGTHS) for n in range(COUNT)]
                hits = await tier.load(loads)
                assert all(is_right(load) for load, hit in zip(loads, hits, strict=True) if hit)
                stale = [load_of(key_of(n), LENGTHS) for n in range(1000, 1000 + COUNT // 2)]
                hits_of_stale = await tier.load(stale)
                assert all(is_right(load) for load, hit in zip(stale, hits_of_stale, strict=True) if hit)
                return {n for n, hit in enumerate(hits) if hit}, tier
        except Unavailable:
            continue
    raise AssertionError("it can't be opened any more")


@pytest.mark.parametrize("kind", ["flip", "cut", "delete", "swap", "older copy"])
@pytest.mark.parametrize("name", [SLABS[1], SLABS[2], INDEX_NAME, WAL_NAME])
async def test_no_damage_gives_a_wrong_byte_or_costs_more_than_was_damaged_or_goes_unsaid(
    left: tuple[Files, Files], tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, name: str
) -> None:
    newer, older = left
    caplog.set_level(logging.WARNING, "lmcache_trio.disk")
    for number, files in enumerate(damaged(kind, name, newer, older, Random(f"{kind} {name}"))):
        path = tmp_path / str(number)
        for file, content in files.items():
            (path / file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            (path / file).write_bytes(content)
        path.chmod(0o700)
        caplog.clear()
        there, tier = await look(path)
        counted = {key: int(tier.statistics()[key]) for key in SAYS}
        lost = COUNT - len(there)
        what = f"{kind} of {name} #{number}: {lost} lost, {counted}, {caplog.messages}"
        if lost:
            assert any(counted.values()), what
            assert caplog.messages, what
        if "slab" in name:
            chunks = 2 if kind == "flip" else 17 * (2 if kind == "swap" and number == 3 else 1)
            assert lost <= chunks, what
            assert counted["corrupt"] + counted["lost_slabs"] >= lost, what
        elif name == WAL_NAME:
            assert lost <= COUNT // 3 or counted["lost_index"], what
        async with tier.open():
            assert all(await tier.store([record_of(key_of(n), LENGTHS) for n in range(COUNT)])), what
        assert (await look(path))[0] == set(range(COUNT)), what
