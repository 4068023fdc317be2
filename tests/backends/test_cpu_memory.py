"""The cpu memory: the contract, what a dead server left, and what happens when the file system refuses."""

import ctypes
import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
from lmcache_trio_backends import cpu
from lmcache_trio_backends._memory_limits import ProcessMemory
from lmcache_trio_backends.cpu import CpuConfig, CpuMemory, remove_leftovers

from lmcache_trio.errors import ConfigError
from lmcache_trio.testing.memory_contract import MemoryContract

MIB = 1 << 20
_libc = ctypes.CDLL(None)


class TestCpuMemory(MemoryContract):
    def make(self, size: int) -> CpuMemory:
        return CpuMemory(CpuConfig(size=size))


def _arenas(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.arena"))


@pytest.fixture
def other_server(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A live process with an arena of its own in tmp_path."""
    code = (
        "import sys, trio\n"
        "from lmcache_trio_backends.cpu import CpuConfig, CpuMemory\n"
        "async def main():\n"
        "    async with CpuMemory(CpuConfig(size=1 << 20, directory=sys.argv[1])).open():\n"
        "        print('open', flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        yield process
        process.kill()


async def test_the_next_start_removes_what_a_killed_server_left(
    tmp_path: Path, other_server: "subprocess.Popen[bytes]"
) -> None:
    (left,) = _arenas(tmp_path)
    other_server.send_signal(signal.SIGKILL)
    other_server.wait()
    assert left.exists()
    memory = CpuMemory(CpuConfig(size=MIB, directory=str(tmp_path)))
    async with memory.open():
        assert not left.exists()
        assert _arenas(tmp_path) == [Path(memory.path)]


async def test_a_live_servers_file_is_untouched_by_a_second_start(
    tmp_path: Path, other_server: "subprocess.Popen[bytes]"
) -> None:
    (live,) = _arenas(tmp_path)
    before = live.stat()
    async with CpuMemory(CpuConfig(size=MIB, directory=str(tmp_path))).open():
        assert live.stat() == before
        assert len(_arenas(tmp_path)) == 2
    assert _arenas(tmp_path) == [live]


def test_a_start_that_lost_its_file_before_the_lock_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    raced: list[str] = []

    def flock(fd: int, operation: int) -> None:
        if not raced:
            raced.append(os.readlink(f"/proc/self/fd/{fd}"))
            assert remove_leftovers(tmp_path) == raced
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    path, fd = cpu._create(tmp_path)
    try:
        assert path not in raced
        assert _arenas(tmp_path) == [Path(path)]
    finally:
        os.close(fd)


def test_files_of_others_and_links_are_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("x")
    link = tmp_path / f"lmcache-trio-{os.getuid()}-1-ab.arena"
    link.symlink_to(target)
    other = tmp_path / "lmcache-trio-99999999-1-ab.arena"
    other.write_text("x")
    assert remove_leftovers(tmp_path) == []
    assert target.exists()
    assert link.is_symlink()
    assert other.exists()


async def test_when_the_file_system_refuses_the_arena_stays_at_what_it_has_and_one_line_names_the_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = 40 * MIB
    real = os.posix_fallocate

    def fallocate(fd: int, offset: int, length: int) -> None:
        if offset + length > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    memory = CpuMemory(CpuConfig(size=256 * MIB))
    with caplog.at_level(logging.WARNING, "lmcache_trio.memory"):
        async with memory.open():
            taken = 0
            while (more := await memory.grow()) != taken:
                taken = more
            assert 38 * MIB < taken <= room
            assert await memory.grow() == taken
            memory.view(taken - 8, 8).release()
    (line,) = [record.getMessage() for record in caplog.records]
    for word in ("stays at", "of 256 MiB", "/dev/shm", "memory.size"):
        assert word in line


async def test_the_arena_is_taken_in_pieces_of_256_mib_at_most_by_one_thread_that_is_not_the_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    threads: set[int] = set()

    def fallocate(fd: int, offset: int, length: int) -> None:
        asked.append((offset, length))
        if offset:
            threads.add(_libc.gettid())

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    monkeypatch.setattr(cpu, "_fitting_size", lambda config: config.size)
    size = 5 * 256 * MIB + 3 * MIB
    memory = CpuMemory(CpuConfig(size=size, directory=str(tmp_path)))
    async with memory.open():
        while await memory.grow() < size:
            pass
    head, first, *others = asked
    assert head == (0, 4096)  # the nonce's page, before anyone may open the file
    assert [offset for offset, _ in others] == list(accumulate([length for _, length in asked]))[1:-1]  # no gap
    assert sum(length for _, length in asked) == size
    assert max(length for _, length in asked) == 256 * MIB
    assert first[1] < 256 * MIB  # the first one is small, so that there are slots at once
    assert len(threads) == 1
    assert _libc.gettid() not in threads


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"size": 1 << 60}, "memory.size", "this machine's memory"),
        ({"size": 17}, "size", "hold no chunk"),
        ({"size": MIB, "directory": "/nowhere/at/all"}, "memory.directory", "No such file"),
    ],
)
def test_a_size_or_directory_that_does_not_fit_is_refused_by_name(
    settings: dict[str, object], key: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        CpuMemory(CpuConfig(**settings))  # type: ignore[arg-type]
    assert caught.value.key == key


def test_a_size_larger_than_the_file_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "memory_of_process", lambda: ProcessMemory(1 << 62, 1 << 62, "memory"))
    with pytest.raises(ConfigError, match="/dev/shm, which has") as caught:
        CpuMemory(CpuConfig(size=1 << 61))
    assert caught.value.key == "memory.size"


def test_without_a_size_the_arena_takes_a_quarter_of_memory_and_at_most_half_of_the_file_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = os.statvfs("/dev/shm")
    half = space.f_frsize * space.f_blocks // 2
    monkeypatch.setattr(cpu, "memory_of_process", lambda: ProcessMemory(4 * half, 4 * half, "memory"))
    assert CpuMemory(CpuConfig()).size == half // 4096 * 4096
    monkeypatch.setattr(cpu, "memory_of_process", lambda: ProcessMemory(400 * MIB, 400 * MIB, "memory"))
    assert CpuMemory(CpuConfig()).size == 100 * MIB
