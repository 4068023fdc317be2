"""Which schedulers are told what comes into memory and to tiers, and what leaves them, and the telling.

A scheduler asks for it by Watch, and its connection ends it. It is told of the namespaces that its engine has now, so
what happened to another one before is void for it, as NamespaceKnown tells it. Nothing is queued for a client that does
not read: it is told `cleared` once it reads again.

What happens in memory is told at the end of the turn in which it happened. A tier changes in no turn, so `run` tells
that.
"""

from collections.abc import Mapping

import trio

from lmcache_trio._core.index.changes import EVERY, Change
from lmcache_trio._core.index.index import Index
from lmcache_trio._core.keys import join_digests
from lmcache_trio._server.engines import Engines
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.tiers.tiers import Tiers
from lmcache_trio._wire.messages import MOST_TIERS, Changed

__all__ = ["Watches"]


class Watches:
    """The schedulers that watch."""

    def __init__(self, index: Index, tiers: Tiers, engines: Engines) -> None:
        self._memory = index.changes
        self._tiers = {
            number: runner.presence
            for number, runner in enumerate(tiers.runners[:MOST_TIERS], 1)
            if runner.presence.is_known
        }
        self._engines = engines
        self._behind: dict[Peer, bool] = {}  # by who watches: has it missed anything?
        self._stirred = trio.Event()
        for presence in self._tiers.values():
            presence.when_changed.append(self._stir)

    def add(self, peer: Peer) -> None:
        """Tell *peer* from now on."""
        self._behind[peer] = False
        self._memory.watched = True
        for presence in self._tiers.values():
            presence.watch()

    async def run(self) -> None:
        """Tell what changes on tiers, until cancelled."""
        while True:
            await self._stirred.wait()
            self._stirred = trio.Event()
            self.tell()

    def tell(self) -> None:
        """Tell all that has changed since the last call."""
        changes = [(0, self._memory.take())]
        changes += [(number, presence.changes.take()) for number, presence in self._tiers.items()]
        for peer, behind in list(self._behind.items()):
            if peer.lost:
                del self._behind[peer]
            elif peer.outbox:
                self._behind[peer] = True
            elif behind:
                self._behind[peer] = False
                peer.send(Changed(0, b"", b"", cleared=True))
            else:
                for tier, changed in changes:
                    self._send(peer, tier, changed)
        self._memory.watched = bool(self._behind)
        self._memory.pending = any(self._behind.values())
        if not self._behind:
            for presence in self._tiers.values():
                presence.unwatch()

    def _send(self, peer: Peer, tier: int, changes: Mapping[bytes, Change]) -> None:
        engine = self._engines.find(peer.hello)
        namespaces = () if engine is None else engine.namespaces
        for group, namespace in enumerate(namespaces):
            change = changes.get(EVERY) or changes.get(namespace)
            if change is not None and change.cleared:  # of all groups, before anything came
                peer.send(Changed(group, b"", b"", cleared=True, tier=tier))
                break
        for group, namespace in enumerate(namespaces):
            change = changes.get(namespace)
            if change is not None and (change.came or change.left):
                peer.send(Changed(group, join_digests(change.came), join_digests(change.left), tier=tier))

    def _stir(self) -> None:
        self._stirred.set()
