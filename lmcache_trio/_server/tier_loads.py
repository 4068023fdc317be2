"""Loads from one tier into memory: each is a task of the tier's, whoever wants it.

What comes next, and what is not wanted any more, is decided by `_core.loads`. A slot belongs to its load until the
tier's call has returned, which for a thread that hangs may be never; only then is it committed or aborted.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import trio

from lmcache_trio._core.index import SERVER, Hold, Index, Reservation
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.loads import Load, Loads, LoadState, Wisher
from lmcache_trio._server.tier_calls import Calls
from lmcache_trio.abc import Load as Wanted
from lmcache_trio.abc import Memory, Tier
from lmcache_trio.errors import Gone, Unavailable

__all__ = ["Loading", "Start"]

Start = Callable[..., None]
"""`start(fn, *args)`: run it as a task. Given by `supervise`."""

MOST = 64
"""Loads in flight, however small: tasks and threads of a tier that is stalled."""


class Loading:
    """One tier's loads. *room* says how many bytes may still be loaded; *loaded* is told what has arrived."""

    def __init__(
        self,
        calls: Calls,
        tier: Tier,
        index: Index,
        memory: Memory,
        most_bytes: int,
    ) -> None:
        self._calls = calls
        self._tier = tier
        self._index = index
        self._memory = memory
        self.room: Callable[[], int] = lambda: 0
        self.loaded: Callable[[Sequence[ChunkKey]], None] = lambda keys: None
        self.reserved: Callable[[], None] = lambda: None
        self.loads = Loads(most_bytes=most_bytes, most=MOST)
        self._stirred = trio.Event()
        self._scopes: dict[Load, trio.CancelScope] = {}
        self._holds: dict[Load, Hold] = {}
        self.landed = 0
        self.missed = 0
        self.no_room = 0
        self.bytes_loaded = 0

    def want(self, key: ChunkKey, parent: bytes, deadline: float, wisher: Wisher) -> Load:
        """See `Loads.want`; a LANDED chunk is held for as long as it is wanted."""
        wanted = self.loads.want(key, parent, sum(self._index.shard_bytes(key.namespace)), deadline, wisher)
        if not self._calls.open:
            self.give_up()
        self._stirred.set()
        return wanted

    def unwant(self, load: Load, wisher: Wisher) -> None:
        """*wisher* does not want it any more. Idempotent."""
        if self.loads.unwant(load, wisher):
            self._end(load)
            self._stirred.set()

    def give_up(self, namespace: bytes | None = None) -> None:
        """Whoever waits for a load (of *namespace*, or any) is told that it missed, and the calls are ended."""
        for load in self.loads.give_up(namespace):
            self._end(load)
            self._tell(load)

    async def run(self, start: Start) -> None:
        """Begin loads as there is room for them, until cancelled."""
        while True:
            await self._stirred.wait()
            self._stirred = trio.Event()
            while (load := self.loads.next()) is not None:
                reservation = self._reserve(load)  # here, because tasks begin in any order, and slots in the chain's
                if reservation is None:
                    self._settle(load, None, False)
                else:
                    scope = self._scopes[load] = trio.CancelScope()
                    start(self._load, load, reservation, scope)

    async def _load(self, load: Load, reservation: Reservation, scope: trio.CancelScope) -> None:
        filled = False
        try:
            with scope:
                filled = await self._fill(load, reservation)
        except Unavailable:
            pass  # the tier is fenced by it, and all are told
        finally:
            self._settle(load, reservation, filled)

    def _reserve(self, load: Load) -> Reservation | None:
        if self._index.match(load.key.namespace, (load.key.digest,)):
            return None  # an engine stored it meanwhile
        if not self._index.shard_bytes(load.key.namespace):
            return None  # no engine has its namespace any more
        if self.room() < 0:  # beyond it no lease could offer it
            self.no_room += 1
            return None
        now = trio.current_time()
        reservation = self._index.reserve_load(load.key.namespace, load.parent, load.key.digest, now)
        if reservation is None:
            self.no_room += 1
        else:
            self.reserved()
        return reservation

    async def _fill(self, load: Load, reservation: Reservation) -> bool:
        lengths = self._index.shard_bytes(load.key.namespace)
        views = [self._memory.view(slot.offset, lengths[slot.position]) for slot in reservation.slots]
        (hit,) = await self._calls.make(self._tier.load, [Wanted(load.key, views)])
        return bool(hit)

    def _settle(self, load: Load, reservation: Reservation | None, filled: bool) -> None:
        """The call has returned. Synchronous: nothing comes between."""
        self._scopes.pop(load, None)
        if reservation is not None and not filled:
            self._index.abort(reservation.id, SERVER)
        if reservation is not None and filled:
            with suppress(Gone):  # a reset came between, or its time was up
                keys = self._index.commit(reservation.id, SERVER)
                self.bytes_loaded += load.size
                self.loaded(keys)
        hold = self._index.hold(load.key) if load.state is LoadState.LOADING else None
        if hold is not None:
            self._holds[load] = hold
            self.landed += 1
            self.loads.landed(load)
        else:
            self.missed += load.state is LoadState.LOADING
            self.loads.missed(load)
        self._tell(load)
        self._stirred.set()

    def _end(self, load: Load) -> None:
        scope = self._scopes.get(load)
        if scope is not None:
            scope.cancel()
        hold = self._holds.pop(load, None)
        if hold is not None:
            self._index.unhold(hold)

    @staticmethod
    def _tell(load: Load) -> None:
        for wake in load.wishers:
            wake()
