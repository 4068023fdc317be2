"""The devices, held to their contract; and what the host device refuses to open."""

import fcntl
import os
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import attrs
import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from lmcache_trio_backends.auto_device import AutoConfig, AutoDevice
from lmcache_trio_backends.cpu import CpuConfig, CpuMemory
from lmcache_trio_backends.host_device import AttachedHost, HostConfig, HostDevice, copy_blocks

from lmcache_trio._core.transfer.exports import DType, TensorView
from lmcache_trio.abc import Copy, CudaMemory, Device, Direction, Export, Memory, SharedMemory
from lmcache_trio.adapters.shared_kv import SharedRegion
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.testing.device_contract import DeviceContract, EngineMemory, MakeDevice, MakeEngineMemory
from lmcache_trio.testing.fake_device import FakeConfig, FakeDevice


def is_in_loop() -> bool:
    """Is this thread one that runs a Trio loop?"""
    try:
        trio.lowlevel.current_trio_token()
    except RuntimeError:
        return False
    return True


class RegionMemory(EngineMemory):
    """This process is the engine."""

    def __init__(self, device: Device, size: int) -> None:
        self.region = SharedRegion(size)
        self.array = self.region.take_array()

    def memory(self) -> SharedMemory:
        return self.region.memory()

    def start(self) -> int:
        return 0

    def read(self, offset: int, length: int) -> bytes:
        return self.array[offset : offset + length].tobytes()

    def write(self, offset: int, data: bytes) -> None:
        self.array[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)


class FakeMemory(EngineMemory):
    def __init__(self, device: Device, size: int) -> None:
        assert isinstance(device, FakeDevice)
        self.named, self.bytes = device.engine_memory(size)

    def memory(self) -> SharedMemory:
        return self.named

    def start(self) -> int:
        return 0

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.bytes[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data


class TestHostDevice(DeviceContract):
    @pytest.fixture
    def make_device(self) -> MakeDevice:
        return lambda: HostDevice(HostConfig())

    @pytest.fixture
    def engine_memory(self) -> MakeEngineMemory:
        return RegionMemory


class TestAutoDevice(DeviceContract):
    @pytest.fixture
    def make_device(self) -> MakeDevice:
        return lambda: AutoDevice(AutoConfig())

    @pytest.fixture
    def engine_memory(self) -> MakeEngineMemory:
        return RegionMemory


class TestFakeDevice(DeviceContract):
    @pytest.fixture
    def make_device(self) -> MakeDevice:
        return lambda: FakeDevice(FakeConfig(patient=False))

    @pytest.fixture
    def engine_memory(self) -> MakeEngineMemory:
        return FakeMemory


def export(memory: SharedMemory | CudaMemory) -> Export:
    view = TensorView(0, 0, DType.uint8, (4, 4096), (4096, 1))
    return Export((memory,), (view,), 4)


SIZE = 5 * 4096


@pytest.fixture
def open_file() -> Iterator[Callable[..., int]]:
    opened: list[int] = []

    def make(size: int, *, seals: int = 0, sparse: bool = False) -> int:
        fd = os.memfd_create("engine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        opened.append(fd)
        if sparse:
            os.ftruncate(fd, size)
        else:
            os.posix_fallocate(fd, 0, size)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    yield make
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ({}, "could vanish"),
        ({"seals": fcntl.F_SEAL_SHRINK, "sparse": True}, "could vanish"),
        ({"seals": fcntl.F_SEAL_SHRINK, "size": SIZE - 4096}, f"has {SIZE - 4096} bytes, not {SIZE}"),
    ],
    ids=["not sealed", "not backed by memory", "too short"],
)
async def test_the_host_device_opens_no_memory_that_could_kill_the_server(
    open_file: Callable[..., int], kind: dict[str, int], why: str
) -> None:
    fd = open_file(**{"size": SIZE, **kind})
    async with open_memory() as memory:
        device = HostDevice(HostConfig())
        async with device.open(memory):
            with pytest.raises(Misuse, match=why):
                await device.attach(export(SharedMemory(SIZE, fd)))


async def test_the_host_device_opens_nothing_but_memory() -> None:
    reader, writer = os.pipe()
    try:
        async with open_memory() as memory:
            device = HostDevice(HostConfig())
            async with device.open(memory):
                with pytest.raises(Misuse, match="is no memory"):
                    await device.attach(export(SharedMemory(SIZE, writer)))
                with pytest.raises(Unavailable, match="cannot be mapped"):
                    await device.attach(export(SharedMemory(SIZE, 999_999)))
                with pytest.raises(Unavailable, match="shared host memory alone"):
                    await device.attach(export(CudaMemory(SIZE, bytes(64), bytes(16))))
    finally:
        os.close(reader)
        os.close(writer)


