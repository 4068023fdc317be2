"""The cpu memory: the contract, what a killed server leaves, and what happens when there is no more memory."""

import ctypes
import errno
import logging
import os
import subprocess
import sys
from itertools import accumulate

import pytest
from lmcache_trio_backends import cpu
from lmcache_trio_backends._memory_limits import ProcessMemory
from lmcache_trio_backends.cpu import CpuConfig, CpuMemory

from lmcache_trio.errors import ConfigError
from lmcache_trio.testing.memory_contract import MemoryContract

MIB = 1 << 20
_libc = ctypes.CDLL(None)


class TestCpuMemory(MemoryContract):
    def make(self, size: int) -> CpuMemory:
        return CpuMemory(CpuConfig(size=size))


def test_a_killed_server_leaves_nothing_behind() -> None:
    code = (
        "import trio\n"
        "from lmcache_trio_backends.cpu import CpuConfig, CpuMemory\n"
        "async def main():\n"
        "    async with CpuMemory(CpuConfig(size=64 << 20)).open():\n"
        "        print('open', flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        process.kill()
        process.wait()
    assert not [name for name in os.listdir("/dev/shm") if str(process.pid) in name.split("-")]


@pytest.mark.parametrize("refused", [None, errno.EINVAL])
async def test_an_arena_is_never_to_be_executed_where_the_kernel_can_promise_that(
    refused: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = os.memfd_create, list[int]()

    def memfd_create(name: str, flags: int) -> int:
        asked.append(flags)
        if refused is not None and len(asked) == 1:
            raise OSError(refused, os.strerror(refused))
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    async with CpuMemory(CpuConfig(size=MIB)).open():
        assert [bool(flags & 0x8) for flags in asked] == ([True] if refused is None else [True, False])


async def test_when_the_kernel_refuses_the_arena_stays_at_what_it_has_and_one_line_names_the_limit(
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
    for word in ("stays at", "of 256 MiB", "No space left", "memory.size"):
        assert word in line


async def test_the_arena_is_taken_in_pieces_of_256_mib_at_most_by_one_thread_that_is_not_the_loops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    threads: set[int] = set()

    def fallocate(fd: int, offset: int, length: int) -> None:
        asked.append((offset, length))
        threads.add(_libc.gettid())

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    monkeypatch.setattr(cpu, "_fitting_size", lambda config: config.size)
    size = 5 * 256 * MIB + 3 * MIB
    memory = CpuMemory(CpuConfig(size=size))
    async with memory.open():
        while await memory.grow() < size:
            pass
    first, *others = asked
    assert [offset for offset, _ in others] == list(accumulate([length for _, length in asked]))[:-1]  # no gap
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
    ],
)
def test_a_size_that_does_not_fit_is_refused_by_name(settings: dict[str, object], key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        CpuMemory(CpuConfig(**settings))  # type: ignore[arg-type]
    assert caught.value.key == key


def test_without_a_size_the_arena_takes_a_quarter_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "memory_of_process", lambda: ProcessMemory(400 * MIB, 400 * MIB, "memory"))
    assert CpuMemory(CpuConfig()).size == 100 * MIB
