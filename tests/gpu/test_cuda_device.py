"""The cuda device, where there is a GPU: its contract, with an engine in a process of its own; bytes, and GB/s.

A process cannot open its own exports, so the engine's memory is held by a child, which reads and writes it on request.
"""

import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import trio
from lmcache_trio_backends.cpu import CpuConfig, CpuMemory
from lmcache_trio_backends.cuda_device import CudaConfig, CudaDevice

from lmcache_trio._core.exports import DType, TensorView
from lmcache_trio.abc import Copy, CudaMemory, Device, Direction, Export
from lmcache_trio.testing.device_contract import DeviceContract, EngineMemory, MakeDevice, MakeEngineMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: there is no GPU"),
]

LAYERS, BLOCK_BYTES, BLOCKS = 32, 2 * 8 * 128 * 16, 4096
"""Llama-3-8B: 8 KV heads of 128 in bfloat16, blocks of 16 tokens; K and V apart."""


def engine(link: Connection, size: int) -> None:
    """In the child: holds *size* bytes of GPU memory, allocated by the driver alone."""
    from lmcache_trio.adapters.cuda_kv import cuda_memory_of

    tensor = torch.zeros(size, dtype=torch.uint8, device="cuda")
    memory, base = cuda_memory_of(tensor)
    link.send((memory.size, memory.handle, memory.uuid, tensor.data_ptr() - base))
    while (asked := link.recv()) is not None:
        offset, data, length = asked
        if data is not None:
            tensor[offset : offset + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).cuda()
        torch.cuda.synchronize()
        link.send(tensor[offset : offset + length].cpu().numpy().tobytes())


class ChildMemory(EngineMemory):
    def __init__(self, device: Device | None, size: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.link, other = spawn.Pipe()
        self.process = spawn.Process(target=engine, args=(other, size), daemon=True)
        self.process.start()
        *named, self.offset = self.link.recv()
        self.named = CudaMemory(*named)

    def memory(self) -> CudaMemory:
        return self.named

    def start(self) -> int:
        return int(self.offset)

    def _ask(self, *asked: Any) -> bytes:
        self.link.send(asked)
        found: bytes = self.link.recv()
        return found

    def read(self, offset: int, length: int) -> bytes:
        return self._ask(offset, None, length)

    def write(self, offset: int, data: bytes) -> None:
        self._ask(offset, data, 0)

    def close(self) -> None:
        self.link.send(None)
        self.process.join(20)


class TestCudaDevice(DeviceContract):
    @pytest.fixture
    def make_device(self) -> MakeDevice:
        return lambda: CudaDevice(CudaConfig())

    @pytest.fixture
    def engine_memory(self) -> Iterator[MakeEngineMemory]:
        made: list[ChildMemory] = []

        def make(device: Device, size: int) -> EngineMemory:
            made.append(ChildMemory(device, size))
            return made[-1]

        yield make
        for memory in made:
            memory.close()


@pytest.mark.parametrize("direction", Direction)
async def test_copies_are_as_fast_as_a_plain_pinned_one(
    direction: Direction, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints GB/s beside those of one pinned copy of the same size. The target is 0.85 of it."""
    memory, device = CpuMemory(CpuConfig(size=512 << 20)), CudaDevice(CudaConfig())
    child = ChildMemory(None, LAYERS * 2 * BLOCKS * BLOCK_BYTES // 4)
    blocks = BLOCKS // 4
    shape, strides = (2, blocks, BLOCK_BYTES), (blocks * BLOCK_BYTES, BLOCK_BYTES, 1)
    layer = 2 * blocks * BLOCK_BYTES
    views = [TensorView(0, child.start() + i * layer, DType.uint8, shape, strides) for i in range(LAYERS)]
    try:
        async with memory.open():
            while await memory.grow() < memory.size:
                pass
            async with device.open(memory):
                attached = await device.attach(Export((child.named,), tuple(views), blocks), child.process.pid or 0)
                slot = 16 * LAYERS * 2 * BLOCK_BYTES
                slots = [4096 + i * slot for i in range(8)]
                scattered = [(i * 37) % blocks for i in range(16 * len(slots))]
                copy = Copy(attached, direction, slots, scattered, 16, (0, LAYERS))
                seconds = [await _timed(device, copy) for _ in range(8)]
                device.detach(attached)
    finally:
        child.close()
    moved, plain = slot * len(slots) / min(seconds[1:]) / 1e9, _plain(slot * len(slots), direction)
    with capsys.disabled():
        print(f"\n{direction.value}: {moved:.1f} GB/s; a plain pinned copy: {plain:.1f}; share {moved / plain:.2f}")
    assert moved > 0


async def _timed(device: Device, copy: Copy) -> float:
    began = time.perf_counter()
    with trio.fail_after(60):
        await device.wait_ended(device.start(copy))
    return time.perf_counter() - began


def _plain(size: int, direction: Direction) -> float:
    host, gpu = torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.empty(size, dtype=torch.uint8).cuda()
    best = 0.0
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        (host if direction is Direction.STORE else gpu).copy_(gpu if direction is Direction.STORE else host)
        torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - began) / 1e9)
    return best
