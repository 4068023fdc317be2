"""Engines and servers under all that happens to them, for SOAK_SECONDS (40); every loaded byte is compared.

`nox -s soak` runs ten minutes of it. SOAK_SEED is another seed than 1, SOAK_OUT a folder for `soak.json`, the figures.
Behind it: what the soak must find is planted, and found.
"""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from support.soak.engine import LAYOUTS, POISON, Weights, contents, owner_of, prompt
from support.soak.figures import GROWTH, LONG, grown, unreturned
from support.soak.scene import DISK_FILE_SYSTEM, MEMORY, Bad, Scene

from lmcache_trio.bench.machine import describe

SECONDS = float(os.environ.get("SOAK_SECONDS", "40"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
OUT = os.environ.get("SOAK_OUT", "")
MIB = 1 << 20


@pytest.fixture
def scenes(tmp_path: Path) -> Iterator[tuple[Scene, Scene]]:
    """A steady server and a restarted one, each with two engines and, where we may mount one, a disk that can fill."""
    with ExitStack() as stack:
        folders = [tmp_path / name for name in ("steady", "restarted")]
        fillers = [_small_disk(folder / "disk", stack) for folder in folders]
        yield (
            Scene("steady", folders[0], SEED, engines=2, filler=fillers[0]),
            Scene("restarted", folders[1], SEED, engines=2, filler=fillers[1], restarted=True),
        )


def _small_disk(place: Path, stack: ExitStack) -> Path | None:
    """A file system of its own at *place*; where it may be filled. None: this machine does not let us mount one."""
    place.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_FILE_SYSTEM}", "soak", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True, timeout=30, check=False).returncode:
        return None
    stack.callback(lambda: subprocess.run(["umount", "-l", place], check=True, timeout=30))
    return place / "filler"


async def test_no_wrong_byte_is_loaded_and_nothing_is_left_whatever_happens(
    scenes: tuple[Scene, Scene], capsys: pytest.CaptureFixture[str]
) -> None:
    steady, restarted = scenes
    with capsys.disabled():
        print(f"\n[soak: {SECONDS:.0f} s, SOAK_SEED={SEED}", end=" ", flush=True)
    with trio.fail_after(SECONDS + 300):
        async with trio.open_nursery() as nursery:
            for scene in scenes:
                nursery.start_soon(scene.run)
            await trio.sleep(SECONDS)
            while _missing(steady, restarted):  # noqa: ASYNC110 - a slow machine takes longer
                await trio.sleep(1)
            for scene in scenes:
                scene.finish()
    done = steady.done() + restarted.done()
    times = [seen["time"] for seen in steady.samples]
    growth = grown(times, [seen["anonymous"] for seen in steady.samples])
    with capsys.disabled():
        print(f"{dict(sorted(done.items()))}, memory {growth:+.1%}]", end=" ", flush=True)
    if OUT:
        _write(Path(OUT) / "soak.json", scenes, done, growth)
    if SECONDS >= LONG:
        assert growth < GROWTH


def _missing(steady: Scene, restarted: Scene) -> set[str]:
    """What has not happened yet, without which a soak says little."""
    wanted = {"compared blocks, shm", "compared blocks, device", "stores", "aborts", "resets", "layout changes"}
    wanted |= {"engine kills", "engine stops", "server kills"}
    wanted |= {"disk fills"} if steady.filler is not None else set()
    missing = wanted - (steady.done() + restarted.done()).keys()
    disk = [seen["tiers"][0] for seen in steady.samples[-1:]]
    missing |= set() if any(tier["loads"] for tier in disk) else {"loads from the disk"}
    return missing | (set() if any(tier["backend"]["evicted"] for tier in disk) else {"evictions from the disk"})


def _write(path: Path, scenes: tuple[Scene, Scene], done: Counter[str], growth: float) -> None:
    """The figures as columns, which docs/plots/soak.py draws."""
    columns: dict[str, Callable[[dict[str, Any]], float]] = {
        "seconds": lambda seen: round(seen["time"], 1),
        "anonymous MiB": lambda seen: round(seen["anonymous"] / MIB, 2),
        "resident MiB": lambda seen: round(seen["rss"] / MIB, 2),
        "descriptors": lambda seen: seen["descriptors"] + seen["disk_descriptors"],
        "tasks": lambda seen: seen["held"]["tasks"],
        "connections": lambda seen: seen["held"]["connections"],
        "disk MiB": lambda seen: round(seen["tiers"][0]["backend"].get("bytes_taken", 0) / MIB, 2),
        "compared MiB": lambda seen: round(seen["done"].get("compared bytes", 0) / MIB, 1),
    }
    written = {
        "machine": describe(),
        "command": f"nox -s soak -- --seconds {SECONDS:.0f} --seed {SEED}",
        "growth": round(growth, 4),
        "done": dict(sorted(done.items())),
        **{
            scene.name: {name: [of(seen) for seen in scene.samples] for name, of in columns.items()} for scene in scenes
        },
    }
    path.write_text(json.dumps(written) + "\n")


# --- what the soak must find ----------------------------------------------------------------------------------------


class Arena:
    """The memory of a server, which only it and its clients should write."""

    def __init__(self, pid: int, first: int, last: int) -> None:
        self._memory = Path(f"/proc/{pid}/mem")
        self._first, self._size = first, last - first

    @classmethod
    def of(cls, pid: int) -> "Arena | None":
        """None: the server has not mapped it yet, because nothing has touched it."""
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if "rw-s" in line and last - first >= MEMORY:
                return cls(pid, first, last)
        return None

    def flip(self) -> None:
        """One byte of each page is another."""
        with self._memory.open("r+b", buffering=0) as memory:
            for offset in range(self._size - MEMORY, self._size, 4096):
                memory.seek(self._first + offset + 100)
                (byte,) = memory.read(1)
                memory.seek(self._first + offset + 100)
                memory.write(bytes([(byte + 1) % 256]))  # another one each time

    def turn(self) -> None:
        """Each page has what was in the next."""
        with self._memory.open("r+b", buffering=0) as memory:
            memory.seek(self._first + self._size - MEMORY)
            held = memory.read(MEMORY)
            memory.seek(self._first + self._size - MEMORY)
            memory.write(held[4096:] + held[:4096])


@pytest.mark.parametrize(("path", "harm"), [("shm", Arena.flip), ("device", Arena.turn)])
async def test_a_planted_wrong_byte_is_found_with_all_that_is_known_of_it(
    tmp_path: Path, path: str, harm: Callable[[Arena], None]
) -> None:
    (tmp_path / "disk").mkdir()
    scene = Scene("planted", tmp_path, 7, engines=1, path=path)

    async def plant() -> None:
        """Again and again: an engine may leave before it loads what was harmed, and the next want something else."""
        while True:
            await trio.sleep(0.5)
            if scene.server is not None and (arena := Arena.of(scene.server.pid)) is not None:
                harm(arena)

    with trio.fail_after(500):
        with pytest.RaisesGroup(
            pytest.RaisesExc(Bad, match="a wrong byte was loaded"), flatten_subgroups=True
        ) as caught:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(plant)
                nursery.start_soon(scene.run)
    said = str(_only(caught.value))
    found = json.loads(said[said.index("{") :])
    assert found["path"].startswith(path)
    assert found["wanted"] != found["found"]
    assert {"seed", "step", "request", "weights", "layout", "first wrong byte"} <= found.keys()


def _only(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        (group,) = group.exceptions
    return group


async def test_a_server_that_ends_by_itself_is_found(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    scene = Scene("ended", tmp_path, 7, engines=0)

    async def end() -> None:
        while not scene.samples:  # noqa: ASYNC110 - nobody tells
            await trio.sleep(0.1)
        if scene.server is not None:
            scene.server.terminate()

    with trio.fail_after(120):
        with pytest.RaisesGroup(pytest.RaisesExc(Bad, match="server ended by itself with 0"), flatten_subgroups=True):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end)
                nursery.start_soon(scene.run)


def test_whose_a_wrong_byte_is_can_be_told() -> None:
    held = contents(Weights("model 1", "weights 0"), LAYOUTS[1], prompt(3))[11]
    assert owner_of(held[100:132], 100) == "block 11 of prompt 3 of model 1 with weights 0 in layout b"
    assert owner_of(bytes([POISON]) * 32, 100).startswith("nobody's")
    assert owner_of(bytes(32), 100) == "not known"


def test_a_line_through_noise_is_growth_and_noise_is_none() -> None:
    random = Random(5)
    times = [float(second) for second in range(600)]
    noise = [random.uniform(38, 44) * MIB for _ in times]
    start = [8 * MIB * min(1.0, second / 150) for second in times]
    assert abs(grown(times, [a + b for a, b in zip(start, noise, strict=True)])) < GROWTH / 2
    leak = [value + 100 * 80 * second for value, second in zip(noise, times, strict=True)]  # 80 bytes in 100 requests/s
    assert grown(times, leak) > GROWTH


def test_what_is_held_without_a_client_is_named() -> None:
    held = {"connections": 1, "tasks": 12, "chunks_ready": 40, "bytes_free": 100, "leases": 0, "pins": 2}
    assert unreturned(held) == {"pins": 2}
    assert unreturned({**held, "pins": 0, "connections": 2}) == {"connections": 2}
