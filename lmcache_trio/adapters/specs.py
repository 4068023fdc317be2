"""What the scheduler's side tells the workers' side to move: plain values that an engine carries between its processes.

Nothing here decides or moves anything. Every field is an int, a str, bytes or a tuple of ints, so that an engine can
send a spec through whatever it uses between its own processes.
"""

from collections.abc import Iterator, Sequence

import attrs
from attrs.validators import ge

from lmcache_trio._core.keys import DIGEST_BYTES
from lmcache_trio.errors import Misuse

__all__ = ["LoadSpec", "Place", "StoreSpec"]


@attrs.frozen
class StoreSpec:
    """Whole chunks to be stored: *digests* (packed, 32 bytes each) follow *parent* (empty: the chain's first).

    *block_ids* are the engine's blocks that hold them, chunk after chunk, each chunk's in order.
    """

    request_id: str
    session: int
    parent: bytes
    digests: bytes
    block_ids: tuple[int, ...]

    def __attrs_post_init__(self) -> None:
        if not self.digests or len(self.digests) % DIGEST_BYTES:
            raise Misuse(f"StoreSpec.digests has {len(self.digests)} bytes: give 32 bytes a chunk, one chunk or more")
        if not self.block_ids or len(self.block_ids) % self.chunks:
            raise Misuse(
                f"StoreSpec.block_ids has {len(self.block_ids)} blocks for {self.chunks} chunks: give whole chunks"
            )

    @property
    def chunks(self) -> int:
        return len(self.digests) // DIGEST_BYTES

    def parts(self, chunks: int, blocks: int) -> list["StoreSpec"]:
        """The same in pieces of at most *chunks* chunks and *blocks* blocks, or of one chunk, in a chain."""
        if self.chunks <= chunks and len(self.block_ids) <= blocks:
            return [self]
        width = len(self.block_ids) // self.chunks
        step, made, parent = min(chunks, max(1, blocks // width)), [], self.parent
        for at in range(0, self.chunks, step):
            digests = self.digests[at * DIGEST_BYTES : (at + step) * DIGEST_BYTES]
            block_ids = self.block_ids[at * width : (at + step) * width]
            made.append(attrs.evolve(self, parent=parent, digests=digests, block_ids=block_ids))
            parent = digests[-DIGEST_BYTES:]
        return made


@attrs.frozen
class LoadSpec:
    """Chunks to be loaded: *count* of them from position *start* of *lease*.

    *block_ids* are the blocks to be written, and no other block is. They stand for the chunks' blocks in order, after
    the first *skip_blocks* blocks of the first chunk (those the engine has already, and may share); they may end
    before the last chunk does. An empty *lease* means that the answer is used up: the blocks come back as failed.
    """

    request_id: str
    session: int
    lease: bytes
    start: int = attrs.field(validator=ge(0))
    count: int = attrs.field(validator=ge(1))
    skip_blocks: int = attrs.field(validator=ge(0))
    block_ids: tuple[int, ...]

    def parts(self, chunk_blocks: int, limit: int) -> list["LoadSpec"]:
        """The same in pieces of at most *limit* blocks, or of one chunk. Blocks that lie in no chunk: in the last."""
        if self.count * chunk_blocks <= limit:
            return [self]
        step, made, at, skip = max(1, limit // chunk_blocks), [], 0, self.skip_blocks
        for first in range(0, self.count, step):
            count = min(step, self.count - first)
            end = at + count * chunk_blocks - skip if first + count < self.count else len(self.block_ids)
            blocks = self.block_ids[at:end]
            made.append(attrs.evolve(self, start=self.start + first, count=count, skip_blocks=skip, block_ids=blocks))
            at, skip = end, 0
        return made

    def places(self, offsets: Sequence[int], chunk_blocks: int) -> Iterator["Place"]:
        """Where each chunk's bytes go. *offsets*: one slot a chunk. `Misuse` if the blocks do not lie within them."""
        if len(offsets) != self.count or len(self.block_ids) > self.count * chunk_blocks - self.skip_blocks:
            raise Misuse(
                f"{len(self.block_ids)} blocks do not lie within {len(offsets)} chunks of {chunk_blocks} blocks"
            )
        at, skip = 0, self.skip_blocks
        for offset in offsets:
            end = at + chunk_blocks - skip
            yield Place(offset, skip, self.block_ids[at:end])
            at, skip = end, 0


@attrs.frozen
class Place:
    """One chunk of a load: its slot, how many of its leading blocks are left out, and where the next ones go."""

    offset: int
    skip: int
    block_ids: Sequence[int]
