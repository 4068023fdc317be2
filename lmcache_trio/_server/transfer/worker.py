"""The device transfer worker: moves the KV of engines that exported it, so that they need not.

A request owns its grant, under a name of its own in the index and not its client's, until the device says that the copy
has ended. Its engine may have died by then, its session ended, its namespace been reset: slots and engine memory stay
as they are. The worth of a copy is decided after it: the index publishes no chunk of a reservation that was aborted
meanwhile. A transfer that would be copied in vain is not begun. The reply gives the engine its blocks back.

    StoreBlocks     reserve --> its event --> queue --> device --> commit --> Stored
    RetrieveBlocks  pin     --> its event --> queue --> device --> unpin  --> Retrieved

A transfer whose event has not happened stands in no queue, so a stopped engine keeps no other from the device.

`_core.transfer.transfers` decides which copies run when, `attachments` has the open memory, `events` the waits for a
GPU. A bug in the device ends neither this worker nor the server. If nobody can tell when a copy ends, it keeps its
slots, its blocks and its engine's memory for good, and gets no reply. `supervise` passes the starter of all tasks.
"""

import itertools
import logging
from collections import Counter

import trio

from lmcache_trio._core.index.index import Index
from lmcache_trio._core.transfer.transfers import Batch, Direction, Transfer, Transfers
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.drain import Drain
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.tasks import Starter
from lmcache_trio._server.tiers.tiers import Tiers
from lmcache_trio._server.transfer.attachments import Attachment, Attachments, Work
from lmcache_trio._server.transfer.events import CopyEvents
from lmcache_trio._wire.messages import Ack, ErrorKind, ErrorReply, Message, Retrieved, Stored
from lmcache_trio.abc import ArenaDevice, Copy, Device, EventDevice, Ticket
from lmcache_trio.errors import LMCacheTrioError, Unavailable
from lmcache_trio.statistics import TransfersHeld

__all__ = ["TransferWorker"]

log = logging.getLogger("lmcache_trio.server")


