"""Which schedulers are told what comes into memory and what leaves it, and the telling.

A scheduler asks for it by Watch, and its connection ends it. It is told of the namespaces that its engine has now, so
what happened to another one before is void for it, as NamespaceKnown tells it. Nothing is queued for a client that does
not read: it is told `cleared` once it reads again.
"""

from collections.abc import Mapping

from lmcache_trio._core.index.changes import Change
from lmcache_trio._core.index.index import Index
from lmcache_trio._core.keys import join_digests
from lmcache_trio._server.engines import Engines
from lmcache_trio._server.peer import Peer
from lmcache_trio._wire.messages import Changed

__all__ = ["Watches"]


class Watches:
    """The schedulers that watch."""

    def __init__(self, index: Index, engines: Engines) -> None:
        self._changes = index.changes
        self._engines = engines
        self._behind: dict[Peer, bool] = {}  # by who watches: has it missed anything?

    def add(self, peer: Peer) -> None:
        """Tell *peer* from now on."""
        self._behind[peer] = False
        self._changes.watched = True

    def tell(self) -> None:
        """Tell all that has changed since the last call."""
        changes = self._changes.take()
        for peer, behind in list(self._behind.items()):
            if peer.lost:
                del self._behind[peer]
            elif peer.outbox:
                self._behind[peer] = True
            elif behind:
                self._behind[peer] = False
                peer.send(Changed(0, b"", b"", cleared=True))
            else:
                self._send(peer, changes)
        self._changes.watched = bool(self._behind)
        self._changes.pending = any(self._behind.values())

    def _send(self, peer: Peer, changes: Mapping[bytes, Change]) -> None:
        engine = self._engines.find(peer.hello)
        namespaces = () if engine is None else engine.namespaces
        for group, namespace in enumerate(namespaces):
            change = changes.get(namespace)
            if change is not None and change.cleared:  # of all groups, before anything came
                peer.send(Changed(group, b"", b"", cleared=True))
                break
        for group, namespace in enumerate(namespaces):
            change = changes.get(namespace)
            if change is not None and (change.came or change.left):
                peer.send(Changed(group, join_digests(change.came), join_digests(change.left)))
