"""Tiers that live in the test's own loop, and a server with them, under a clock that jumps."""

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import trio
import trio.testing

from lmcache_trio._wire.codec import decode
from lmcache_trio._wire.messages import (
    Answer,
    AnswerState,
    Done,
    Finished,
    Lookup,
    LookupStatus,
    Pinned,
    Retrieve,
)
from lmcache_trio.abc import ChunkKey, Load, Record, Tier
from support.server import HeapConfig, Peer, Rig, open_rig

SHARD = 64 << 10


def content(key: ChunkKey) -> bytes:
    return hashlib.sha256(key.namespace + key.digest).digest() * (SHARD // 32)


class LoopTier(Tier):
    """A dict. `stall(operation)` makes its calls wait, `hang` so that no cancellation helps, `fail` makes them fail."""

    Config = dict

    def __init__(self) -> None:
        super().__init__({})
        self.chunks: dict[ChunkKey, list[bytes]] = {}
        self.calls: Counter[str] = Counter()
        self.now: Counter[str] = Counter()  # calls that have not returned
        self.most: Counter[str] = Counter()
        self.log: list[tuple[str, Any]] = []
        self.began: list[tuple[str, float]] = []
        self.cancelled: Counter[str] = Counter()
        self.failing: dict[str, Exception] = {}
        self.opened = 0
        self._stalls: dict[str, tuple[trio.Event, bool]] = {}

    def stall(self, *operations: str, hang: bool = False) -> None:
        for operation in operations:
            self._stalls[operation] = (trio.Event(), hang)

    def go_on(self) -> None:
        for event, _ in self._stalls.values():
            event.set()
        self._stalls.clear()

    async def _meet(self, operation: str, what: Any) -> None:
        self.calls[operation] += 1
        self.log.append((operation, what))
        self.began.append((operation, trio.current_time()))
        self.now[operation] += 1
        self.most[operation] = max(self.most[operation], self.now[operation])
        try:
            await trio.lowlevel.checkpoint()
            if operation in self._stalls:
                event, hang = self._stalls[operation]
                with trio.CancelScope(shield=hang):
                    await event.wait()
            if operation in self.failing:
                raise self.failing[operation]
        except trio.Cancelled:
            self.cancelled[operation] += 1
            raise
        finally:
            self.now[operation] -= 1

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        await self._meet("open", None)
        self.opened += 1
        yield

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        await self._meet("contains", list(keys))
        return [key in self.chunks for key in keys]

    async def load(self, loads: Sequence[Load]) -> list[bool]:
        await self._meet("load", [load.key for load in loads])
        hits = []
        for load in loads:
            found = self.chunks.get(load.key)
            hits.append(found is not None)
            for view, shard in zip(load.shards, found or [], strict=False):
                view[:] = shard
        return hits

    async def store(self, records: Sequence[Record]) -> list[bool]:
        await self._meet("store", [(record.key, record.parent) for record in records])
        for record in records:
            self.chunks[record.key] = [bytes(shard) for shard in record.shards]
        return [True] * len(records)

    async def delete(self, namespace: bytes) -> None:
        await self._meet("delete", namespace)
        self.chunks = {key: shards for key, shards in self.chunks.items() if key.namespace != namespace}

    def statistics(self) -> dict[str, int | str]:
        return {"chunks": len(self.chunks), "bytes_used": SHARD * len(self.chunks), "bytes_capacity": 1 << 30}

    def fill(self, namespace: bytes, digests: Sequence[bytes]) -> None:
        for digest in digests:
            key = ChunkKey(namespace, digest)
            self.chunks[key] = [content(key)]

    def keys(self, operation: str) -> list[Any]:
        return [key for name, what in self.log if name == operation for key in what]


class World:
    """A server with tiers, and one engine that is registered."""

    def __init__(self, rig: Rig, scheduler: Peer, worker: Peer, namespace: bytes) -> None:
        self.rig, self.scheduler, self.worker, self.namespace = rig, scheduler, worker, namespace

    def held(self) -> dict[str, Any]:
        """What must be as before when all requests are over; chunks may be in memory."""
        names = (
            *("sessions", "prefetches", "leases", "leases_offered", "pins", "holds", "reservations"),
            *(
                "reservations_ending",
                "bytes_offered",
                "bytes_retained",
                "chunks_writing",
                "chunks_quarantined",
                "tasks",
            ),
        )
        found: dict[str, Any] = self.rig.held(*names)
        for tier in self.rig.server.statistics()["tiers"]:
            for name in ("questions", "loads_held", "loads_in_flight", "bytes_in_flight", "bytes_queued", "calls"):
                found[f"{tier['name']} {name}"] = tier[name]
        return found

    def tier(self, number: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.rig.server.statistics()["tiers"][number]
        return found

    async def ask(
        self, session: int, digests: Sequence[bytes], peer: Peer | None = None, budget_ms: int = -1
    ) -> Answer:
        """The reply to a lookup, not the push after it."""
        peer = peer or self.scheduler
        found = await peer.get(Answer, Lookup, session, 0, b"".join(digests), len(digests), budget_ms)
        assert isinstance(found, Answer)
        return found

    async def pushed(self, peer: Peer | None = None) -> Answer:
        """The next answer that is pushed. Waits for as long as it takes; time costs nothing."""
        peer = peer or self.scheduler
        with trio.fail_after(3600):
            while True:
                for message in peer.pushes:
                    if isinstance(message, Answer):
                        peer.pushes.remove(message)
                        return message
                peer.pushes.append(decode(await peer.connection.receive()))

    async def lookup(
        self, session: int, digests: Sequence[bytes], peer: Peer | None = None, budget_ms: int = -1
    ) -> Answer:
        """The definitive answer, however it comes."""
        answer = await self.ask(session, digests, peer, budget_ms)
        if answer.state is AnswerState.PENDING:
            assert (answer.chunks, answer.lease) == (0, b"")
            answer = await self.pushed(peer)
            assert answer.id == 0
        return answer

    async def status(self, session: int) -> Answer:
        found = await self.scheduler.get(Answer, LookupStatus, session)
        assert isinstance(found, Answer)
        return found

    async def store(self, session: int, digests: Sequence[bytes], parent: bytes = b"", known: int = 0) -> int:
        """Look up, reserve, write the right bytes and commit. Returns how many were published."""
        await self.ask(session, digests, budget_ms=0)
        made = await self.worker.reserve(session, digests[known:], parent=parent)
        offsets = [int.from_bytes(made.offsets[i : i + 8], "little") for i in range(0, len(made.offsets), 8)]
        for i, offset in enumerate(offsets):
            key = ChunkKey(self.namespace, digests[known + i])
            self.rig.memory.view(offset, SHARD)[:] = content(key)
        published = int(await self.worker.commit(made.reservation)) if made.reservation else 0
        await self.scheduler.end(session)
        return published

    async def read(self, answer: Answer, digests: Sequence[bytes]) -> bool:
        """Whether the bytes that the answer's lease gives are the right ones."""
        pinned = await self.worker.get(Pinned, Retrieve, answer.lease, 0, answer.chunks)
        offsets = [int.from_bytes(pinned.offsets[i : i + 8], "little") for i in range(0, len(pinned.offsets), 8)]
        right = all(
            self.rig.memory.view(offset, SHARD) == content(ChunkKey(self.namespace, digest))
            for offset, digest in zip(offsets, digests, strict=False)
        )
        return right and (await self.worker.get(Finished, Done, pinned.pin)).valid

    async def settled(self) -> None:
        """Everything that can happen without time passing has happened."""
        await trio.testing.wait_all_tasks_blocked()


Worlds = Callable[..., AbstractAsyncContextManager[World]]


@asynccontextmanager
async def open_world(*tiers: LoopTier, size: int = 16 << 20, **settings: Any) -> AsyncIterator[World]:
    """A server with *tiers*, its arena of *size* bytes, and one engine."""
    async with open_rig(HeapConfig(size), tiers=tiers, **settings) as rig:
        scheduler, worker = await rig.scheduler(), await rig.worker()
        namespace = await worker.register()
        try:
            yield World(rig, scheduler, worker, namespace)
        finally:
            for tier in tiers:
                tier.go_on()  # a test that failed must not hang