class TransferWorker:
    """The one owner of the device's copies."""

    def __init__(  # noqa: PLR0913 each is a part that it works with
        self,
        device: Device,
        index: Index,
        tiers: Tiers,
        numbers: "itertools.count[int]",
        drain: Drain,
        counts: Counts,
        start: Starter,
    ) -> None:
        self._index = index
        self._tiers = tiers
        self._drain = drain
        self._counts = counts
        self._device = device
        self._start_task = start
        self._queue = Transfers()
        self.attachments = Attachments(device, index, numbers, start, counts, self._abort_all)
        self._work: dict[Transfer, tuple[Attachment, Work]] = {}
        self._events = CopyEvents(start, counts, happened=self._allow, failed=self._abort)
        self._moving: Counter[bytes] = Counter()  # requests under way, by their client's token
        self._asking: list[tuple[bytes, Peer, int]] = []  # LetGo questions
        self._wake = trio.Event()
        self._growing = False
        self._grew = False
        self.takes_events = isinstance(device, EventDevice)
        """Whether the device can wait for an event of an engine's GPU. If not, no GPU's memory is attached."""

    # --- the tasks --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start copies as there is room for them."""
        while True:
            self._drop_pointless()
            while (batch := self._queue.next()) is not None:
                self._start(batch)
                self._drop_pointless()
            self._wake = trio.Event()
            await self._wake.wait()

    def _drop_pointless(self) -> None:
        """Abort the next transfers if they would be in vain: stores that publish nothing, loads that are not valid."""
        while pointless := [transfer for transfer in self._queue.coming() if self._is_pointless(transfer)]:
            for transfer in pointless:
                self._abort(transfer)

    def _is_pointless(self, transfer: Transfer) -> bool:
        grant, index = self._work[transfer][1].grant, self._index
        return not (index.is_valid(grant) if transfer.direction is Direction.LOAD else index.may_publish(grant))

    def _start(self, batch: Batch) -> None:
        try:
            ticket = self._device.start(self._copy_of(batch))
        except LMCacheTrioError as exc:
            log.warning("the device took no copy: %s", exc)
            self._ended(batch, failed=True)
        except Exception:  # by the contract no copy was begun
            self._counts.events["device_bugs"] += 1
            log.exception("bug in the device: it took no copy")
            self._ended(batch, failed=True)
        else:
            self._start_task(self._see_end, batch, ticket, name="copy")

    async def _see_end(self, batch: Batch, ticket: Ticket) -> None:
        """Wait for the end of *batch*. Shielded: a copy keeps all that it owns until it has ended."""
        failed = False
        with trio.CancelScope(shield=True):
            try:
                await self._device.wait_ended(ticket)
            except Unavailable as exc:
                failed = True
                log.warning("%s", exc)
            except Exception:  # the copy may still run
                self._counts.events["device_bugs"] += 1
                log.exception("bug in the device: a copy's slots, and its engine's memory, are not used again")
                self._lost(batch)
                return
        self._ended(batch, failed=failed)

    def _copy_of(self, batch: Batch) -> Copy:
        attachment, first = self._work[batch.parts[0].transfer]
        count, slots, blocks = attachment.part_blocks[first.group], list[int](), list[int]()
        for part in batch.parts:
            work = self._work[part.transfer][1]
            slots += work.slots[part.first : part.end]
            blocks += work.blocks[part.first * count : part.end * count]
        return Copy(attachment.attached, batch.direction, slots, blocks, count, first.group)

    # --- the arena --------------------------------------------------------------------------------------------------

    def arena_grew(self) -> None:
        """Tell the device of the arena's growth, if it has a use for it; once for several pieces."""
        if isinstance(self._device, ArenaDevice) and len(self.attachments):
            self._grew = True
            if not self._growing:
                self._growing = True
                self._start_task(self._tell_growth, self._device, name="arena of the device")

    async def _tell_growth(self, device: ArenaDevice) -> None:
        try:
            while self._grew:  # also while the device was told
                self._grew = False
                await device.arena_grew()
        except LMCacheTrioError as exc:
            log.warning("the device does not make use of all of the arena: %s", exc)
        except Exception:
            self._counts.events["device_bugs"] += 1
            log.exception("bug in the device: it did not take note of the arena's growth")
        finally:
            self._growing = False

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, attachment: Attachment, work: Work, direction: Direction) -> None:
        """Begin a store into the reservation `work.grant` of `attachment.writer`, or a load under the pin `work.grant`
        of `attachment.reader`.
        """
        owner, size = (attachment, work.group), attachment.part_bytes(work.group)
        device = self._device if work.event and isinstance(self._device, EventDevice) else None
        transfer = Transfer(direction, owner, [size] * len(work.slots), allowed=device is None)
        attachment.works[work.number] = transfer
        self._work[transfer] = (attachment, work)
        self._moving[attachment.peer.hello.token] += 1
        self._queue.submit(transfer)
        self._wake.set()
        if device is not None:
            self._events.wait(device, attachment, work.event, transfer)

    def _allow(self, transfer: Transfer) -> None:
        self._queue.allow(transfer)
        self._wake.set()

    def lose(self, peer: Peer) -> None:
        """The connection is gone, or its layout has changed: no copy for *peer* begins any more. Idempotent."""
        self.attachments.lose(peer)
        self._asking = [asked for asked in self._asking if not asked[1].lost]

    def end_grants(self, peer: Peer) -> None:
        """The grants of the client's engine have ended: no request of before begins any more."""
        attachment = self.attachments.find(peer)
        if attachment is not None:
            self._index.lose_worker(attachment.writer)
            self._abort_all(attachment)

    def withdraw(self, peer: Peer, number: int) -> None:
        """Request *number* is not wanted any more. It may have been answered already."""
        attachment = self.attachments.find(peer)
        if attachment is not None and number in attachment.works:
            self._abort(attachment.works[number])

    def let_go(self, asker: Peer, number: int, token: bytes) -> Message | None:
        """Ack now; or None, and an Ack later, once no copy for the client with *token* runs."""
        if self._moving[token]:
            self._asking.append((token, asker, number))
            return None
        return Ack(number)

    # --- ends -------------------------------------------------------------------------------------------------------

    def _abort(self, transfer: Transfer) -> None:
        if self._queue.abort(transfer):
            self._finish(transfer)
        self._wake.set()

    def _abort_all(self, attachment: Attachment) -> None:
        for transfer in list(attachment.works.values()):
            self._abort(transfer)

    def _ended(self, batch: Batch, *, failed: bool) -> None:
        for transfer in self._queue.ended(batch, failed=failed):
            self._finish(transfer)
        self._wake.set()

    def _lost(self, batch: Batch) -> None:
        """The end of *batch* cannot be told: nothing more is moved for its worker, and all others go on."""
        attachment = self._work[batch.parts[0].transfer][0]
        attachment.fenced = "the device lost sight of a copy of this memory: nothing more is moved for this worker"
        self._queue.lost(batch)
        self._abort_all(attachment)
        attachment.registry.fenced(attachment.peer)

    def _finish(self, transfer: Transfer) -> None:
        """No copy of *transfer* runs any more: give back all that it owned, and reply."""
        attachment, work = self._work.pop(transfer)
        del attachment.works[work.number]
        self._events.over(transfer)
        reply: Message
        if transfer.direction is Direction.LOAD:
            valid = self._index.unpin(work.grant, attachment.reader)
            reply = Retrieved(work.number, valid and transfer.succeeded)
        else:
            reply = self._stored(attachment, work, succeeded=transfer.succeeded)
        if attachment.fenced and not transfer.succeeded:
            reply = ErrorReply(work.number, ErrorKind.UNAVAILABLE, attachment.fenced)
        attachment.peer.send(reply)
        self.attachments.settle(attachment)
        self._answer_asking(attachment.peer.hello.token)
        self._drain.progress.set()

    def _stored(self, attachment: Attachment, work: Work, *, succeeded: bool) -> Stored:
        index, count = self._index, len(work.slots)
        kept = index.would_keep(work.grant)  # without the chunks that were aborted, though their copy ran
        if not succeeded or not kept:
            index.abort(work.grant, attachment.writer)
            work.dropped["failed" if kept else "aborted"] = count
            return Stored(work.number, 0, 0, work.dropped)
        keys = index.commit(work.grant, attachment.writer)
        if kept < count:
            work.dropped["aborted"] = count - kept
        for writer in self._tiers.writers:
            writer.offer(keys)
        return Stored(work.number, kept, len(keys), work.dropped)

    def _answer_asking(self, token: bytes) -> None:
        """One request less is under way for the client with *token*. Answer its LetGo questions if it was the last."""
        self._moving[token] -= 1
        if not self._moving[token]:
            del self._moving[token]
            for asked in [asked for asked in self._asking if asked[0] == token]:
                self._asking.remove(asked)
                asked[1].send(Ack(asked[2]))

    # --- status -----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a copy runs, or waits to."""
        return bool(self._work)

    def statistics(self) -> TransfersHeld:
        """The figures of now."""
        attaching = self.attachments.unanswered.total()
        return TransfersHeld(self._queue.statistics(), attached=len(self.attachments), attaching=attaching)
