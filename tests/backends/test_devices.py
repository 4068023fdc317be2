"""The devices, held to their contract; and what the host device refuses to open."""

import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import trio
import trio.testing
from lmcache_trio_backends.auto_device import AutoConfig, AutoDevice
from lmcache_trio_backends.cpu import CpuConfig, CpuMemory
from lmcache_trio_backends.host_device import HostConfig, HostDevice

from lmcache_trio._core.exports import DType, TensorView
from lmcache_trio.abc import Copy, CudaMemory, Device, Direction, Export, Memory, SharedMemory
from lmcache_trio.adapters.shared_kv import SharedRegion
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.testing.device_contract import DeviceContract, EngineMemory, MakeDevice, MakeEngineMemory
from lmcache_trio.testing.fake_device import FakeConfig, FakeDevice


class RegionMemory(EngineMemory):
    """This process is the engine."""

    def __init__(self, device: Device, size: int) -> None:
        self.region = SharedRegion(size)
        self.array = self.region.take_array()

    def memory(self) -> SharedMemory:
        return self.region.memory()

    def start(self) -> int:
        return self.region.file_size - len(self.array)

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
    view = TensorView(0, 4096, DType.uint8, (4, 4096), (4096, 1))
    return Export((memory,), (view,), 4)


@pytest.fixture
def open_file() -> Iterator[Callable[..., int]]:
    opened: list[int] = []

    def make(size: int, *, seals: int = 0, sparse: bool = False, nonce: bytes = b"n" * 16) -> int:
        fd = os.memfd_create("engine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        opened.append(fd)
        if sparse:
            os.ftruncate(fd, size)
        else:
            os.posix_fallocate(fd, 0, size)
        os.pwrite(fd, nonce, 0)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return fd

    yield make
    for fd in opened:
        os.close(fd)


SIZE = 5 * 4096


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ({}, "could vanish"),
        ({"seals": fcntl.F_SEAL_SHRINK, "sparse": True}, "could vanish"),
        ({"seals": fcntl.F_SEAL_SHRINK, "nonce": b"m" * 16}, "is not the memory"),
    ],
    ids=["not sealed", "not backed by memory", "another nonce"],
)
async def test_the_host_device_opens_no_memory_that_could_kill_the_server(
    open_file: Callable[..., int], kind: dict[str, int], why: str
) -> None:
    fd = open_file(SIZE, **kind)
    async with open_memory() as memory:
        device = HostDevice(HostConfig())
        async with device.open(memory):
            with pytest.raises(Misuse, match=why):
                await device.attach(export(SharedMemory(SIZE, fd, os.fstat(fd).st_ino, b"n" * 16)), os.getpid())


async def test_the_host_device_opens_nothing_but_memory() -> None:
    reader, writer = os.pipe()
    try:
        async with open_memory() as memory:
            device = HostDevice(HostConfig())
            async with device.open(memory):
                with pytest.raises(Misuse, match="is not the memory"):
                    await device.attach(
                        export(SharedMemory(SIZE, writer, os.fstat(writer).st_ino, b"n" * 16)), os.getpid()
                    )
                with pytest.raises(Unavailable, match="cannot be opened"):
                    await device.attach(export(SharedMemory(SIZE, 999_999, 1, b"n" * 16)), os.getpid())
                with pytest.raises(Unavailable, match="shared host memory alone"):
                    await device.attach(export(CudaMemory(SIZE, bytes(64), bytes(16))), os.getpid())
    finally:
        os.close(reader)
        os.close(writer)


async def test_what_was_attached_is_unmapped_when_it_is_detached() -> None:
    region = SharedRegion(4 * 4096)
    async with open_memory() as memory:
        device = HostDevice(HostConfig())
        async with device.open(memory):
            before = mappings(region)
            attached = await device.attach(export(region.memory()), os.getpid())
            assert mappings(region) == before + 1
            ticket = device.start(Copy(attached, Direction.STORE, [4096], [0, 1, 2, 3], 4, (0, 1)))
            with trio.fail_after(5):
                await device.wait_ended(ticket)
            device.detach(attached)
            del attached, ticket
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
                await device.attach(export(CudaMemory(SIZE, bytes(64), bytes(16))), os.getpid())

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(attach)
    assert SlowToOpen.made == 1


def test_a_region_goes_with_its_last_view() -> None:
    region = SharedRegion(1 << 20)
    fd, view = region.descriptor, region.take_array()[5:10]
    del region
    os.fstat(fd)
    view[0] = 1
    del view
    with pytest.raises(OSError):
        os.fstat(fd)


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
