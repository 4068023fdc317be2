"""Specs: the scheduler's side says with them what the workers' side is to move. They are plain values.

Every field is an int, a str, bytes or a tuple of ints, so an engine can send a spec between its processes by any means.

A spec was planned for chunks of *chunk_tokens* and blocks of *block_tokens* tokens. A worker compares both with its own
and with its server's before it moves a byte. In a spec that was made by hand, 0 stands for the worker's own.

A spec moves the parts of its chunks in one KV group, the one with the number *group*. A part is the last *part_blocks*
blocks of its chunk in that group; 0: all of them, as with one group.
"""

import math
from collections.abc import Sequence
from operator import index
from typing import Any, TypeVar

import attrs
from attrs.validators import ge

from lmcache_trio._core.groups import EVERY, MOST_GROUPS, Group, check_groups, named_groups
from lmcache_trio._core.keys import DIGEST_BYTES
from lmcache_trio._wire.messages import MAX_NUMBER
from lmcache_trio.errors import Misuse

__all__ = ["LoadSpec", "StoreSpec", "checked_groups", "own_numbers"]


MOST = 2**32 - 1
"""The largest number of a block, and of anything that is counted in blocks, tokens or shards."""


def check_whole(name: str, value: object, least: int = 0) -> None:
    """`Misuse`, which names it, unless *value* is a whole number that can be sent."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
        raise Misuse(f"{name} is {value!r:.80}: it must be a whole number from {least} to {MOST}")


def check_seconds(name: str, value: object) -> None:
    """`Misuse`, which names it, unless *value* is a positive number of seconds."""
    if not isinstance(value, int | float) or not 0 < value < math.inf:  # NaN is neither
        raise Misuse(f"{name} is {value!r:.80}: it must be a positive number of seconds")


def own_numbers(name: str, numbers: Any) -> Any:
    """The sequence *numbers* as ints, which stay as they are when the engine uses its tensor or array again.

    A list or a tuple of ints comes back as it is; its first item decides that. `Misuse`: an item is not a number.
    """
    try:
        plain = numbers.tolist() if hasattr(numbers, "tolist") else numbers
        return plain if not len(plain) or type(plain[0]) is int else [index(number) for number in plain]
    except (TypeError, ValueError) as exc:
        raise Misuse(f"{name} must be whole numbers in a row: {exc}") from exc


def checked_groups(groups: Any, block_tokens: int) -> tuple[Group, ...]:
    """*groups* as a server is told of them: empty for one of which a hit needs all. `Misuse` names a wrong one."""
    if not isinstance(groups, Sequence) or not all(isinstance(group, Group) for group in groups):
        raise Misuse(f"groups is {groups!r:.200}: give a tuple of Group, or leave it out for one group")
    if groups:
        check_groups(groups, block_tokens, 0)
    if named_groups(groups) != (EVERY,):
        return tuple(groups)
    if groups and groups[0].block_tokens != block_tokens:
        found = groups[0].block_tokens
        raise Misuse(f"the only group has blocks of {found} tokens, and block_tokens is {block_tokens}: give the same")
    return ()


def _block_ids(block_ids: Any) -> tuple[int, ...]:
    return tuple(own_numbers("block_ids", block_ids))


def _check_spec(spec: "StoreSpec | LoadSpec") -> None:
    kind = type(spec).__name__
    if not isinstance(spec.request_id, str):
        raise Misuse(f"{kind}.request_id is {spec.request_id!r:.80}: it must be a str")
    if not isinstance(spec.session, int) or not 0 <= spec.session <= MAX_NUMBER:
        raise Misuse(f"{kind}.session is {spec.session!r:.80}: it must be a number that session_spec gave")
    check_whole(f"{kind}.part_blocks", spec.part_blocks)
    if not isinstance(spec.group, int) or not 0 <= spec.group < MOST_GROUPS:
        raise Misuse(f"{kind}.group is {spec.group!r:.80}: groups count from 0, and there are {MOST_GROUPS} at most")
    try:
        wrong = [block for block in spec.block_ids if not 0 <= block <= MOST]
    except TypeError as exc:
        raise Misuse(f"{kind}.block_ids must be whole numbers: {exc}") from exc
    if wrong:
        raise Misuse(f"{kind}.block_ids has {wrong[0]}: a block's number is from 0 to {MOST}")


_S = TypeVar("_S", "StoreSpec", "LoadSpec")


@attrs.frozen
class StoreSpec:
    """Whole chunks to store: *digests* (packed, 32 bytes each) follow *parent* (empty: the chain's first).

    *block_ids* are the engine's blocks that hold their parts, chunk after chunk, each part's in order.
    """

    request_id: str
    session: int
    parent: bytes
    digests: bytes
    block_ids: tuple[int, ...] = attrs.field(converter=_block_ids)
    chunk_tokens: int = attrs.field(default=0, validator=ge(0))
    block_tokens: int = attrs.field(default=0, validator=ge(0))
    group: int = 0
    part_blocks: int = 0

    def __attrs_post_init__(self) -> None:
        _check_spec(self)
        if not isinstance(self.parent, bytes) or len(self.parent) not in (0, DIGEST_BYTES):
            raise Misuse(f"StoreSpec.parent is {self.parent!r:.80}: it must be a digest of 32 bytes, or empty")
        if not isinstance(self.digests, bytes):
            raise Misuse(f"StoreSpec.digests is {self.digests!r:.80}: give 32 bytes a chunk")
        if not self.digests or len(self.digests) % DIGEST_BYTES:
            raise Misuse(f"StoreSpec.digests has {len(self.digests)} bytes: give 32 bytes a chunk, one chunk or more")
        if not self.block_ids or len(self.block_ids) % self.chunks:
            raise Misuse(
                f"StoreSpec.block_ids has {len(self.block_ids)} blocks for {self.chunks} chunks: give whole chunks"
            )
        if self.part_blocks and self.chunk_blocks != self.part_blocks:
            raise Misuse(
                f"StoreSpec.block_ids has {self.chunk_blocks} blocks a chunk, and a part in group {self.group} has"
                f" {self.part_blocks}: give those that hold the part"
            )
        whole = self.chunk_tokens and self.block_tokens and not self.part_blocks
        if whole and self.chunk_blocks * self.block_tokens != self.chunk_tokens:
            raise Misuse(
                f"StoreSpec.block_ids has {self.chunk_blocks} blocks of {self.block_tokens} tokens a chunk, and a chunk"
                f" has {self.chunk_tokens} tokens: give {self.chunk_tokens / self.block_tokens:g} blocks a chunk"
            )

    @property
    def chunks(self) -> int:
        return len(self.digests) // DIGEST_BYTES

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunk's part."""
        return len(self.block_ids) // self.chunks

    def planned_for(self, chunk_tokens: int, block_tokens: int, groups: Sequence[Group]) -> "StoreSpec":
        """The same, with the worker's values in place of 0. `Misuse`: its blocks are not like the worker's.

        *groups* are the worker's, if it names any.
        """
        return _planned_for(self, chunk_tokens, block_tokens, groups)

    def parts(self, chunks: int, blocks: int) -> list["StoreSpec"]:
        """The same in pieces of at most *chunks* chunks and *blocks* blocks, or of one chunk, in a chain."""
        if self.chunks <= chunks and len(self.block_ids) <= blocks:
            return [self]
        width = self.chunk_blocks
        step, made, parent = min(chunks, max(1, blocks // width)), [], self.parent
        for at in range(0, self.chunks, step):
            digests = self.digests[at * DIGEST_BYTES : (at + step) * DIGEST_BYTES]
            block_ids = self.block_ids[at * width : (at + step) * width]
            made.append(attrs.evolve(self, parent=parent, digests=digests, block_ids=block_ids))
            parent = digests[-DIGEST_BYTES:]
        return made


@attrs.frozen
class LoadSpec:
    """Chunks to load: *count* of them from chunk *start* of *lease* on.

    Only the blocks *block_ids* are written. They stand for the blocks of the chunks' parts in order, after the first
    *skip_blocks* blocks of the first part, which the engine has already and may share. They may end before the last
    part does. An empty *lease* means that the answer is used up: the blocks come back as failed.
    """

    request_id: str
    session: int
    lease: bytes
    start: int
    count: int
    skip_blocks: int
    block_ids: tuple[int, ...] = attrs.field(converter=_block_ids)
    chunk_tokens: int = attrs.field(default=0, validator=ge(0))
    block_tokens: int = attrs.field(default=0, validator=ge(0))
    group: int = 0
    part_blocks: int = 0

    def __attrs_post_init__(self) -> None:
        _check_spec(self)
        for name in ("start", "count", "skip_blocks"):
            check_whole(f"LoadSpec.{name}", getattr(self, name), int(name == "count"))
        if not isinstance(self.lease, bytes) or len(self.lease) > 32:
            raise Misuse(f"LoadSpec.lease is {self.lease!r:.80}: it must be bytes that the server gave, or empty")

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunk's part; 0 while that is not known."""
        return self.part_blocks or (self.chunk_tokens // self.block_tokens if self.block_tokens else 0)

    def planned_for(self, chunk_tokens: int, block_tokens: int, groups: Sequence[Group]) -> "LoadSpec":
        """The same, with the worker's values in place of 0. `Misuse`: its blocks are not like the worker's.

        *groups* are the worker's, if it names any.
        """
        return _planned_for(self, chunk_tokens, block_tokens, groups)

    def parts(self, limit: int) -> list["LoadSpec"]:
        """The same in pieces of at most *limit* blocks, or of one chunk. Blocks that lie in no chunk: in the last."""
        chunk_blocks = self.chunk_blocks
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


def _planned_for(spec: _S, chunk_tokens: int, block_tokens: int, groups: Sequence[Group]) -> _S:
    kind = type(spec).__name__
    if spec.block_tokens not in (0, block_tokens):
        raise Misuse(
            f"{kind} of {spec.request_id!r} was planned for blocks of {spec.block_tokens} tokens, and this worker's"
            f" have {block_tokens}: give the scheduler's side and its workers the same block_tokens"
        )
    if spec.group >= max(1, len(groups)):
        raise Misuse(
            f"{kind} of {spec.request_id!r} is for group {spec.group}, and this worker has {max(1, len(groups))}: give"
            " the scheduler's side and its workers the same groups"
        )
    chunk_tokens = spec.chunk_tokens or chunk_tokens
    width = groups[spec.group].part_blocks(chunk_tokens) if groups and chunk_tokens else 0
    if spec.part_blocks not in (0, width):
        raise Misuse(
            f"{kind} of {spec.request_id!r} was planned for parts of {spec.part_blocks} blocks, and this worker's have"
            f" {width or 'all of a chunk'} in group {spec.group}: give the scheduler's side and its workers the same"
            " groups"
        )
    return attrs.evolve(spec, chunk_tokens=chunk_tokens, block_tokens=block_tokens, part_blocks=width)
