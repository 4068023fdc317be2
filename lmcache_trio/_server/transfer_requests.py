"""The handlers of a worker's requests to the transfer worker. They check a request before the index grants anything.

Like the other handlers these are plain functions that never wait. They return the reply, or None if it comes later,
from the transfer worker.
"""

import os
from collections.abc import Callable, Sequence
from operator import mul
from typing import Any

from lmcache_trio._core.keys import DIGEST_BYTES
from lmcache_trio._core.transfer.exports import CudaMemory, Export
from lmcache_trio._core.transfer.transfers import Direction
from lmcache_trio._server.engine import Engine
from lmcache_trio._server.parts import Parts
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.transfer.attachments import Attachment, Work
from lmcache_trio._server.transfer.worker import TransferWorker
from lmcache_trio._wire.codec import POSITIONS
from lmcache_trio._wire.handles import decode_export
from lmcache_trio._wire.messages import (
    Attach,
    LetGo,
    Message,
    Register,
    RetrieveBlocks,
    StoreBlocks,
    Stored,
    Withdraw,
)
from lmcache_trio.errors import Misuse, ProtocolError, Unavailable

__all__ = ["HANDLERS"]

EVENT_BYTES = 64
"""The length of a CUDA IPC event's handle."""


def _attach(parts: Parts, peer: Peer, message: Attach) -> Message | None:
    transfer = _transfer(parts)
    engine = parts.engines.of(peer)
    layout = engine.layouts.get(peer.hello.rank) or engine.attaching.get(peer.hello.rank)
    if layout is None or engine.workers.get(peer.hello.rank) is not peer:
        raise Misuse("register the layout before its memory is attached")
    if transfer.attachments.unanswered[peer.number] >= parts.config.limits.attaches:
        raise parts.counts.over_limit(peer, "attaches", f"{parts.config.limits.attaches} Attach without a reply")
    part_blocks = engine.part_blocks(layout)
    descriptors = peer.transport.take_descriptors() if peer.transport is not None else []
    try:
        export = _exported(parts, message, descriptors, layout, part_blocks)
    except BaseException:
        for fd in descriptors:
            os.close(fd)
        raise
    transfer.attachments.attach(peer, message.id, export, part_blocks, parts.engines)
    return None


def _exported(
    parts: Parts, message: Attach, descriptors: Sequence[int], layout: Register, part_blocks: Sequence[int]
) -> Export:
    """The export of *message*, if it is the memory of *layout* and can be opened now. *part_blocks*: by group."""
    transfer = _transfer(parts)
    try:
        export = decode_export(message.export, descriptors)
    except ProtocolError as exc:  # a wrong handle costs its sender the device, not its connection
        raise Misuse(str(exc)) from exc
    if isinstance(export.memory[0], CudaMemory) and not transfer.takes_events:
        raise Unavailable("this server's device cannot wait for what a GPU has still to write: copy through the arena")
    if len(export.group_block_bytes) != len(part_blocks):
        raise Misuse(f"the export's layers are in {len(export.group_block_bytes)} groups, not {len(part_blocks)}")
    lengths = tuple(map(mul, export.group_block_bytes, part_blocks))
    if lengths != (layout.part_bytes or (layout.shard_bytes,)):
        raise Misuse(
            f"the export's chunks have {sum(lengths)} bytes, the registered ones {layout.shard_bytes}, or their parts"
            " have other lengths: register and export the same tensors"
        )
    if parts.drain.stopping:
        raise Unavailable("the server is stopping")
    return export


def _store_blocks(parts: Parts, peer: Peer, message: StoreBlocks) -> Message | None:
    transfer, engine = _transfer(parts), parts.engines.of(peer)
    attachment = transfer.attachments.of(peer)
    _check_slots(parts, engine, peer, attachment, message.group)
    blocks, count = POSITIONS.unpack(message.blocks), attachment.part_blocks[message.group]
    chunks = len(message.digests) // DIGEST_BYTES
    if not chunks or len(blocks) != chunks * count:
        raise Misuse(f"{len(blocks)} blocks for {chunks} chunks: give {count} per chunk, for one chunk or more")
    _check_blocks(blocks, attachment.attached.export.num_blocks)
    _check_begin(attachment, message)
    made = parts.engines.reserve(peer, engine, attachment.writer, message)
    if not made.id:
        return Stored(message.id, 0, 0, dict(made.dropped))
    chosen = [block for slot in made.slots for block in blocks[slot.position * count : (slot.position + 1) * count]]
    offsets = [slot.offset for slot in made.slots]
    work = Work(message.id, message.group, made.id, offsets, chosen, message.event, dict(made.dropped))
    transfer.submit(attachment, work, Direction.STORE)
    return None


