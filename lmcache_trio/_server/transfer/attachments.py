"""Attachments: the workers' KV that is open in the device, from Attach until no copy of it runs.

    Attach --opened--> attached --lost / registered or attached anew--> over --last copy ended--> detached
       |                   `--the end of a copy is not known--> fenced (no more requests) --the same--> over
       `--refused, or registered or attached anew meanwhile--> an ErrorReply

If a worker registers again while its memory is being opened, the opening is cancelled, because the layout has changed.
The loss of the client cancels it too, so that other openings need not wait. Fenced memory is never detached, since a
copy may still run there.
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
    """The registered layouts. It is told when the memory behind one is open, or fenced."""

    def attached(self, peer: Peer) -> None:
        """The memory of *peer* is open. Misuse: its layout cannot count."""

    def fenced(self, peer: Peer) -> None:
        """The device moves nothing more for *peer*."""


@attrs.define(eq=False)
class Work:
    """One request, for parts in one *group*. *grant* is the id of its reservation or pin.

    *blocks* has as many entries per slot as a part has blocks.
    """

    number: int
    group: int
    grant: bytes
    slots: Sequence[int]
    blocks: Sequence[int]
    event: bytes = b""
    dropped: dict[str, int] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Attachment:
    """One worker's KV, open in the device. *writer* and *reader* are its names in the index.

    *part_blocks*: blocks of a chunk's part, by KV group.
    """

    peer: Peer
    attached: Attached
    part_blocks: Sequence[int]
    writer: int
    reader: int
    registry: Registry
    works: dict[int, Transfer] = attrs.field(factory=dict)
    """The transfers under way, by the number of their request."""
    fenced: str = ""
    """The reason why no more requests are taken; "" while they are."""

    def part_bytes(self, group: int) -> int:
        """Bytes of a chunk's part in *group*."""
        return self.part_blocks[group] * self.attached.export.group_block_bytes[group]


class Attachments:
    """All attachments. *over* is told of one that is over; `settle` detaches it when no transfer of it is left."""

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

    def attach(self, peer: Peer, number: int, export: Export, part_blocks: Sequence[int], registry: Registry) -> None:
        """Open *export* in a task, which then sends the reply and closes the export's descriptors."""
        self.lose(peer)
        self._opening[peer.number] = scope = trio.CancelScope()
        self.unanswered[peer.number] += 1
        self._start(self._attach, peer, number, export, part_blocks, registry, scope, name="attach")

    async def _attach(
        self,
        peer: Peer,
        number: int,
        export: Export,
        part_blocks: Sequence[int],
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
            self._open[peer.number] = Attachment(peer, attached, part_blocks, writer, reader, registry)
        elif attached is not None:
            self._detach(attached)
            reply = ErrorReply(number, ErrorKind.UNAVAILABLE, why)
        peer.send(reply)
        if peer.number in self._open and latest:
            try:
                registry.attached(peer)  # after the reply, so no chunk is offered before the worker is ready
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
        except Exception as exc:  # a bug in the device: contained here, and answered
            self._counts.events["device_bugs"] += 1
            log.exception("bug in the device: the memory of %s was not opened", peer)
            why = f"internal error of the device: {exc!r}"
            return None, ErrorReply(number, ErrorKind.UNAVAILABLE, why[:4000])

    def of(self, peer: Peer) -> Attachment:
        """The attachment of *peer*, for one request more."""
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
        """The connection is gone, or its layout has changed: no copy for *peer* begins any more. Idempotent."""
        opening = self._opening.pop(peer.number, None)
        if opening is not None:
            opening.cancel()
        attachment = self._open.pop(peer.number, None)
        if attachment is not None:
            self._ending.add(attachment)
            self._index.lose_worker(attachment.writer)  # its stores are not published; slots stay in quarantine
            self._over(attachment)
            self.settle(attachment)

    def settle(self, attachment: Attachment) -> None:
        """Detach *attachment* if it is over and no transfer of it is left."""
        if attachment in self._ending and not attachment.works:
            self._ending.remove(attachment)
            self._detach(attachment.attached)

    def _detach(self, attached: Attached) -> None:
        try:
            self._device.detach(attached)
        except Exception:  # an engine's memory stays open, and all else goes on
            self._counts.events["device_bugs"] += 1
            log.exception("bug in the device: it did not let go of an engine's memory")
