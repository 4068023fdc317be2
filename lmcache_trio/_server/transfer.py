"""The device transfer worker: moves the KV of engines that exported it, so that they need not.

A request owns what the index gave it under names of its own (not its client's), until the device says that its copy has
ended: its engine may have died, its session ended, its namespace been reset; slots and engine memory stay as they are
until then. What a copy was good for is decided after it: the index publishes nothing of a reservation that was aborted
meanwhile. The reply is what gives the engine its blocks back.

    StoreBlocks     reserve --> queue --> device --> commit --> Stored
    RetrieveBlocks  pin     --> queue --> device --> unpin  --> Retrieved

Which copies run when is decided in `_core.transfers`. This starts no task: `supervise` gives it `spawn`.
"""

import logging
from collections.abc import Callable, Sequence

import attrs
import trio

from lmcache_trio._core.transfers import Batch, Direction, Transfer, Transfers
from lmcache_trio._server.state import Client, State
from lmcache_trio._wire.messages import Ack, ErrorKind, ErrorReply, LayersDone, Message, Retrieved, Stored
from lmcache_trio.abc import Attached, Copy, Device, Export, Ticket
from lmcache_trio.errors import Gone, LMCacheTrioError, Misuse, Unavailable

__all__ = ["Attachment", "TransferWorker", "Work"]

log = logging.getLogger("lmcache_trio.server")

Spawn = Callable[..., None]


@attrs.define(eq=False)
class Attachment:
    """One worker's KV, open in the device. *writer* and *reader* are its names in the index."""

    client: Client
    attached: Attached
    chunk_blocks: int
    writer: int
    reader: int
    works: "dict[int, Work]" = attrs.field(factory=dict)
    over: bool = False
    """Nothing more is taken; it is detached when nothing of it runs."""


@attrs.define(eq=False)
class Work:
    """One request. *grant* is its reservation or pin; *blocks* has `chunk_blocks` entries a slot."""

    number: int
    grant: bytes
    slots: Sequence[int]
    blocks: Sequence[int]
    event: bytes = b""
    dropped: dict[str, int] = attrs.field(factory=dict)
    layers_ended: set[int] = attrs.field(factory=set)
    layers_told: int = 0