async def test_what_was_attached_is_unmapped_when_it_is_detached() -> None:
    region = SharedRegion(4 * 4096)
    async with open_memory() as memory:
        device = HostDevice(HostConfig())
        async with device.open(memory):
            before = mappings(region)
            attached = await device.attach(export(region.memory()))
            assert mappings(region) == before + 1
            ticket = device.start(Copy(attached, Direction.STORE, [4096], [0, 1, 2, 3], 4))
            with trio.fail_after(5):
                await device.wait_ended(ticket)
            in_loop: list[bool] = []
            assert isinstance(attached, AttachedHost)
            weakref.finalize(attached.groups[0].runs[0], lambda: in_loop.append(is_in_loop()))
            device.detach(attached)
            del attached, ticket
            assert device._unmapping is not None
            await device._unmapping.run(int)  # behind it in the queue
            assert mappings(region) == before
            assert in_loop == [False]  # others are served meanwhile


async def test_what_an_attach_mapped_before_it_was_cancelled_is_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    region = SharedRegion(4 * 4096)
    async with open_memory() as memory, trio.open_nursery() as nursery:
        device = HostDevice(HostConfig())
        async with device.open(memory):
            before, populating = mappings(region), trio.Event()

            async def hold() -> None:
                populating.set()
                await trio.sleep_forever()

            monkeypatch.setattr(device, "_populate_arena", hold)
            nursery.start_soon(device.attach, export(region.memory()))
            with trio.fail_after(5):
                await populating.wait()
            assert mappings(region) == before + 1
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()
                assert device._unmapping is not None
                await device._unmapping.run(int)
            assert mappings(region) == before


class SlowToOpen(FakeDevice):
    """Stands in for the cuda device, which loads a driver first."""

    made = 0

    def __init__(self, config: object) -> None:
        super().__init__()
        SlowToOpen.made += 1

    @asynccontextmanager
    async def open(self, memory: Memory) -> AsyncIterator[None]:
        await trio.testing.wait_all_tasks_blocked()
        async with super().open(memory):
            yield


async def test_engines_that_come_at_once_share_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_trio_backends.cuda_device.CudaDevice", SlowToOpen)
    monkeypatch.setattr(SlowToOpen, "made", 0)
    device = AutoDevice(AutoConfig())
    async with open_memory() as memory, device.open(memory):

        async def attach() -> None:
            with pytest.raises(Misuse):  # the fake was not told of this memory
                await device.attach(export(CudaMemory(SIZE, bytes(64), bytes(16))))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(attach)
    assert SlowToOpen.made == 1


async def test_pages_of_the_arena_that_come_after_an_engine_are_entered_before_its_copies() -> None:
    """One by one, under a copy, they cost five times as much as the copy."""
    memory, region = CpuMemory(CpuConfig(size=40 << 20)), SharedRegion(4 * 4096)
    device = HostDevice(HostConfig())
    async with memory.open(), device.open(memory):
        await device.arena_grew()
        assert entered(memory) < 1 << 20, "nobody needs them yet"
        first = await memory.grow()
        attached = await device.attach(export(region.memory()))
        assert entered(memory) >= first
        while await memory.grow() < memory.size:
            pass
        await device.arena_grew()
        assert entered(memory) >= memory.size
        device.detach(attached)


def entered(memory: CpuMemory) -> int:
    """Bytes of *memory*'s arena that this process has in its page table."""
    arena = os.fstat(memory.descriptor).st_ino  # another test's may not have been collected yet
    with open("/proc/self/smaps") as maps:
        lines = iter(maps)
        for line in lines:
            if "/memfd:lmcache-trio arena" in line and int(line.split()[4]) == arena:
                return 1024 * int(next(entry for entry in lines if entry.startswith("Rss:")).split()[1])
    return 0


def test_a_region_goes_with_its_last_view() -> None:
    region = SharedRegion(1 << 20)
    fd, view = region.descriptor, region.take_array()[5:10]
    del region
    os.fstat(fd)
    view[0] = 1
    del view
    with pytest.raises(OSError):
        os.fstat(fd)


WITHOUT_CUDA = """
import os, sys, trio

class Tripwire:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cuda", "torch") or name.endswith("cuda_device"):
            raise SystemExit(f"{name} was imported")

sys.meta_path.insert(0, Tripwire())
from lmcache_trio import Config, open_server
from lmcache_trio.abc import Copy, Direction, Export
from lmcache_trio._core.transfer.exports import DType, TensorView
from lmcache_trio.adapters.shared_kv import SharedRegion

async def main():
    region = SharedRegion(4 * 4096)
    view = TensorView(0, 0, DType.uint8, (4, 4096), (4096, 1))
    config = Config(address=f"unix://{sys.argv[1]}/s.ipc", memory={"backend": "cpu", "size": 1 << 20})
    async with open_server(config) as server:
        device = server._parts.transfer._device
        print(type(device).__name__)
        attached = await device.attach(Export((region.memory(),), (view,), 4))
        await device.wait_ended(device.start(Copy(attached, Direction.STORE, [4096], [0, 1], 2)))
        device.detach(attached)
        print(device.statistics()["copies"])

trio.run(main)
"""


