"""The suite that every `Device` passes. Subclass it, say how one and an engine's memory are made, and run it.

    class TestMine(DeviceContract):
        @pytest.fixture
        def make_device(self) -> MakeDevice:
            return lambda: MyDevice(MyConfig())

        @pytest.fixture
        def engine_memory(self) -> MakeEngineMemory:
            return MyEngineMemory       # size -> EngineMemory

It refuses to look behind the interface, and knows the layout of slots from `lmcache_trio.abc.Export` alone.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random

import attrs
import pytest
import trio

from lmcache_trio._core.transfer.exports import DType, TensorView
from lmcache_trio.abc import Attached, Copy, CudaMemory, Device, Direction, Export, Memory, SharedMemory
from lmcache_trio.errors import Misuse, Unavailable

__all__ = ["DeviceContract", "EngineMemory", "MakeDevice", "MakeEngineMemory"]

BLOCKS, CHUNK_BLOCKS = 13, 4
ARENA = 8 << 20


class EngineMemory(ABC):
    """One allocation of an engine's, as the test sees it."""

    @abstractmethod
    def memory(self) -> SharedMemory | CudaMemory:
        """What it is called in an export."""

    @abstractmethod
    def start(self) -> int:
        """Where in the allocation, in bytes, the engine's own bytes begin."""

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """The engine's bytes, from `start`."""

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None:
        """Change them."""


MakeDevice = Callable[[], Device]
MakeEngineMemory = Callable[[Device, int], EngineMemory]


@attrs.frozen
class PagedLayout:
    """Layers of an export: *kv_first* ones have K and V apart; *gap* bytes lie between two blocks.

    *second*: there is a second KV group too, whose one layer has the beginning of each block of the first one's.
    """

    layers: int = 3
    item: DType = DType.bfloat16
    inner: tuple[int, ...] = (4, 2, 8)
    kv_first: bool = True
    gap: int = 0
    second: bool = False

    @property
    def block_items(self) -> int:
        items = 1
        for n in self.inner:
            items *= n
        return items

    @property
    def stride(self) -> int:
        return self.block_items + self.gap // self.item.itemsize

    @property
    def layer_bytes(self) -> int:
        return (2 if self.kv_first else 1) * BLOCKS * self.stride * self.item.itemsize

    def export(self, memory: EngineMemory) -> Export:
        inner_strides: list[int] = []
        step = 1
        for n in reversed(self.inner):
            inner_strides.insert(0, step)
            step *= n
        views = []
        for i in range(self.layers):
            shape, strides = (BLOCKS, *self.inner), (self.stride, *inner_strides)
            if self.kv_first:
                shape, strides = (2, *shape), (BLOCKS * self.stride, *strides)
            views.append(TensorView(0, memory.start() + i * self.layer_bytes, self.item, shape, strides))
        if self.second:
            shape, strides = (BLOCKS, *self.inner[1:]), (self.stride, *inner_strides[1:])
            views.insert(1, TensorView(0, memory.start(), self.item, shape, strides, group=1))
        return Export((memory.memory(),), tuple(views), BLOCKS)


LAYOUTS = [
    PagedLayout(),
    PagedLayout(kv_first=False),
    PagedLayout(layers=1, item=DType.uint8, inner=(7,), kv_first=False),
    PagedLayout(layers=2, item=DType.float32, gap=64),
    PagedLayout(layers=2, kv_first=False, gap=32),
]


@attrs.frozen(eq=False)
class Rig:
    """An open device, an open memory, and one engine that is attached."""

    device: Device
    memory: Memory
    layout: PagedLayout
    engine: EngineMemory
    export: Export
    attached: Attached

    @property
    def slot_bytes(self) -> int:
        return self.export.group_block_bytes[0] * CHUNK_BLOCKS

    def block(self, block: int, group: int = 0) -> bytes:
        """All bytes of one block, in a slot's order of pieces."""
        return b"".join(self.piece(block, group))

    def piece(self, block: int, group: int = 0) -> list[bytes]:
        start = self.engine.start()
        return [
            self.engine.read(piece.offset - start + block * piece.stride, piece.length)
            for piece in self.export.pieces[group]
        ]

    def slot(self, blocks: list[int], group: int = 0) -> bytes:
        """What a slot with these blocks holds."""
        pieces = [self.piece(block, group) for block in blocks]
        return b"".join(pieces[i][p] for p in range(len(pieces[0])) for i in range(len(blocks)))

    def copy(
        self,
        direction: Direction,
        slots: list[int],
        blocks: list[int],
        chunk_blocks: int = CHUNK_BLOCKS,
        group: int = 0,
    ) -> Copy:
        return Copy(self.attached, direction, slots, blocks, chunk_blocks, group)

    async def run(self, copy: Copy) -> None:
        with trio.fail_after(20):
            await self.device.wait_ended(self.device.start(copy))


