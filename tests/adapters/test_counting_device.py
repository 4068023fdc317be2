"""What the device path makes: messages of the engine's process, and temporaries of the server's copies."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import trio
from lmcache_trio_backends.cpu import CpuConfig, CpuMemory
from lmcache_trio_backends.host_device import HostConfig, HostDevice
from support.counting import BLOCKS, TOKENS, Tap, counted_side, tap, tracing

from lmcache_trio._wire.messages import RetrieveBlocks, StoreBlocks
from lmcache_trio.abc import Copy, Direction
from lmcache_trio.adapters import StoreSpec
from lmcache_trio.adapters.shared_kv import export_of, shared_tensor
from lmcache_trio.testing.sides import CHUNK, Side, make_kv


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    kv = {name: shared_tensor(layer.nbytes).view(layer.dtype).view(layer.shape) for name, layer in make_kv().items()}
    with counted_side(tmp_path, kv) as made:
        assert made.worker.path == "device"
        yield made


def tapped(side: Side) -> Tap:
    client = side.worker._link.client
    assert client is not None
    side.worker._link.call(client.ping, timeout=20)  # what was on its way has been heard
    return tap(side.worker._link)


def store_spec(side: Side, name: str, tokens: list[int]) -> StoreSpec:
    side.scheduler.extend(name, tokens)
    return side.scheduler.store_spec(name, 0, BLOCKS)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_store_is_one_request_and_one_reply_however_many_chunks(side: Side) -> None:
    spec = store_spec(side, "r", TOKENS)
    messages = tapped(side)
    side.worker.store_now([spec])
    assert messages.take() == ([StoreBlocks], 1)
    assert side.worker.statistics()["stored_chunks"] == 3


def test_a_retrieve_is_one_request_and_one_reply_however_many_chunks(side: Side) -> None:
    side.store("r", TOKENS, BLOCKS)
    assert side.lookup("q", TOKENS) == 3 * CHUNK
    spec = side.scheduler.update_after_alloc("q", 3 * CHUNK, block_ids=BLOCKS)
    assert spec is not None
    messages = tapped(side)
    side.worker.retrieve_now([spec])
    assert messages.take() == ([RetrieveBlocks], 1)
    assert side.worker.take_failed_blocks() == set()


# --- temporaries ------------------------------------------------------------------------------------------------------

PIECES, COUNT, CHUNK_BLOCKS = 8, 64, 16
SHAPE = (COUNT, 16, 2, 64)  # 4 KiB a block and piece
CHUNK_BYTES = PIECES * CHUNK_BLOCKS * 4096
SCATTERED = [block * 37 % COUNT for block in range(3 * CHUNK_BLOCKS)]


def layer_after_layer() -> dict[str, torch.Tensor]:
    whole = shared_tensor(PIECES * COUNT * 4096).view(torch.bfloat16)
    return {f"{i}": layer for i, layer in enumerate(whole.view(PIECES // 2, 2, *SHAPE))}


def block_after_block() -> dict[str, torch.Tensor]:
    """Nothing is contiguous but a block of a layer."""
    whole = shared_tensor(PIECES * COUNT * 4096).view(torch.bfloat16)
    blocks = whole.view(COUNT, PIECES, *SHAPE[1:])
    return {f"{i}": blocks[:, i] for i in range(PIECES)}


@pytest.mark.parametrize("blocks", [SCATTERED, [-1, *SCATTERED[1:]]], ids=["whole chunks", "without the first block"])
@pytest.mark.parametrize("layout", [layer_after_layer, block_after_block])
async def test_the_host_device_makes_no_temporary_as_large_as_a_chunk(
    layout: Callable[[], dict[str, torch.Tensor]], blocks: list[int]
) -> None:
    memory, device = CpuMemory(CpuConfig(size=4 << 20)), HostDevice(HostConfig())
    async with memory.open():
        while await memory.grow() < memory.size:
            pass
        async with device.open(memory):
            kv = layout()
            attached = await device.attach(export_of(kv, COUNT))
            slots = [4096 + i * CHUNK_BYTES for i in range(3)]
            for direction in Direction:
                which = [max(0, block) for block in blocks] if direction is Direction.STORE else blocks
                copy = Copy(attached, direction, slots, which, CHUNK_BLOCKS)
                with trio.fail_after(20):
                    await device.wait_ended(device.start(copy))  # what is imported and cached is no temporary
                    with tracing() as peak:
                        await device.wait_ended(device.start(copy))
                        assert peak() < CHUNK_BYTES // 4
            assert device.statistics()["copies"] == 4
            device.detach(attached)