def test_a_server_that_starts_and_opens_shared_memory_looks_for_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_CUDA, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout.split()) == (0, ["AutoDevice", "1"]), found.stderr


# --- every layout there is ------------------------------------------------------------------------------------------


class Bytes:
    """An arena without a file."""

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)

    def view(self, offset: int, length: int) -> memoryview:
        return memoryview(self.bytes)[offset : offset + length]


@attrs.frozen
class Case:
    """An export, what its allocations hold, and a copy of blocks of one of its groups."""

    export: Export
    held: list[bytes]
    direction: Direction
    chunk_blocks: int
    blocks: list[int]
    group: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_blocks = draw(st.sampled_from([1, 3, 4, 7]))
    ends = [0] * draw(st.integers(1, 2))
    views: list[TensorView] = []
    for _ in range(draw(st.integers(1, 5))):
        groups = len({view.group for view in views})
        group = draw(st.integers(0, groups))
        if group == groups and views and draw(st.booleans()):  # in the bytes of another group's layer
            views.append(attrs.evolve(draw(st.sampled_from(views)), group=group))
            continue
        allocation = draw(st.integers(0, len(ends) - 1))
        length, gap = draw(st.sampled_from([1, 4, 4, 5])), draw(st.sampled_from([0, 0, 4]))
        start = ends[allocation] + draw(st.sampled_from([0, 0, 1, 4, 8]))
        step = length + gap
        if draw(st.booleans()):
            view = TensorView(
                allocation, start, DType.uint8, (2, num_blocks, length), (num_blocks * step, step, 1), group
            )
            ends[allocation] = start + 2 * num_blocks * step
        else:
            view = TensorView(allocation, start, DType.uint8, (num_blocks, length), (step, 1), group)
            ends[allocation] = start + num_blocks * step
        views.append(view)
    sizes = [end or 1 for end in ends]
    made = Export(tuple(SharedMemory(size, 3) for size in sizes), tuple(views), num_blocks)
    direction, width = draw(st.sampled_from(Direction)), draw(st.integers(1, min(3, num_blocks)))
    chunks = draw(st.integers(1, num_blocks // width))
    blocks = draw(st.permutations(range(num_blocks)))[: chunks * width]
    if direction is Direction.LOAD:
        blocks = [draw(st.sampled_from([block, block, -1])) for block in blocks]
    held = [draw(st.randoms()).randbytes(size) for size in sizes]
    return Case(made, held, direction, width, blocks, draw(st.integers(0, len(made.pieces) - 1)))


def byte_by_byte(case: Case, slots: list[int], engine: list[bytearray], arena: bytearray) -> None:
    """What the copy is to do, without a thought for speed."""
    at = 0
    for piece in case.export.pieces[case.group]:
        for i, block in enumerate(case.blocks):
            chunk, place = divmod(i, case.chunk_blocks)
            for byte in range(piece.length):
                here = slots[chunk] + at + place * piece.length + byte
                there = piece.offset + block * piece.stride + byte
                if block < 0:
                    continue
                if case.direction is Direction.STORE:
                    arena[here] = engine[piece.allocation][there]
                else:
                    engine[piece.allocation][there] = arena[here]
        at += case.chunk_blocks * piece.length


@given(case=cases())
@settings(max_examples=300, deadline=None)
def test_the_host_device_moves_every_layout_byte_for_byte(case: Case) -> None:
    chunks = len(case.blocks) // case.chunk_blocks
    slot = case.chunk_blocks * case.export.group_block_bytes[case.group]
    slots = [5 + i * (slot + 3) for i in reversed(range(chunks))]
    memory: Any = Bytes(10 + chunks * (slot + 3))
    memory.bytes[:] = Random(7).randbytes(len(memory.bytes))
    engine, arena = [bytearray(held) for held in case.held], bytearray(memory.bytes)
    byte_by_byte(case, slots, engine, arena)
    maps = [np.frombuffer(bytearray(held), dtype=np.uint8) for held in case.held]
    copy = Copy(AttachedHost(case.export, maps), case.direction, slots, case.blocks, case.chunk_blocks, case.group)
    assert copy_blocks(copy, memory) == chunks * slot
    assert [held.tobytes() for held in maps] == [bytes(held) for held in engine]
    assert memory.bytes == arena


def mappings(region: SharedRegion) -> int:
    with open("/proc/self/maps") as maps:
        return sum(f" {os.fstat(region.descriptor).st_ino} " in line and "lmcache-trio" in line for line in maps)


def open_memory() -> "OpenMemory":
    return OpenMemory()


class OpenMemory:
    def __init__(self) -> None:
        self._memory = CpuMemory(CpuConfig(size=1 << 20))
        self._open = self._memory.open()

    async def __aenter__(self) -> Memory:
        await self._open.__aenter__()
        while await self._memory.grow() < self._memory.size:
            pass
        return self._memory

    async def __aexit__(self, *exc: object) -> None:
        await self._open.__aexit__(None, None, None)
