"""The cuda device over a fake of the driver: its contract, whose waits hold whom, and what is given back."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
from lmcache_trio_backends import _cuda_moves, cuda_device
from lmcache_trio_backends.cpu import CpuConfig, CpuMemory
from lmcache_trio_backends.cuda_device import CudaConfig, CudaDevice
from support.cuda_fake import CUresult, FakeDriver

from lmcache_trio._core.transfer.exports import DType, TensorView
from lmcache_trio.abc import Attached, Copy, CudaMemory, Device, Direction, Export
from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.device_contract import DeviceContract, EngineMemory, MakeDevice, MakeEngineMemory

BLOCKS, BLOCK = 8, 512
SLOT = 4 * BLOCK


class GpuMemory(EngineMemory):
    """The engine's side: it lies at an offset in its allocation, as torch's tensors do."""

    OFFSET = 512

    def __init__(self, driver: FakeDriver, size: int) -> None:
        self.allocation = driver.allocate(size + self.OFFSET)
        driver.cuCtxPushCurrent(100)
        status, handle = driver.cuIpcGetMemHandle(self.allocation.base)
        driver.cuCtxPopCurrent()
        assert status is CUresult.CUDA_SUCCESS
        self.named = CudaMemory(len(self.allocation.bytes), handle.raw.raw, driver.uuids[0])

    def memory(self) -> CudaMemory:
        return self.named

    def start(self) -> int:
        return self.OFFSET

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.allocation.bytes[self.OFFSET + offset : self.OFFSET + offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.allocation.bytes[self.OFFSET + offset : self.OFFSET + offset + len(data)] = data


@pytest.fixture(params=["batches", "one by one", "an older driver"])
def driver(cuda: FakeDriver, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """However copies are submitted; and registrations are so short that moves must be cut."""
    for module in (_cuda_moves, cuda_device):
        monkeypatch.setattr(module, "PIN", 4096 + 1024)
    if request.param == "one by one":
        monkeypatch.delattr(FakeDriver, "cuMemcpyBatchAsync")
    elif request.param == "an older driver":
        cuda.fails["cuMemcpyBatchAsync"] = RuntimeError("function cuMemcpyBatchAsync is not found")
    return cuda


class TestCudaDevice(DeviceContract):
    @pytest.fixture
    def make_device(self, driver: FakeDriver) -> MakeDevice:
        return lambda: CudaDevice(CudaConfig())

    @pytest.fixture
    def engine_memory(self, driver: FakeDriver) -> MakeEngineMemory:
        def make(device: Device, size: int) -> EngineMemory:
            return GpuMemory(driver, size)

        return make


class Rig:
    def __init__(self, device: CudaDevice, memory: CpuMemory, driver: FakeDriver) -> None:
        self.device, self.memory, self.driver = device, memory, driver

    async def engine(self) -> "Engine":
        kv = GpuMemory(self.driver, BLOCKS * BLOCK)
        kv.write(0, os.urandom(BLOCKS * BLOCK))
        view = TensorView(0, kv.OFFSET, DType.uint8, (BLOCKS, BLOCK), (BLOCK, 1))
        attached = await self.device.attach(Export((kv.named,), (view,), BLOCKS))
        return Engine(self, kv, attached)


class Engine:
    def __init__(self, rig: Rig, kv: GpuMemory, attached: Attached) -> None:
        self.rig, self.kv, self.attached = rig, kv, attached

    async def move(self, direction: Direction, slot: int = 4096) -> None:
        copy = Copy(self.attached, direction, [slot], [0, 2, 1, 3], 4)
        with trio.fail_after(20):
            await self.rig.device.wait_ended(self.rig.device.start(copy))


@asynccontextmanager
async def opened(driver: FakeDriver, size: int = 1 << 20, *, grown: bool = True) -> AsyncIterator[Rig]:
    memory, device = CpuMemory(CpuConfig(size=size)), CudaDevice(CudaConfig())
    async with memory.open():
        while grown and await memory.grow() < memory.size:
            pass
        async with device.open(memory):
            yield Rig(device, memory, driver)


async def ended(driver: FakeDriver, wanted: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not wanted():
            await trio.lowlevel.checkpoint()


async def test_everything_that_was_taken_is_given_back(driver: FakeDriver) -> None:
    async with opened(driver) as rig:
        one, other = await rig.engine(), await rig.engine()
        await one.move(Direction.STORE)
        rig.device.detach(one.attached)
        await other.move(Direction.LOAD)
        await rig.device.wait_event(other.attached, happened(driver))
        assert driver.held["streams"] >= 2
    assert driver.leaked == {}


def happened(driver: FakeDriver) -> bytes:
    event = driver.event()
    driver.events[event].set()
    return event


async def test_an_event_that_never_comes_holds_nobody(driver: FakeDriver) -> None:
    async with opened(driver) as rig:
        one, other = await rig.engine(), await rig.engine()
        event = driver.event()
        waited: list[bool] = []

        async def wait() -> None:
            await rig.device.wait_event(one.attached, event)
            waited.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await ended(driver, lambda: driver.held["events"] == 1)
            for engine in (one, other):
                for direction in Direction:
                    await engine.move(direction)
            late = await rig.engine()
            await late.move(Direction.STORE)
            rig.device.detach(late.attached)
            assert waited == []
            driver.events[event].set()
        assert waited == [True]
        with trio.CancelScope() as scope, trio.fail_after(20):
            scope.cancel()
            await rig.device.wait_event(one.attached, driver.event())
        with pytest.raises(Unavailable, match="INVALID_HANDLE"):
            await rig.device.wait_event(other.attached, b"?" * 64)
    for each in driver.events.values():
        each.set()


LAYERS, MANY, CHUNK = 4, 64, 16


async def many_blocks(rig: Rig) -> tuple[Attached, list[int]]:
    """An engine of several layers with many blocks, and where slots for all of them are."""
    kv = GpuMemory(rig.driver, LAYERS * MANY * BLOCK)
    views = [TensorView(0, kv.OFFSET + i * MANY * BLOCK, DType.uint8, (MANY, BLOCK), (BLOCK, 1)) for i in range(LAYERS)]
    attached = await rig.device.attach(Export((kv.named,), tuple(views), MANY))
    return attached, [4096 + i * LAYERS * CHUNK * BLOCK for i in range(MANY // CHUNK)]


@pytest.mark.parametrize("direction", Direction)
async def test_many_scattered_blocks_of_all_layers_are_one_launch(cuda: FakeDriver, direction: Direction) -> None:
    async with opened(cuda) as rig:
        attached, slots = await many_blocks(rig)
        scattered = [block * 37 % MANY for block in range(MANY)]
        assert not any(after == before + 1 for before, after in pairwise(scattered))
        cuda.calls.clear()
        with trio.fail_after(20):
            copy = Copy(attached, direction, slots, scattered, CHUNK)
            await rig.device.wait_ended(rig.device.start(copy))
        assert cuda.calls == {"cuCtxSetCurrent": 1, "cuMemcpyBatchAsync": 1, "cuStreamSynchronize": 1}


@pytest.mark.parametrize("direction", Direction)
async def test_without_batches_blocks_that_lie_together_are_one_launch_a_chunk_and_layer(
    cuda: FakeDriver, monkeypatch: pytest.MonkeyPatch, direction: Direction
) -> None:
    monkeypatch.delattr(FakeDriver, "cuMemcpyBatchAsync")
    async with opened(cuda) as rig:
        attached, slots = await many_blocks(rig)
        cuda.calls.clear()
        with trio.fail_after(20):
            copy = Copy(attached, direction, slots, list(range(MANY)), CHUNK)
            await rig.device.wait_ended(rig.device.start(copy))
        one = "cuMemcpyDtoHAsync" if direction is Direction.STORE else "cuMemcpyHtoDAsync"
        assert cuda.calls == {"cuCtxSetCurrent": 1, one: LAYERS * MANY // CHUNK, "cuStreamSynchronize": 1}


async def test_a_copy_that_the_driver_refuses_is_unavailable_and_costs_no_other(driver: FakeDriver) -> None:
    async with opened(driver) as rig:
        one = await rig.engine()
        for name in ("cuMemcpyBatchAsync", "cuMemcpyDtoHAsync"):
            driver.fails[name] = CUresult.CUDA_ERROR_INVALID_VALUE
        with pytest.raises(Unavailable, match="INVALID_VALUE"):
            await one.move(Direction.STORE)
        driver.fails.clear()
        await one.move(Direction.STORE)
        assert rig.device.statistics()["copies"] == 1


async def test_when_nobody_knows_whether_a_copy_has_ended_it_says_so_and_closes_nothing(driver: FakeDriver) -> None:
    async with opened(driver) as rig:
        one, other = await rig.engine(), await rig.engine()
        driver.fails["cuStreamSynchronize"] = CUresult.CUDA_ERROR_UNKNOWN
        with pytest.raises(RuntimeError, match="nobody knows"):
            await one.move(Direction.STORE)
        driver.fails.clear()
        rig.device.detach(one.attached)
        await other.move(Direction.STORE)
        assert driver.held["opened"] == 2
    assert driver.held["opened"] >= 1


async def test_the_arena_is_pinned_as_it_grows(driver: FakeDriver) -> None:
    async with opened(driver, 40 << 20, grown=False) as rig:
        await rig.device.arena_grew()
        assert driver.registered == {}, "nobody needs it"
        first = await rig.memory.grow()
        one = await rig.engine()
        assert first - 4096 - (4096 + 1024) <= sum(driver.registered.values()) < first
        await one.move(Direction.STORE, first - SLOT)
        while await rig.memory.grow() < rig.memory.size:
            pass
        await rig.device.arena_grew()
        assert sum(driver.registered.values()) == rig.memory.size - 4096
        await one.move(Direction.STORE, rig.memory.size - SLOT)
        assert bytes(rig.memory.view(rig.memory.size - SLOT, BLOCK)) == one.kv.read(0, BLOCK)
    assert driver.leaked == {}


async def test_an_arena_that_cannot_be_pinned_is_used_as_it_is(
    driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.fails["cuMemHostRegister"] = CUresult.CUDA_ERROR_NOT_SUPPORTED
    async with opened(driver) as rig:
        one = await rig.engine()
        await rig.engine()
        await one.move(Direction.STORE)
        assert bytes(rig.memory.view(4096, BLOCK)) == one.kv.read(0, BLOCK)
        assert driver.calls["cuMemcpyBatchAsync"] == 0, "some drivers take no batch of pageable memory"
    assert sum("not pinned" in record.message for record in caplog.records) == 1
    assert driver.calls["cuMemHostRegister"] == 1


async def test_what_cannot_be_opened_leaves_nothing_open(driver: FakeDriver) -> None:
    async with opened(driver) as rig:
        driver.fails["cuStreamCreate"] = CUresult.CUDA_ERROR_UNKNOWN
        with pytest.raises(Unavailable):
            await rig.engine()
        driver.fails.clear()
        assert (driver.held["opened"], driver.held["streams"]) == (0, 0)


def test_memory_of_a_gpu_that_is_not_seen_is_unavailable(cuda: FakeDriver) -> None:
    kv = GpuMemory(cuda, 4096)
    named = CudaMemory(4096, kv.named.handle, b"?" * 16)
    view = TensorView(0, 0, DType.uint8, (4, 512), (512, 1))

    async def attach() -> None:
        async with opened(cuda) as rig:
            with pytest.raises(Unavailable, match="does not see"):
                await rig.device.attach(Export((named,), (view,), 4))

    trio.run(attach)
    assert cuda.leaked == {}


def test_without_a_driver_the_device_is_unavailable(cuda: FakeDriver) -> None:
    cuda.fails["cuInit"] = RuntimeError("Failed to dlopen libcuda.so.1")

    async def enter() -> None:
        async with opened(cuda):
            pass

    with pytest.raises(Unavailable, match="libcuda"):
        trio.run(enter)