def _retrieve_blocks(parts: Parts, peer: Peer, message: RetrieveBlocks) -> Message | None:
    transfer, engine = _transfer(parts), parts.engines.of(peer)
    attachment = transfer.attachments.of(peer)
    namespace = _check_slots(parts, engine, peer, attachment, message.group)
    blocks, count = POSITIONS.unpack(message.blocks), attachment.part_blocks[message.group]
    rest = message.count * count - message.skip - len(blocks)
    if message.skip >= count or rest < 0 or not blocks:
        raise Misuse(f"{len(blocks)} blocks after {message.skip} do not lie within {message.count} chunks of {count}")
    _check_blocks(blocks, attachment.attached.export.num_blocks)
    _check_begin(attachment, message)
    if parts.drain.stopping:
        raise Unavailable("the server is stopping")
    reader, shard = attachment.reader, peer.hello.shard
    pin = parts.index.pin(message.lease, engine.name, namespace, reader, shard, message.start, message.count)
    every = [-1] * message.skip + list(blocks) + [-1] * rest
    transfer.submit(
        attachment, Work(message.id, message.group, pin.id, pin.offsets, every, message.event), Direction.LOAD
    )
    return None


def _withdraw(parts: Parts, peer: Peer, message: Withdraw) -> None:
    _transfer(parts).withdraw(peer, message.request)


def _let_go(parts: Parts, peer: Peer, message: LetGo) -> Message | None:
    """End the old connection of that client first: a message still under way on it must not begin a copy."""
    for other in [c for c in parts.peers if c.hello.token == message.token and c is not peer]:
        if not other.is_process(peer.peer_pid, peer.pidfd):
            raise Misuse("LetGo speaks for another process' client")
        parts.peers.dismiss(other)
    return _transfer(parts).let_go(peer, message.id, message.token)


def _transfer(parts: Parts) -> TransferWorker:
    if parts.transfer is None:
        raise Unavailable("this server has no device: its setting device.backend is none")
    return parts.transfer


def _check_slots(parts: Parts, engine: Engine, peer: Peer, attachment: Attachment, group: int) -> bytes:
    """A copy between a slot and the blocks of a part must fill both exactly. Misuse: their lengths differ.

    Returns the namespace of *group*'s parts.
    """
    namespace = engine.namespace_of_group(group)
    lengths = parts.index.shard_bytes(namespace)
    if lengths and lengths[peer.hello.shard] != attachment.part_bytes(group):
        raise Misuse(
            f"{attachment.part_blocks[group]} attached blocks of {attachment.attached.export.group_block_bytes[group]}"
            f" bytes do not fill a slot of {lengths[peer.hello.shard]} bytes: register and attach the same tensors"
        )
    return namespace


def _check_begin(attachment: Attachment, message: StoreBlocks | RetrieveBlocks) -> None:
    if message.id in attachment.works:
        raise Misuse(f"request {message.id} is under way")
    if len(message.event) not in (0, EVENT_BYTES):
        raise Misuse(f"an event has {EVENT_BYTES} bytes, not {len(message.event)}")
    if message.event and not isinstance(attachment.attached.export.memory[0], CudaMemory):
        raise Misuse("an event orders work on a GPU, and the memory that was attached is the host's")


def _check_blocks(blocks: tuple[int, ...], num_blocks: int) -> None:
    if max(blocks) >= num_blocks:
        raise Misuse(f"block {max(blocks)} is asked for: there are {num_blocks}")


HANDLERS: dict[type[Message], Callable[[Parts, Peer, Any], Message | None]] = {
    Attach: _attach,
    StoreBlocks: _store_blocks,
    RetrieveBlocks: _retrieve_blocks,
    Withdraw: _withdraw,
    LetGo: _let_go,
}
