"""Loads from one tier into memory. Each load is one task in the tier's branch, for all lookups that want its chunk.

`_core.tiers.loads` decides which load begins next and which is not wanted any more. A load owns its slot until the
tier's call has returned, which may never come if a thread hangs. Only then is the slot committed or aborted.
"""

from collections.abc import Sequence
from contextlib import suppress

import trio

from lmcache_trio._core.index.index import SERVER, Hold, Index, Reservation
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.misses import InTiers
from lmcache_trio._core.tiers.loads import Loads, LoadState, TierLoad, Wisher
from lmcache_trio._server.clock import Clock
from lmcache_trio._server.tasks import Starter
from lmcache_trio._server.tiers.calls import GuardedCalls
from lmcache_trio._server.tiers.writer import TierWriter
from lmcache_trio.abc import Load, Memory, Tier
from lmcache_trio.config import Config
from lmcache_trio.errors import Gone, Unavailable

__all__ = ["MOST", "TierLoader"]

MOST = 64
"""Loads in flight, for each of which a stalled tier keeps a task and a thread."""


class TierLoader:
    """Carries out *loads*, one tier's. A chunk that was loaded is offered to the *others*: the other tiers' writers.

    *every* has the loads of all tiers, these included, because all share the room that leases leave.
    """

    def __init__(  # noqa: PLR0913 each is a part that it works with
        self,
        calls: GuardedCalls,
        tier: Tier,
        index: Index,
        memory: Memory,
        clock: Clock,
        config: Config,
        loads: Loads,
        every: Sequence[Loads],
        others: Sequence[TierWriter],
    ) -> None:
        self._calls = calls
        self._tier = tier
        self._index = index
        self._memory = memory
        self._clock = clock
        self._timeout = config.reservation_timeout
        self._every = every
        self._others = others
        self.loads = loads
        self._stirred = trio.Event()
        self._scopes: dict[TierLoad, trio.CancelScope] = {}
        self._holds: dict[TierLoad, Hold] = {}
        self.landed = 0
        self.missed = 0
        self.no_room = 0
        self.bytes_loaded = 0
        calls.when_fenced.append(self.give_up)

    def want(self, key: ChunkKey, parent: bytes, deadline: float, wisher: Wisher) -> TierLoad:
        """As `Loads.want`. A LANDED chunk is held for as long as it is wanted."""
        wanted = self.loads.want(key, parent, sum(self._index.shard_bytes(key.namespace)), deadline, wisher)
        if not self._calls.open:
            self.give_up()
        self._stirred.set()
        return wanted

    def unwant(self, load: TierLoad, wisher: Wisher) -> None:
        """*wisher* does not want *load* any more. Idempotent."""
        if self.loads.unwant(load, wisher):
            self._end(load)
            self._stirred.set()

    def give_up(self, namespace: bytes | None = None) -> None:
        """Every load (of *namespace*, or of all) has missed: its wishers are told, and its call is cancelled."""
        for load in self.loads.give_up(namespace):
            self._end(load)
            self._tell(load)

    async def run(self, start: Starter) -> None:
        """Begin loads as there is room for them, until cancelled."""
        while True:
            await self._stirred.wait()
            self._stirred = trio.Event()
            while (load := self.loads.next()) is not None:
                # Not in the load's own task: tasks start in any order, and slots follow the chain's.
                reservation = self._reserve(load)
                if reservation is None:
                    self._settle(load, None, False)
                else:
                    scope = self._scopes[load] = trio.CancelScope()
                    start(self._load, load, reservation, scope)

    async def _load(self, load: TierLoad, reservation: Reservation, scope: trio.CancelScope) -> None:
        filled = False
        try:
            with scope:
                filled = await self._fill(load, reservation)
        except Unavailable:
            pass  # the call fenced the tier, which tells all wishers
        finally:
            self._settle(load, reservation, filled)

    def _reserve(self, load: TierLoad) -> Reservation | None:
        if self._index.match((load.key.namespace,), (load.key.digest,)):
            return None  # an engine stored it meanwhile
        if not self._index.shard_bytes(load.key.namespace):
            return None  # no engine has its namespace any more
        coming = sum(loads.bytes_landed + loads.bytes_in_flight for loads in self._every)
        if coming > self._index.room_to_offer:  # beyond lease_share no lookup could offer it
            self.no_room += 1
            load.refused = InTiers.NO_SHARE
            return None
        now = trio.current_time()
        reservation = self._index.reserve_load(load.key.namespace, load.parent, load.key.digest, now)
        if reservation is None:
            self.no_room += 1
            load.refused = InTiers.NO_ROOM
        else:
            self._clock.not_later_than(now + self._timeout)
        return reservation

    async def _fill(self, load: TierLoad, reservation: Reservation) -> bool:
        views = [self._memory.view(slot.offset, reservation.lengths[slot.position]) for slot in reservation.slots]
        (hit,) = await self._calls.make(self._tier.load, [Load(load.key, views)])
        return bool(hit)

    def _settle(self, load: TierLoad, reservation: Reservation | None, filled: bool) -> None:
        """The call of *load* has returned, or was not made. Synchronous, so no other task runs in between."""
        self._scopes.pop(load, None)
        if reservation is not None and not filled:
            self._index.abort(reservation.id, SERVER)
        if reservation is not None and filled:
            with suppress(Gone):  # a reset or its timeout came first
                keys = self._index.commit(reservation.id, SERVER)
                self.bytes_loaded += load.size
                for writer in self._others:
                    writer.offer(keys)
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

    def _end(self, load: TierLoad) -> None:
        scope = self._scopes.get(load)
        if scope is not None:
            scope.cancel()
        hold = self._holds.pop(load, None)
        if hold is not None:
            self._index.unhold(hold)

    @staticmethod
    def _tell(load: TierLoad) -> None:
        for wake in load.wishers:
            wake()
