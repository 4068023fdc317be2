"""What a worker asks of the device transfer worker, sentence by sentence: checked here, before anything is granted.

Like the other handlers these are plain functions that never wait. What they return is the reply; None means that it
comes later, from the transfer worker.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_trio._core.exports import CudaMemory, Export
from lmcache_trio._core.keys import split_digests
from lmcache_trio._server.rendezvous import dismiss
from lmcache_trio._server.state import Client, Engine, State
from lmcache_trio._server.transfer import TransferWorker
from lmcache_trio._server.transfer_attachments import Attachment, Work
from lmcache_trio._wire.codec import unpack_offsets, unpack_positions
from lmcache_trio._wire.handles import decode_export
from lmcache_trio._wire.messages import (
    Attach,
    LayersWritten,
    LetGo,
    Message,
    Register,
    RetrieveBlocks,
    StoreBlocks,
    Stored,
    Withdraw,
)
from lmcache_trio.errors import Gone, Misuse, ProtocolError, Unavailable

__all__ = ["HANDLERS"]

EVENT_BYTES = 64
"""Of a CUDA IPC event's handle."""


def _attach(state: State, client: Client, message: Attach) -> Message | None:
    transfer = _transfer(state)
    engine = _engine(state, client)
    layout = engine.layouts.get(client.hello.shard) or engine.attaching.get(client.hello.shard)
    if layout is None or engine.workers.get(client.hello.shard) is not client:
        raise Misuse("register the layout before its memory is attached")
    if transfer.attachments.unanswered[client.number] >= state.config.limits.attaches:
        raise state.over_limit(client, "attaches", f"{state.config.limits.attaches} Attach without a reply")
    descriptors = client.transport.take_descriptors() if client.transport is not None else []
    try:
        export = _exported(state, message, descriptors, layout)
    except BaseException:
        for fd in descriptors:
            os.close(fd)
        raise
    transfer.attachments.attach(client, message.id, export, state.config.chunk_tokens // layout.block_tokens)
    return None


def _exported(state: State, message: Attach, descriptors: Sequence[int], layout: Register) -> Export:
    """What *message* exports, if it is the memory of *layout* and can be opened now."""
    transfer = _transfer(state)
    try:
        export = decode_export(message.export, descriptors)
    except ProtocolError as exc:  # a wrong handle costs its sender the device, not its connection
        raise Misuse(str(exc)) from exc
    if isinstance(export.memory[0], CudaMemory) and not transfer.takes_events:
        raise Unavailable("this server's device cannot wait for what a GPU has still to write: copy through the arena")
    chunk_blocks = state.config.chunk_tokens // layout.block_tokens
    if export.block_bytes * chunk_blocks != layout.shard_bytes:
        raise Misuse(
            f"the export's chunks have {export.block_bytes * chunk_blocks} bytes, the registered ones "
            f"{layout.shard_bytes}: register and export the same tensors"
        )
    if state.stopping:
        raise Unavailable("the server is stopping")
    return export


def _store_blocks(state: State, client: Client, message: StoreBlocks) -> Message | None:
    transfer, engine = _transfer(state), _engine(state, client)
    attachment = transfer.attachments.of(client)
    digests, blocks = split_digests(message.digests), unpack_positions(message.blocks)
    count = attachment.chunk_blocks
    _check_slots(state, engine, client, attachment)
    if not digests or len(blocks) != len(digests) * count:
        raise Misuse(f"{len(blocks)} blocks for {len(digests)} chunks: give {count} a chunk, one chunk or more")
    _check_blocks(blocks, attachment.attached.export.num_blocks)
    _check_begin(attachment, message)
    if message.layered and message.event:
        raise Misuse("a layered store follows the events of its layers: it has none of its own")
    made = state.reserve(client, engine, attachment.writer, message.session, message.parent, digests)
    if not made.id:
        return Stored(message.id, 0, 0, dict(made.dropped))
    chosen = [block for slot in made.slots for block in blocks[slot.position * count : (slot.position + 1) * count]]
    offsets = [slot.offset for slot in made.slots]
    work = Work(message.id, made.id, offsets, chosen, message.event, dict(made.dropped))
    transfer.store(attachment, work, layered=message.layered)
    return None


def _retrieve_blocks(state: State, client: Client, message: RetrieveBlocks) -> Message | None:
    transfer, engine = _transfer(state), _engine(state, client)
    attachment = transfer.attachments.of(client)
    blocks, count = unpack_positions(message.blocks), attachment.chunk_blocks
    _check_slots(state, engine, client, attachment)
    rest = message.count * count - message.skip - len(blocks)
    if message.skip >= count or rest < 0 or not blocks:
        raise Misuse(f"{len(blocks)} blocks after {message.skip} do not lie within {message.count} chunks of {count}")
    _check_blocks(blocks, attachment.attached.export.num_blocks)
    _check_begin(attachment, message)
    if state.stopping:
        raise Unavailable("the server is stopping")
    reader, shard = attachment.reader, client.hello.shard
    pin = state.index.pin(message.lease, engine.name, engine.namespace, reader, shard, message.start, message.count)
    every = [-1] * message.skip + list(blocks) + [-1] * rest
    transfer.load(attachment, Work(message.id, pin.id, pin.offsets, every, message.event), layered=message.layered)
    return None


def _layers_written(state: State, client: Client, message: LayersWritten) -> None:
    transfer = _transfer(state)
    attachment = transfer.attachments.find(client)
    if attachment is None:  # what it speaks of has been answered, or will be, without it
        return
    _check_event(attachment, message.event)
    layers = len(attachment.attached.export.layers)
    if message.layers > layers:
        raise Misuse(f"{message.layers} layers were written: there are {layers}")
    transfer.layers_written(attachment, unpack_offsets(message.requests), message.layers, message.event)


def _withdraw(state: State, client: Client, message: Withdraw) -> None:
    _transfer(state).withdraw(client, message.request)


def _let_go(state: State, client: Client, message: LetGo) -> Message | None:
    """End what is left of that client's connection first: what it still had to say is not listened to any more."""
    for other in [c for c in state.clients.values() if c.hello.token == message.token and c is not client]:
        if not other.is_process(client.peer_pid, client.pidfd):
            raise Misuse("LetGo speaks for another process' client")
        dismiss(state, other)
    return _transfer(state).let_go(client, message.id, message.token)


def _transfer(state: State) -> TransferWorker:
    if state.transfer is None:
        raise Unavailable("this server has no device: its setting device.backend is none")
    return state.transfer


def _engine(state: State, client: Client) -> Engine:
    engine = state.engine_of(client)
    if engine is None or client.lost:
        raise Gone(f"the engine of {client} is not there any more")
    return engine


def _check_slots(state: State, engine: Engine, client: Client, attachment: Attachment) -> None:
    """A copy between a slot and a chunk's blocks must fill both exactly, whoever said how long they are."""
    lengths = state.index.shard_bytes(engine.namespace)
    if lengths and lengths[client.hello.shard] != attachment.chunk_blocks * attachment.attached.export.block_bytes:
        raise Misuse(
            f"{attachment.chunk_blocks} attached blocks of {attachment.attached.export.block_bytes} bytes do not fill a"
            f" slot of {lengths[client.hello.shard]} bytes: register and attach the same tensors"
        )


def _check_begin(attachment: Attachment, message: StoreBlocks | RetrieveBlocks) -> None:
    if message.id in attachment.works:
        raise Misuse(f"request {message.id} is under way")
    _check_event(attachment, message.event)


def _check_event(attachment: Attachment, event: bytes) -> None:
    if len(event) not in (0, EVENT_BYTES):
        raise Misuse(f"an event has {EVENT_BYTES} bytes, not {len(event)}")
    if event and not isinstance(attachment.attached.export.memory[0], CudaMemory):
        raise Misuse("an event orders work on a GPU, and the memory that was attached is the host's")


def _check_blocks(blocks: tuple[int, ...], num_blocks: int) -> None:
    if max(blocks) >= num_blocks:
        raise Misuse(f"block {max(blocks)} is asked for: there are {num_blocks}")


HANDLERS: dict[type[Message], Callable[[State, Client, Any], Message | None]] = {
    Attach: _attach,
    StoreBlocks: _store_blocks,
    RetrieveBlocks: _retrieve_blocks,
    LayersWritten: _layers_written,
    Withdraw: _withdraw,
    LetGo: _let_go,
}
