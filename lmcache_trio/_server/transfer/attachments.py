"""Whose KV is open in the device: which memory belongs to which worker, from Attach until no copy of it runs.

    Attach --opened--> attached --lost / registered or attached anew--> over --last copy ended--> detached
       |                   `--the end of a copy is not known--> fenced (nothing more is taken) --the same--> over
       `--refused, or overtaken by what came meanwhile--> an ErrorReply

If a worker registers again while its memory is being opened, the opening is cancelled, because the layout has changed.
The loss of the client cancels it too, so that other openings need not wait. Fenced memory is never let go, since a copy
may still run there.
"""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import trio

from lmcache_trio._core.index.index import Index
from lmcache_trio._core.transfer.transfers import Transfer
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.tasks import Starter
from lmcache_trio._wire.messages import Ack, ErrorKind, ErrorReply, Message
from lmcache_trio.abc import Attached, Device, Export, SharedMemory
from lmcache_trio.errors import LMCacheTrioError, Misuse, Unavailable

__all__ = ["Attachment", "Attachments", "Work"]

log = logging.getLogger("lmcache_trio.server")

MAX_WORKS = 1024
"""Requests of one worker that may be under way. At 32 MiB (5 ms) each, the last one waits five seconds."""


class Registry(Protocol):
    """The registered layouts: told what becomes of the memory behind one."""

    def attached(self, peer: Peer) -> None:
        """The memory of *peer* is open. Misuse: its layout cannot count."""

    def fenced(self, peer: Peer) -> None:
        """Nothing more is moved for *peer*."""


@attrs.define(eq=False)
class Work:
    """One request. *grant* is its reservation or pin; *blocks* has `chunk_blocks` entries a slot."""

    number: int
    grant: bytes
    slots: Sequence[int]
    blocks: Sequence[int]
    event: bytes = b""
    dropped: dict[str, int] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Attachment:
    """One worker's KV, open in the device. *writer* and *reader* are its names in the index."""

    peer: Peer
    attached: Attached
    chunk_blocks: int
    writer: int
    reader: int
    registry: Registry
    works: dict[int, Transfer] = attrs.field(factory=dict)
    """What is under way, by the number of its request."""
    fenced: str = ""
    """Why nothing more is taken, if so."""


class Attachments:
    """All of them. *over* is told of one that ends; `settle` lets go of it when nothing of it runs any more."""

    def __init__(
        self,
        device: Device,
        index: Index,
        numbers: "itertools.count[int]",
        start: Starter,
        counts: Counts,
        over: Callable[[Attachment], None],
    ) -> None:
        self._index = index
        self._numbers = numbers
        self._counts = counts
        self._device = device
        self._start = start
        self._over = over
        self._open: dict[int, Attachment] = {}  # by client
        self._opening: dict[int, trio.CancelScope] = {}  # by client: the latest Attach that has no reply yet
        self.unanswered: Counter[int] = Counter()  # by client
        self._ending: set[Attachment] = set()

    def __len__(self) -> int:
        return len(self._open) + len(self._ending)

    def attach(self, peer: Peer, number: int, export: Export, chunk_blocks: int, registry: Registry) -> None:
        """Open *export*, which takes its time; when that is known, the reply is sent and its descriptors are closed."""
        self.lose(peer)
        self._opening[peer.number] = scope = trio.CancelScope()
        self.unanswered[peer.number] += 1
        self._start(self._attach, peer, number, export, chunk_blocks, registry, scope, name="attach")

    async def _attach(
        self,
        peer: Peer,
        number: int,
        export: Export,
        chunk_blocks: int,
        registry: Registry,
        scope: trio.CancelScope,
    ) -> None:
        why = "the layout was registered, or the memory attached, anew while this was being opened"
        attached: Attached | None = None
        reply: Message = ErrorReply(number, ErrorKind.UNAVAILABLE, why)
        try:
            with scope:
                attached, reply = await self._opened(peer, number, export)
        finally:
            for memory in export.memory:
                if isinstance(memory, SharedMemory):
                    os.close(memory.descriptor)
            self.unanswered[peer.number] -= 1
            if not self.unanswered[peer.number]:
                del self.unanswered[peer.number]
        latest = self._opening.get(peer.number) is scope
        if latest:
            del self._opening[peer.number]
        if attached is not None and latest:
            writer, reader = next(self._numbers), next(self._numbers)
            self._open[peer.number] = Attachment(peer, attached, chunk_blocks, writer, reader, registry)
        elif attached is not None:
            self._detach(attached)
            reply = ErrorReply(number, ErrorKind.UNAVAILABLE, why)
        peer.send(reply)
        if peer.number in self._open and latest:
            try:
                registry.attached(peer)  # behind the reply, so that nothing is offered before the worker is ready
            except Misuse as exc:
                log.warning("the layout of %s does not count: %s", peer, exc)
                self.lose(peer)

    async def _opened(self, peer: Peer, number: int, export: Export) -> tuple[Attached | None, Ack | ErrorReply]:
        try:
            return await self._device.attach(export), Ack(number)
        except LMCacheTrioError as exc:
            self._counts.events["attaches_refused"] += 1
            log.info("the memory of %s cannot be opened: %s", peer, exc)
            kind = ErrorKind.MISUSE if isinstance(exc, Misuse) else ErrorKind.UNAVAILABLE
            return None, ErrorReply(number, kind, str(exc)[:4000])
        except Exception as exc:  # a bug of the device's: told to everyone whom it may concern, and contained
            self._counts.events["device_bugs"] += 1
            log.exception("bug in the device: the memory of %s was not opened", peer)
            why = f"internal error of the device: {exc!r}"
            return None, ErrorReply(number, ErrorKind.UNAVAILABLE, why[:4000])

    def of(self, peer: Peer) -> Attachment:
        """The attachment of *peer*, which may be asked to move one thing more."""
        found = self._open.get(peer.number)
        if found is None or peer.lost:
            raise Misuse(f"{peer} has no memory attached: say Attach, and wait for its reply")
        if found.fenced:
            raise Unavailable(found.fenced)
        if len(found.works) >= MAX_WORKS:
            raise Unavailable(f"{MAX_WORKS} requests of {peer} are under way: wait for some of them")
        return found

    def find(self, peer: Peer) -> Attachment | None:
        """The attachment of *peer*, if there is one."""
        return self._open.get(peer.number)

    def peer_of(self, writer: int) -> Peer | None:
        """The peer whose attachment is *writer* in the index, if there is one."""
        return next((found.peer for found in self._open.values() if found.writer == writer), None)

    def lose(self, peer: Peer) -> None:
        """The connection is gone, or its layout is another now: nothing of it begins any more. Idempotent."""
        opening = self._opening.pop(peer.number, None)
        if opening is not None:
            opening.cancel()
        attachment = self._open.pop(peer.number, None)
        if attachment is not None:
            self._ending.add(attachment)
            self._index.lose_worker(attachment.writer)  # nothing is published; the slots stay quarantined
            self._over(attachment)
            self.settle(attachment)

    def settle(self, attachment: Attachment) -> None:
        """Let go of it, if it is over and nothing of it runs any more."""
        if attachment in self._ending and not attachment.works:
            self._ending.remove(attachment)
            self._detach(attachment.attached)

    def _detach(self, attached: Attached) -> None:
        try:
            self._device.detach(attached)
        except Exception:  # an engine's memory stays open, and nothing else comes of it
            self._counts.events["device_bugs"] += 1
            log.exception("bug in the device: it did not let go of an engine's memory")
