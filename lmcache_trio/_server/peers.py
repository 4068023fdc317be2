"""All peers: their admission, and the end of a connection that is lost.

All methods are synchronous, but one: the wait for the exit of a process that may still be copying.
"""

import itertools
import logging
import os
from collections.abc import Iterator

import trio

from lmcache_trio._core.index.index import Index
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.drain import Drain
from lmcache_trio._server.engines import Engines
from lmcache_trio._server.peer import LostWriter, Peer
from lmcache_trio._server.tasks import Starter
from lmcache_trio._server.transfer.worker import TransferWorker
from lmcache_trio._wire.messages import Hello
from lmcache_trio.config import Config, format_size

__all__ = ["Peers"]

log = logging.getLogger("lmcache_trio.server")


class Peers:
    """The peers that are welcomed or connected, and the writers that were lost.

    *numbers* gives each its name in the index. *start* starts the wait for a lost writer's exit.
    """

    def __init__(  # noqa: PLR0913 each is a part that it works with
        self,
        config: Config,
        index: Index,
        engines: Engines,
        transfer: TransferWorker | None,
        numbers: "itertools.count[int]",
        drain: Drain,
        counts: Counts,
        start: Starter,
    ) -> None:
        self._config = config
        self._index = index
        self._engines = engines
        self._transfer = transfer
        self._numbers = numbers
        self._drain = drain
        self._counts = counts
        self._start = start
        self._peers: dict[int, Peer] = {}
        self.lost_writers: list[LostWriter] = []

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    @property
    def idle(self) -> bool:
        """Whether no peer has a copy or a read under way, and the device moves nothing for one."""
        moving = self._transfer is not None and self._transfer.busy
        return not moving and not any(peer.copies or peer.pins for peer in self)

    def admit(self, hello: Hello, peer_pid: int | None, pidfd: int | None, *, is_owner: bool) -> Peer:
        """A peer for the client that said *hello*, which `rendezvous` has checked. The peer owns *pidfd*."""
        unread = self._config.limits.pushes
        peer = Peer(next(self._numbers), hello, peer_pid, pidfd, is_owner, most_unread=unread)
        self._peers[peer.number] = peer
        self._engines.join(peer)
        return peer

    def dismiss(self, peer: Peer) -> None:
        """The connection is gone, or replaced: all that *peer* owned ends now. Idempotent.

        A peer that may still be copying becomes a lost writer. Its pidfd stays open until its process exits or the
        client says that its copies have ended. The connection's scope is cancelled.
        """
        if peer.lost:
            return
        peer.lost = True
        del self._peers[peer.number]
        self._engines.leave(peer)
        self._index.lose_worker(peer.number)
        if self._transfer is not None:
            self._transfer.lose(peer)
        if peer.pidfd is not None and peer.copies:
            writer = LostWriter(peer.number, peer.hello.token, peer.pidfd)
            self.lost_writers.append(writer)
            self._start(self._wait_exit, writer, name=f"exit of client {writer.number}")
        elif peer.pidfd is not None:
            os.close(peer.pidfd)
            peer.pidfd = None
        peer.copies.clear()
        peer.pins.clear()
        peer.outbox.clear()
        peer.scope.cancel()
        self._drain.progress.set()

    def end_some(self, peer: Peer, until: float) -> bool:
        """End sessions and reads of *peer*, at least one, *until* that time. True: there are more."""
        engine = self._engines.find(peer.hello)
        sessions = engine.sessions.live if engine is not None and engine.scheduler is peer else {}
        while True:
            if engine is not None and sessions:
                self._engines.end_session(engine, next(iter(sessions)))
            elif peer.pins:
                self._index.unpin(peer.pins.popitem()[0], peer.number)
            else:
                return False
            if trio.current_time() >= until:
                return True

    def copies_ended(self, writer: LostWriter) -> None:
        """The process of *writer* exited, or its client came back and said that its copies ended. Idempotent."""
        if writer in self.lost_writers:
            self.lost_writers.remove(writer)
            self._index.copies_ended(writer.number)
            writer.scope.cancel()

    async def _wait_exit(self, writer: LostWriter) -> None:
        """Wait until the process of *writer* has exited, or its client has spoken. Then its slots leave quarantine."""
        try:
            with writer.scope:
                await trio.lowlevel.wait_readable(writer.pidfd)
                self._counts.events["exits_seen"] += 1
                self.copies_ended(writer)
        finally:
            trio.lowlevel.notify_closing(writer.pidfd)
            os.close(writer.pidfd)

    def tell_overdue(self) -> None:
        """Log each client that did not commit in time, once per client."""
        for worker in self._index.overdue_writers():
            peer = self._peers.get(worker)
            if peer is None and self._transfer is not None:
                peer = self._transfer.attachments.peer_of(worker)
            if peer is None or "reservation_timeout" in peer.limits_met:
                continue
            peer.limits_met.add("reservation_timeout")
            words = (
                "%s (process %s) did not commit what it reserved within reservation_timeout (%g s): it is not served,"
                " and %s that its engine is writing stay taken until it says that its copies ended, or exits"
            )
            written = format_size(self._index.bytes_written_by(peer.hello.engine))
            log.warning(words, peer, peer.peer_pid, self._config.reservation_timeout, written)
