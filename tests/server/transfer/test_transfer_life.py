"""Everything that could happen to device transfers, in any order, over a fake device."""

import struct
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transfer_rig import BLOCK_BYTES, BLOCKS, CHUNK_BLOCKS, SHARD_BYTES, Open, Rig, content, fill, settled

from lmcache_trio._wire.codec import pack_positions
from lmcache_trio._wire.messages import Ack, ErrorReply, LetGo, Reset, RetrieveBlocks, Retrieved, Stored, Withdraw


class World:
    """An engine that writes over its blocks as soon as they are its own again, and knows what must never be seen."""

    CHAINS = 3

    def __init__(self, rig: Rig, digests: Callable[..., list[bytes]]) -> None:
        self.rig = rig
        self.chains = [digests(2, f"chain {i}") for i in range(self.CHAINS)]
        self.lent: dict[int, tuple[Sequence[int], list[bytes] | None]] = {}  # by request: blocks, chain of a load
        self.free = list(range(BLOCKS))
        self.mine: dict[int, bytes] = {}
        self.session = 10
        self.scribbles = 0
        for block in list(self.free):
            self.scribble(block)

    def scribble(self, block: int) -> None:
        self.scribbles += 1
        self.mine[block] = struct.pack("<Q", self.scribbles).ljust(BLOCK_BYTES, b"\xff")
        self.rig.write(block, self.mine[block])

    def lend(self, count: int) -> list[int]:
        blocks, self.free = self.free[:count], self.free[count:]
        for block in blocks:
            del self.mine[block]
        return blocks

    async def store(self, which: int) -> None:
        if len(self.free) < 4:
            return
        self.session += 1
        chain, blocks = self.chains[which], self.lend(4)
        await self.rig.scheduler.lookup(self.session, chain)
        fill(self.rig, chain, blocks)
        self.lent[await self.rig.store(self.session, chain, blocks)] = (blocks, None)

    async def load(self, which: int, layered: bool) -> None:
        if len(self.free) < 4:
            return
        self.session += 1
        answer = await self.rig.scheduler.lookup(self.session, self.chains[which])
        if not answer.chunks:
            return
        blocks = self.lend(answer.chunks * CHUNK_BLOCKS)
        number = next(self.rig.numbers)
        ask = RetrieveBlocks(number, answer.lease, 0, answer.chunks, 0, pack_positions(blocks), layered)
        self.lent[number] = (blocks, self.chains[which])
        await self.rig.worker.tell(ask)

    def withdraw(self, choice: int) -> Withdraw | None:
        return Withdraw(sorted(self.lent)[choice % len(self.lent)]) if self.lent else None

    def copy(self, choice: int) -> Any:
        running = self.rig.device.running
        return running[choice % len(running)] if running else None

    async def lose_worker(self) -> None:
        """Blocks that were lent are the engine's again with the server's word for it, and not before."""
        old, token = self.rig.worker, self.rig.worker.token
        old.connection.close()
        asker = await self.rig.observer()
        await asker.tell(LetGo(1, token))
        await settled()
        while not (said := self.rig.said(asker)):
            self.check()
            self.rig.device.running[0].end()
            await settled()
        assert said == [Ack(1)]
        asker.connection.close()
        for blocks, _ in self.lent.values():
            self.give_back(blocks)
        self.lent.clear()
        await self.rig.start_worker()

    def hear(self) -> None:
        for message in self.rig.said():
            if isinstance(message, (Stored, Retrieved, ErrorReply)) and message.id in self.lent:
                blocks, chain = self.lent.pop(message.id)
                if isinstance(message, Retrieved) and message.valid:
                    assert chain is not None
                    for i, block in enumerate(blocks):
                        assert self.rig.read(block) == content(chain[i // CHUNK_BLOCKS], i % CHUNK_BLOCKS)
                self.give_back(blocks)

    def give_back(self, blocks: Sequence[int]) -> None:
        self.free += blocks
        for block in blocks:
            self.scribble(block)

    def check(self) -> None:
        assert self.rig.device.broken_rules == []
        for block, expected in self.mine.items():
            assert self.rig.read(block) == expected, f"block {block} was written to after it was given back"


STEPS = st.one_of(
    st.tuples(st.just("store"), st.integers(0, World.CHAINS - 1)),
    st.tuples(st.just("load"), st.integers(0, World.CHAINS - 1), st.booleans()),
    st.tuples(st.just("move"), st.integers(0, 5), st.integers(0, 9)),
    st.tuples(st.just("end"), st.integers(0, 5)),
    st.tuples(st.just("fail"), st.integers(0, 5)),
    st.tuples(st.just("withdraw"), st.integers(0, 5)),
    st.tuples(st.just("end session"), st.integers(0, 5)),
    st.tuples(st.just("reset")),
    st.tuples(st.just("lose")),
)


async def carry_out(world: World, step: tuple[Any, ...]) -> None:
    rig = world.rig
    match step:
        case ("store", which):
            await world.store(which)
        case ("load", which, layered):
            await world.load(which, layered)
        case ("move", choice, count) if (copy := world.copy(choice)) is not None:
            copy.move(count)
        case ("end", choice) if (copy := world.copy(choice)) is not None:
            copy.end()
        case ("fail", choice) if (copy := world.copy(choice)) is not None:
            copy.fail()
        case ("withdraw", choice) if (notice := world.withdraw(choice)) is not None:
            await rig.worker.tell(notice)
        case ("end session", back):
            await rig.scheduler.end(max(11, world.session - back))
        case ("reset",):
            await rig.scheduler.get(Ack, Reset)
        case ("lose",):
            await world.lose_worker()


@given(steps=st.lists(STEPS, max_size=40), room=st.sampled_from([1, 2 * SHARD_BYTES, 1 << 20]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_no_byte_moves_that_is_not_the_devices_and_nothing_half_copied_is_served(
    open_rig: Open, digests: Callable[..., Any], steps: list[tuple[Any, ...]], room: int
) -> None:
    async with open_rig() as rig:
        rig.room(room)
        world = World(rig, digests)
        for step in steps:
            await carry_out(world, step)
            await settled()
            world.hear()
            world.check()
        while rig.device.running:
            rig.device.running[0].end()
            await settled()
            world.hear()
            world.check()
        assert world.lent == {}, "a request was never answered"
        for session in range(11, world.session + 1):
            await rig.scheduler.end(session)
        await rig.scheduler.get(Ack, Reset)
        await settled()
        rig.said()
        held = rig.held
        held["bytes_free"] += held["bytes_stale"]  # what was reset is evicted when there is need of its room
        lazily = {"chunks_stale", "slots_stale", "bytes_stale", "largest_hole"}
        assert {name: held[name] for name in held if held[name] != rig.before[name] and name not in lazily} == {}