class DeviceContract:
    """What any device promises."""

    @pytest.fixture
    def make_device(self) -> MakeDevice:
        """Override it."""
        raise NotImplementedError("a subclass of DeviceContract overrides the fixture make_device")

    @pytest.fixture
    def engine_memory(self) -> MakeEngineMemory:
        """Override it."""
        raise NotImplementedError("a subclass of DeviceContract overrides the fixture engine_memory")

    @pytest.fixture
    def make_memory(self) -> Callable[[int], Memory]:
        """The arena. Override it if yours needs one of its own."""
        from importlib.metadata import entry_points

        (found,) = entry_points(group="lmcache_trio.memory", name="cpu")
        cls = found.load()
        return lambda size: cls(cls.Config(size=size))

    @pytest.fixture
    def rig(
        self, make_device: MakeDevice, engine_memory: MakeEngineMemory, make_memory: Callable[[int], Memory]
    ) -> "OpenRig":
        @asynccontextmanager
        async def opened(layout: PagedLayout) -> AsyncIterator[Rig]:
            device, memory = make_device(), make_memory(ARENA)
            async with memory.open():
                while await memory.grow() < ARENA:
                    pass
                async with device.open(memory):
                    engine = engine_memory(device, layout.layers * layout.layer_bytes)
                    engine.write(0, Random(1).randbytes(layout.layers * layout.layer_bytes))
                    export = layout.export(engine)
                    attached = await device.attach(export)
                    yield Rig(device, memory, layout, engine, export, attached)
                    device.detach(attached)

        return opened

    @pytest.mark.parametrize("layout", LAYOUTS)
    async def test_stored_blocks_stand_in_the_slot_in_the_layout_of_slots(
        self, rig: "OpenRig", layout: PagedLayout
    ) -> None:
        async with rig(layout) as it:
            blocks = [7, 0, 12, 3, 5, 1, 2, 4]
            slots = [4096, 4096 + 2 * it.slot_bytes]
            await it.run(it.copy(Direction.STORE, slots, blocks))
            assert bytes(it.memory.view(slots[0], it.slot_bytes)) == it.slot(blocks[:4])
            assert bytes(it.memory.view(slots[1], it.slot_bytes)) == it.slot(blocks[4:])

    @pytest.mark.parametrize("layout", LAYOUTS)
    async def test_a_load_fills_its_blocks_and_touches_no_other_byte(self, rig: "OpenRig", layout: PagedLayout) -> None:
        async with rig(layout) as it:
            await it.run(it.copy(Direction.STORE, [4096, 4096 + it.slot_bytes], [7, 0, 12, 3, 5, 1, 2, 4]))
            stored = {block: it.block(block) for block in range(BLOCKS)}
            size = layout.layers * layout.layer_bytes
            engine = Random(2).randbytes(size)
            it.engine.write(0, engine)
            before = {block: it.block(block) for block in range(BLOCKS)}
            await it.run(it.copy(Direction.LOAD, [4096, 4096 + it.slot_bytes], [-1, 9, 8, 11, 10, 6, -1, -1]))
            expected = {9: stored[0], 8: stored[12], 11: stored[3], 10: stored[5], 6: stored[1]}
            assert {block: it.block(block) for block in range(BLOCKS)} == before | expected
            changed = sum(a != b for a, b in zip(engine, it.engine.read(0, size), strict=True))
            assert changed <= 5 * it.export.block_bytes

    @pytest.mark.parametrize("gap", [0, 32])
    async def test_groups_in_one_storage_have_slots_of_their_own(self, rig: "OpenRig", gap: int) -> None:
        async with rig(PagedLayout(layers=2, kv_first=False, gap=gap, second=True)) as it:
            lengths = it.export.group_block_bytes
            slots = [4096, 4096 + 2 * it.slot_bytes, 4096 + 3 * it.slot_bytes]
            it.memory.view(4096, 4 * it.slot_bytes)[:] = bytes(4 * it.slot_bytes)
            await it.run(it.copy(Direction.STORE, slots[:1], [7, 0, 12, 3]))
            await it.run(it.copy(Direction.STORE, slots[1:], [5, 1, 2, 4], 2, group=1))
            assert bytes(it.memory.view(slots[0], 4 * lengths[0])) == it.slot([7, 0, 12, 3])
            rest = bytes(it.slot_bytes - 2 * lengths[1])
            for slot, blocks in zip(slots[1:], ([5, 1], [2, 4]), strict=True):
                assert bytes(it.memory.view(slot, it.slot_bytes)) == it.slot(blocks, 1) + rest
            stored = [it.block(block, 1) for block in (1, 2)]
            before = [it.engine.read(0, 2 * it.layout.layer_bytes), *(it.block(block, 1) for block in (9, 8))]
            await it.run(it.copy(Direction.LOAD, slots[1:], [-1, 9, 8, -1], 2, group=1))
            assert [it.block(block, 1) for block in (9, 8)] == stored
            for block, former in zip((9, 8), before[1:], strict=True):  # all else is as it was
                it.engine.write(block * it.export.pieces[1][0].stride, former)
            assert it.engine.read(0, 2 * it.layout.layer_bytes) == before[0]

    async def test_copies_of_one_engine_in_one_direction_run_in_the_order_in_which_they_were_started(
        self, rig: "OpenRig"
    ) -> None:
        async with rig(PagedLayout()) as it:
            slots = [4096, 4096 + it.slot_bytes]
            for direction in (Direction.STORE, Direction.LOAD):
                first = it.copy(direction, slots[:1], [0, 1, 2, 3])
                other = it.copy(direction, slots[1:], [0, 1, 2, 3])
                if direction is Direction.STORE:  # three into one slot
                    other = it.copy(direction, slots[:1], [4, 5, 6, 7])
                    await it.run(it.copy(direction, slots[1:], [8, 9, 10, 11]))
                tickets = [it.device.start(copy) for copy in (first, other, first, other)]
                with trio.fail_after(20):
                    for ticket in reversed(tickets):
                        await it.device.wait_ended(ticket)
                if direction is Direction.STORE:
                    assert bytes(it.memory.view(slots[0], it.slot_bytes)) == it.slot([4, 5, 6, 7])
                else:
                    assert it.slot([0, 1, 2, 3]) == bytes(it.memory.view(slots[1], it.slot_bytes))

    async def test_a_wait_that_is_cancelled_ends_no_copy_and_may_be_taken_up_again(self, rig: "OpenRig") -> None:
        async with rig(PagedLayout()) as it:
            ticket = it.device.start(it.copy(Direction.STORE, [4096], [0, 1, 2, 3]))
            with trio.CancelScope() as scope:
                scope.cancel()
                await it.device.wait_ended(ticket)
            with trio.fail_after(20):
                await it.device.wait_ended(ticket)
                await it.device.wait_ended(ticket)
            assert bytes(it.memory.view(4096, it.slot_bytes)) == it.slot([0, 1, 2, 3])

    async def test_memory_that_is_not_what_the_export_says_is_refused(self, rig: "OpenRig") -> None:
        with tempfile.TemporaryFile() as other:
            await self._refuse_another(rig, other.fileno())

    async def _refuse_another(self, rig: "OpenRig", other: int) -> None:
        async with rig(PagedLayout()) as it:
            before = it.device.statistics()["attached"]
            wrong = it.export.memory[0]
            if isinstance(wrong, SharedMemory):
                wrong = attrs.evolve(wrong, descriptor=other)
            else:
                wrong = attrs.evolve(wrong, handle=bytes(64))
            export = Export((wrong,), it.export.layers, BLOCKS)
            with pytest.raises((Misuse, Unavailable)):
                await it.device.attach(export)
            assert it.device.statistics()["attached"] == before

    async def test_an_attach_that_is_cancelled_leaves_nothing_open(self, rig: "OpenRig") -> None:
        async with rig(PagedLayout()) as it:
            before = it.device.statistics()["attached"]
            with trio.CancelScope() as scope:
                scope.cancel()
                await it.device.attach(it.export)
            assert it.device.statistics()["attached"] == before

    async def test_detaching_twice_is_the_same_as_once(self, rig: "OpenRig") -> None:
        async with rig(PagedLayout()) as it:
            it.device.detach(it.attached)
            it.device.detach(it.attached)
            assert it.device.statistics()["attached"] == 0

    async def test_it_counts_what_it_copied(self, rig: "OpenRig") -> None:
        async with rig(PagedLayout()) as it:
            await it.run(it.copy(Direction.STORE, [4096], [0, 1, 2, 3]))
            found = it.device.statistics()
            assert (found["copies"], found["bytes_copied"], found["attached"]) == (1, it.slot_bytes, 1)

    async def test_outside_of_open_it_is_unavailable(
        self, make_device: MakeDevice, engine_memory: MakeEngineMemory
    ) -> None:
        device = make_device()
        layout = PagedLayout()
        export = layout.export(engine_memory(device, layout.layers * layout.layer_bytes))
        with pytest.raises(Unavailable):
            await device.attach(export)


OpenRig = Callable[[PagedLayout], AbstractAsyncContextManager[Rig]]
