"""Grants, as the index hands them out: reservations, leases, pins and holds.

They carry names and places. Only the index knows whether a grant still stands.
"""

from collections.abc import Mapping, Sequence
from typing import NewType, TypeAlias

import attrs

from lmcache_trio._core.keys import ChunkKey

__all__ = ["SERVER", "Hold", "Lease", "Pin", "Reservation", "SessionKey", "Slot"]

SessionKey: TypeAlias = tuple[str, int]
"""(engine, session number): one engine request's life."""

SERVER = -1
"""The *worker* that the server's own loads are reserved, committed and aborted as."""

HoldNumber = NewType("HoldNumber", int)


@attrs.frozen
class Slot:
    """A place in the arena to write to. *position* is that of its digest in the request; in a load, its shard."""

    position: int
    offset: int


@attrs.frozen
class Reservation:
    """Slots promised to a writer. *id* is empty when there is no slot. *dropped* counts the other chunks by reason."""

    id: bytes
    slots: Sequence[Slot]
    dropped: Mapping[str, int]
    lengths: Sequence[int] = ()
    """The bytes of each shard's slot."""


@attrs.frozen
class Lease:
    """The right of *session*'s engine to read, until *expires*, what a hit of *chunks* chunks needs.

    *namespaces* has one entry per KV group.
    """

    id: bytes
    session: SessionKey
    namespaces: Sequence[bytes]
    chunks: int
    expires: float


@attrs.frozen
class Pin:
    """A read in progress: one arena offset per chunk, of one shard, whose slots have *slot_bytes*."""

    id: bytes
    offsets: Sequence[int]
    slot_bytes: int


@attrs.frozen
class Hold:
    """A READY chunk that stays in place for the server's own reading. *offsets* and *lengths* have one entry per shard.

    *parent* is the digest of the chunk before it: empty for a chain's first chunk, None if it is not known any more.
    """

    number: HoldNumber
    key: ChunkKey
    parent: bytes | None
    offsets: Sequence[int]
    lengths: Sequence[int]