class TransferWorker:
    """All attachments, and the one owner of the device's copies."""

    def __init__(self, state: State, device: Device, spawn: Spawn, queue: Transfers | None = None) -> None:
        self._state = state
        self._device = device
        self._spawn = spawn
        self._queue = Transfers() if queue is None else queue
        self._attachments: dict[int, Attachment] = {}  # by client
        self._ending: set[Attachment] = set()
        self._work: dict[Transfer, tuple[Attachment, Work]] = {}
        self._waiting: list[tuple[bytes, Client, int]] = []  # LetGo questions
        self._wake = trio.Event()

    # --- the tasks --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start copies as they come and as there is room."""
        while True:
            while (batch := self._queue.next()) is not None:
                self._start(batch)
            self._wake = trio.Event()
            await self._wake.wait()

    def _start(self, batch: Batch) -> None:
        try:
            ticket = self._device.start(self._copy_of(batch))
        except LMCacheTrioError as exc:
            log.warning("the device took no copy: %s", exc)
            self._ended(batch, failed=True)
        else:
            self._spawn(self._see_end, batch, ticket, name="copy")

    async def _see_end(self, batch: Batch, ticket: Ticket) -> None:
        """Shielded: what a copy owns is not given back before it has ended, whoever gives up waiting."""
        failed = False
        with trio.CancelScope(shield=True):
            try:
                await self._device.wait_ended(ticket)
            except Unavailable as exc:
                failed = True
                log.warning("%s", exc)
            except Exception:  # nobody knows whether the copy has ended: what it owns stays owned
                self._state.counted["device_bugs"] += 1
                log.exception("bug in the device: a copy's slots are not used again")
                return
        self._ended(batch, failed=failed)

    def _copy_of(self, batch: Batch) -> Copy:
        attachment, work = self._work[batch.parts[0].transfer]
        count, slots, blocks, events = attachment.chunk_blocks, [*work.slots], [*work.blocks], []
        layers = (0, len(attachment.attached.export.layers))
        if batch.parts[0].transfer.layered:
            layers = (batch.parts[0].first, batch.parts[0].end)
        else:
            slots, blocks = [], []
            for part in batch.parts:
                work = self._work[part.transfer][1]
                slots += work.slots[part.first : part.end]
                blocks += work.blocks[part.first * count : part.end * count]
        for part in batch.parts:
            if self._work[part.transfer][1].event:
                events.append(self._work[part.transfer][1].event)
        return Copy(attachment.attached, batch.direction, slots, blocks, count, layers, events)

    # --- attachments ------------------------------------------------------------------------------------------------

    def attach(self, client: Client, number: int, export: Export, chunk_blocks: int) -> None:
        """Open *export*, which takes its time; the reply is sent when that is known."""
        former = self._attachments.pop(client.number, None)
        if former is not None:
            self._end(former)
        self._spawn(self._attach, client, number, export, chunk_blocks, name="attach")

    async def _attach(self, client: Client, number: int, export: Export, chunk_blocks: int) -> None:
        try:
            attached = await self._device.attach(export, client.peer_pid or 0)
        except LMCacheTrioError as exc:
            log.info("the memory of %s cannot be opened: %s", client, exc)
            kind = ErrorKind.MISUSE if isinstance(exc, Misuse) else ErrorKind.UNAVAILABLE
            client.send(ErrorReply(number, kind, str(exc)[:4000]))
            return
        except Exception as exc:  # a bug of the device's: told to everyone whom it may concern, and contained
            self._state.counted["device_bugs"] += 1
            log.exception("bug in the device: the memory of %s was not opened", client)
            client.send(ErrorReply(number, ErrorKind.UNAVAILABLE, f"internal error of the device: {exc!r}"[:4000]))
            return
        if client.lost or client.number in self._attachments:
            self._device.detach(attached)
            return
        new = self._state.new_number
        self._attachments[client.number] = Attachment(client, attached, chunk_blocks, new(), new())
        client.send(Ack(number))

    def of(self, client: Client) -> Attachment:
        """The attachment of *client*, which may be asked to move something."""
        found = self._attachments.get(client.number)
        if found is None or client.lost:
            raise Misuse(f"{client} has no memory attached: say Attach, and wait for its reply")
        return found

    def lose(self, client: Client) -> None:
        """The connection is gone, or its layout is another now: nothing of it begins any more. Idempotent."""
        attachment = self._attachments.pop(client.number, None)
        if attachment is not None:
            self._end(attachment)

    def _end(self, attachment: Attachment) -> None:
        attachment.over = True
        self._ending.add(attachment)
        self._state.index.lose_worker(attachment.writer)  # nothing is published; the slots stay quarantined
        for transfer in [transfer for transfer, (owner, _) in self._work.items() if owner is attachment]:
            self._abort(transfer)
        self._settle(attachment)

    def _settle(self, attachment: Attachment) -> None:
        if attachment.over and not attachment.works and attachment in self._ending:
            self._ending.remove(attachment)
            self._device.detach(attachment.attached)

    # --- requests ---------------------------------------------------------------------------------------------------

    def store(self, attachment: Attachment, work: Work) -> None:
        """Begin a store into the reservation `work.grant` of `attachment.writer`."""
        self._submit(attachment, work, Direction.STORE, layered=False)

    def load(self, attachment: Attachment, work: Work, *, layered: bool) -> None:
        """Begin a load under the pin `work.grant` of `attachment.reader`."""
        self._submit(attachment, work, Direction.LOAD, layered=layered)

    def _submit(self, attachment: Attachment, work: Work, direction: Direction, *, layered: bool) -> None:
        export, count = attachment.attached.export, attachment.chunk_blocks
        if layered:
            chunks = len(work.slots)
            units = [chunks * count * sum(piece.length for piece in layer) for layer in export.pieces]
        else:
            units = [count * export.block_bytes] * len(work.slots)
        transfer = Transfer(direction, attachment, units, layered)
        attachment.works[work.number] = work
        self._work[transfer] = (attachment, work)
        self._queue.submit(transfer)
        self._wake.set()

    def withdraw(self, client: Client, number: int) -> None:
        """Request *number* is not wanted any more; one that is not there has been answered already."""
        for transfer, (attachment, work) in list(self._work.items()):
            if attachment.client is client and work.number == number:
                self._abort(transfer)

    def let_go(self, asker: Client, number: int, token: bytes) -> Message | None:
        """Ack now, or later, once no copy for the client with *token* runs."""
        if self._busy(token):
            self._waiting.append((token, asker, number))
            return None
        return Ack(number)

    def _busy(self, token: bytes) -> bool:
        return any(attachment.client.hello.token == token for attachment, _ in self._work.values())

    # --- ends -------------------------------------------------------------------------------------------------------

    def _abort(self, transfer: Transfer) -> None:
        if self._queue.abort(transfer):
            self._finish(transfer)
        self._wake.set()

    def _ended(self, batch: Batch, *, failed: bool) -> None:
        for part in batch.parts:
            if part.transfer.layered and not failed:
                self._layers_ended(*self._work[part.transfer], range(part.first, part.end))
        for transfer in self._queue.ended(batch, failed=failed):
            self._finish(transfer)
        self._wake.set()

    def _layers_ended(self, attachment: Attachment, work: Work, layers: range) -> None:
        work.layers_ended.update(layers)
        told = work.layers_told
        while work.layers_told in work.layers_ended:
            work.layers_told += 1
        if work.layers_told > told:
            attachment.client.send(LayersDone(work.number, work.layers_told))

    def _finish(self, transfer: Transfer) -> None:
        """No copy of it runs: give back what it owned, and say what came of it."""
        attachment, work = self._work.pop(transfer)
        del attachment.works[work.number]
        reply: Message
        if transfer.direction is Direction.LOAD:
            valid = self._state.index.unpin(work.grant, attachment.reader)
            reply = Retrieved(work.number, valid and transfer.succeeded)
        else:
            reply = self._stored(attachment, work, succeeded=transfer.succeeded)
        attachment.client.send(reply)
        self._settle(attachment)
        self._answer_waiting()
        self._state.note_progress()

    def _stored(self, attachment: Attachment, work: Work, *, succeeded: bool) -> Stored:
        index, count = self._state.index, len(work.slots)
        if not succeeded:
            index.abort(work.grant, attachment.writer)
            work.dropped["failed"] = count
            return Stored(work.number, 0, 0, work.dropped)
        try:
            keys = index.commit(work.grant, attachment.writer)
            published = len(keys)
            self._state.tiers.stored(keys)
        except Gone:  # aborted while it ran: its copy has ended by this, and that is all
            published = 0
        return Stored(work.number, count, published, work.dropped)

    def _answer_waiting(self) -> None:
        for waiting in [waiting for waiting in self._waiting if not self._busy(waiting[0])]:
            self._waiting.remove(waiting)
            waiting[1].send(Ack(waiting[2]))

    # --- status -----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Does a copy run, or wait to?"""
        return bool(self._work)

    def statistics(self) -> dict[str, int]:
        """What is held now."""
        return {"attached": len(self._attachments) + len(self._ending), **self._queue.statistics()}
