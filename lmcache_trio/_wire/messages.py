"""Every message of the protocol, one frozen class each.

`codec` turns messages into frames and back, and `protocol` says which may follow which. A *request* carries an `id` of
the client's choice, and gets exactly one *reply* with that `id`. A *notice* has no id and gets no reply. A *push* comes
from the server unasked. Lengths are bounded here, so that nothing oversize survives decoding. Opcodes below 16 are the
rendezvous', below 40 requests, below 64 notices. Only a server sends those above.

Digests travel packed, 32 bytes each. Offsets and positions travel as `codec.OFFSETS` and `codec.POSITIONS`: a list of
integers costs twenty times as much to encode.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Annotated, Any, ClassVar

import attrs
import msgspec
from attrs.validators import and_, ge, le, max_len

from lmcache_trio._core.groups import MOST_GROUPS, Group

__all__ = [
    "MAX_DIGESTS",
    "MAX_LAYOUTS",
    "MAX_NUMBER",
    "MAX_RESERVED",
    "MAX_SHARDS",
    "PROTOCOL_VERSION",
    "Abort",
    "Ack",
    "Answer",
    "AnswerState",
    "ArenaGrown",
    "Attach",
    "Changed",
    "Clear",
    "Cleared",
    "Commit",
    "Committed",
    "CopiesEnded",
    "Done",
    "Ended",
    "ErrorKind",
    "ErrorReply",
    "Explain",
    "Explained",
    "Finished",
    "Hello",
    "Identify",
    "Inventory",
    "InventoryReply",
    "LetGo",
    "LogLevel",
    "Lookup",
    "LookupStatus",
    "Message",
    "NamespaceKnown",
    "Ping",
    "Pinned",
    "Pong",
    "Refused",
    "Register",
    "Release",
    "Reserve",
    "Reserved",
    "Reset",
    "Retrieve",
    "RetrieveBlocks",
    "Retrieved",
    "Role",
    "Statistics",
    "StatisticsReply",
    "StoreBlocks",
    "Stored",
    "Taken",
    "Watch",
    "Welcome",
    "Withdraw",
]

PROTOCOL_VERSION = 8
MAX_DIGESTS = 65_536
"""Most chunks that one message may name: 16 M tokens in 256-token chunks, 2 MiB of digests."""

MAX_RESERVED = 256
"""Most chunks that one message may ask slots for: some 2 ms in which the server's loop answers no other client."""

MAX_SHARDS = 4096
"""Most shards of one engine. The server keeps a set of those that are missing."""

MAX_LAYOUTS = 16
"""Most layouts that one Reset may name. An engine has one, and more only if its KV is laid out anew while it runs."""

MOST_TIERS = 16
"""Tiers whose chunks watchers are told of: the nearest ones."""

MAX_NUMBER = 2**63 - 1
"""The largest request id and session number: that of a signed 64-bit integer."""

Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
"""The number of a session, or of the request that is answered (0: none). Decoding checks the bounds, in C."""

RequestId = Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBER)]
"""The id of a request. It is not 0: its reply would be a push, and an ErrorReply a last word."""

_Validator = Callable[[Any, "attrs.Attribute[Any]", Any], Any]


def _packed(width: int, most: int = MAX_DIGESTS) -> _Validator:
    def whole(instance: Any, attribute: "attrs.Attribute[Any]", value: bytes) -> None:
        if len(value) % width:
            raise ValueError(f"{attribute.name}: {len(value)} bytes are not a whole number of {width}-byte items")

    return and_(max_len(width * most), whole)


_DIGESTS = _packed(32)
_RESERVED = _packed(32, MAX_RESERVED)
_LAYOUT = _packed(32, 1)
_LAYOUTS = _packed(32, MAX_LAYOUTS)
_OFFSETS = _packed(8)
_POSITIONS = _packed(4)
_TOKENS: _Validator = and_(ge(0), le(1 << 16))
_GROUP: _Validator = and_(ge(0), le(MOST_GROUPS - 1))
_GROUPS: _Validator = max_len(MOST_GROUPS)
_NAME: _Validator = max_len(512)
_ID: _Validator = max_len(32)


class Role(IntEnum):
    """What a client is to its engine. An observer has no engine. `protocol.FROM_CLIENT`: the messages of each role."""

    OBSERVER = 0
    SCHEDULER = 1
    WORKER = 2


class AnswerState(IntEnum):
    """What the server knows of a lookup. UNKNOWN: it was never asked, or its session ended. A pending one never is."""

    PENDING = 0
    ANSWERED = 1
    UNKNOWN = 2


class ErrorKind(IntEnum):
    """Which branch of `lmcache_trio.errors` an ErrorReply raises at the client."""

    UNAVAILABLE = 0
    GONE = 1
    MISUSE = 2
    PROTOCOL = 3


class Message:
    """Base of all messages. `opcode` is the first byte on the wire, and is never given to another message."""

    opcode: ClassVar[int]


# --- rendezvous: one request and one reply on the well-known address ------------------------------------------------


@attrs.frozen
class Hello(Message):
    """The client that asks to be let in. *token* is 16 random bytes, one a client object, the same after a reconnect.

    *identity* is a scheduler's: the digest of its model and weights. It is part of its engine's namespace.
    *block_tokens*: a chunk is a whole number of so many, those of the engine's blocks. *chunk_tokens*: those that
    its chunks must have. 0: not said. *groups*: what its layers keep; empty: one group, of which a hit needs all.
    Each shard has *replicas* workers, which hold the same bytes; a worker is the *replica*-th of them, from 0.
    *token_bytes*: what one worker keeps per token, by which the server chooses a length that is not said.
    *model* is a scheduler's: the name of its model, for people alone.
    """

    opcode: ClassVar[int] = 1
    version: int
    client: str = attrs.field(validator=_NAME)
    token: bytes = attrs.field(validator=_ID)
    role: Role
    engine: str = attrs.field(default="", validator=_NAME)
    shard: int = attrs.field(default=0, validator=ge(0))
    shards: int = attrs.field(default=1, validator=and_(ge(1), le(MAX_SHARDS)))
    identity: bytes = attrs.field(default=b"", validator=_ID)
    block_tokens: int = attrs.field(default=0, validator=_TOKENS)
    chunk_tokens: int = attrs.field(default=0, validator=_TOKENS)
    groups: tuple[Group, ...] = attrs.field(default=(), validator=_GROUPS)
    replica: int = attrs.field(default=0, validator=ge(0))
    replicas: int = attrs.field(default=1, validator=and_(ge(1), le(MAX_SHARDS)))
    token_bytes: int = attrs.field(default=0, validator=ge(0))
    model: str = attrs.field(default="", validator=_NAME)

    @property
    def rank(self) -> int:
        """A worker's number among all workers of its engine."""
        return self.shard * self.replicas + self.replica


@attrs.frozen
class Welcome(Message):
    """Where this client's own socket is, and the arena. Withdrawn when not taken up within 5 s.

    *chunk_tokens* are those of its engine's chunks; an observer is told what an engine that says nothing would get.
    A worker's brings the descriptor of the arena along, a sealed anonymous file of *arena_size* bytes, of which *taken*
    are backed by memory so far. Without one *arena_size* is 0, and *arena_note* says why.
    """

    opcode: ClassVar[int] = 2
    version: int
    address: str = attrs.field(validator=_NAME)
    boot: bytes = attrs.field(validator=_ID)
    chunk_tokens: int = attrs.field(validator=ge(1))
    arena_size: int = attrs.field(default=0, validator=ge(0))
    taken: int = attrs.field(default=0, validator=ge(0))
    arena_note: str = attrs.field(default="", validator=_NAME)


@attrs.frozen
class Refused(Message):
    """The rendezvous' only other answer: why not, and what to do."""

    opcode: ClassVar[int] = 3
    kind: ErrorKind
    reason: str = attrs.field(validator=max_len(4096))


# --- requests, on the client's own connection -----------------------------------------------------------------------


@attrs.frozen
class Ping(Message):
    opcode: ClassVar[int] = 16
    id: RequestId


@attrs.frozen
class Statistics(Message):
    opcode: ClassVar[int] = 17
    id: RequestId


@attrs.frozen
class Register(Message):
    """A worker's layout: *fingerprint* of its bytes, *shard_bytes* of one chunk, *block_tokens* of the engine.

    *part_bytes* are those of a chunk's part, by group, and `shard_bytes` in all; empty if there is one group.

    Answered by NamespaceKnown; its namespace is empty while other shards of the engine are still missing. *attaching*:
    the worker copies nothing by itself, so that its layout counts only from an Attach on that succeeds.
    """

    opcode: ClassVar[int] = 18
    id: RequestId
    fingerprint: bytes = attrs.field(validator=max_len(32))
    shard_bytes: int = attrs.field(validator=ge(1))
    block_tokens: int = attrs.field(validator=ge(1))
    attaching: bool = False
    part_bytes: tuple[Annotated[int, msgspec.Meta(ge=1)], ...] = attrs.field(default=(), validator=_GROUPS)


@attrs.frozen
class Lookup(Message):
    """How many leading chunks are there? Opens the session if it is new; answered by Answer.

    The session's known chain is cut to *start* chunks, then extended by *digests*; the first *upto* of it are looked
    up (0 opens the session only). A digest is sent once: asking again sends start = what the server has, no digests.
    A lookup replaces the session's former one and releases its lease. *budget_ms*: how long tiers may take,
    at most the server's own setting (-1: that). *name* is the engine's own for a new session, for people alone.
    """

    opcode: ClassVar[int] = 19
    id: RequestId
    session: Number
    start: int = attrs.field(validator=ge(0))
    digests: bytes = attrs.field(validator=_DIGESTS)
    upto: int = attrs.field(validator=ge(0))
    budget_ms: int = attrs.field(default=-1, validator=ge(-1))
    name: Annotated[str, msgspec.Meta(max_length=512)] = ""


@attrs.frozen
class LookupStatus(Message):
    """What became of the session's lookup? Idempotent; answered by Answer."""

    opcode: ClassVar[int] = 20
    id: RequestId
    session: Number


@attrs.frozen
class Retrieve(Message):
    """A worker asks to read the parts in *group* of *count* chunks, from chunk *start* on; answered by Pinned.

    A lease has, of each group, the parts that a hit of its length needs.
    """

    opcode: ClassVar[int] = 21
    id: RequestId
    lease: bytes = attrs.field(validator=_ID)
    start: int = attrs.field(validator=ge(0))
    count: int = attrs.field(validator=ge(1))
    group: int = attrs.field(default=0, validator=_GROUP)


@attrs.frozen
class Done(Message):
    """A worker's read has ended; answered by Finished, which says whether what it read is still valid."""

    opcode: ClassVar[int] = 22
    id: RequestId
    pin: bytes = attrs.field(validator=_ID)


@attrs.frozen
class Reserve(Message):
    """A worker asks for slots for its shard of the parts in *group* of *digests*, which follow *parent*.

    An empty *parent*: the chain's first. Of a group whose parts are no chain, *parent* says nothing.

    They are `MAX_RESERVED` at most; more of a chain are asked for behind them, with the last of these as parent.
    *session* is the scheduler's number of the request. A session that the server does not know, or has forgotten
    since it ended, gets no slots. A number is never used again: a late store of the former session would be taken for
    one of the new session.
    """

    opcode: ClassVar[int] = 23
    id: RequestId
    session: Number
    parent: bytes = attrs.field(validator=_ID)
    digests: bytes = attrs.field(validator=_RESERVED)
    group: int = attrs.field(default=0, validator=_GROUP)


@attrs.frozen
class Commit(Message):
    """All bytes of the reservation were written and the copy has ended; answered by Committed."""

    opcode: ClassVar[int] = 24
    id: RequestId
    reservation: bytes = attrs.field(validator=_ID)


@attrs.frozen
class Abort(Message):
    """The copy into the reservation has ended and is to be forgotten; answered by Ack."""

    opcode: ClassVar[int] = 25
    id: RequestId
    reservation: bytes = attrs.field(validator=_ID)


@attrs.frozen
class CopiesEnded(Message):
    """After a reconnect: the copies that the old connection had in flight have ended; answered by Ack.

    *token* is the client's own, the one of its Hello.
    """

    opcode: ClassVar[int] = 26
    id: RequestId
    token: bytes = attrs.field(validator=_ID)


@attrs.frozen
class Reset(Message):
    """Drop the chunks of *layouts*, and of its engine's present layout, under *identity*; answered by Ack.

    From then on nothing of them is served to any engine, nor stored that a session of before it names. *layouts* are
    those that NamespaceKnown named, packed: the engine may have had another one than it has now when the host asked,
    without a server. While the present layout is not known the reset is due for it, and is carried out before the
    engine has a namespace. Without *layouts* it is carried out in each layout that the engine comes to, once.
    """

    opcode: ClassVar[int] = 27
    id: RequestId
    identity: bytes = attrs.field(default=b"", validator=_ID)
    layouts: bytes = attrs.field(default=b"", validator=_LAYOUTS)


@attrs.frozen
class Identify(Message):
    """The scheduler's model has the *identity* from now on: its engine moves to another namespace; answered by Ack.

    Answers that were given before are used up, and what a session of before names is not stored.
    """

    opcode: ClassVar[int] = 32
    id: RequestId
    identity: bytes = attrs.field(validator=_ID)


# --- requests of an observer ------------------------------------------------------------------------------------------


@attrs.frozen
class Inventory(Message):
    """Which engines are there, and what does memory hold of which layout? Answered by InventoryReply."""

    opcode: ClassVar[int] = 33
    id: RequestId


@attrs.frozen
class Clear(Message):
    """Evict the chunks that nobody uses, and delete them from all tiers; answered by Cleared.

    Of which layouts: those whose name in hexadecimal begins with *namespace*, and whose model is *model*. Empty: any.
    It is a misuse by a client whose uid is neither the server's nor root's.
    """

    opcode: ClassVar[int] = 34
    id: RequestId
    namespace: str = attrs.field(default="", validator=max_len(64))
    model: str = attrs.field(default="", validator=_NAME)


@attrs.frozen
class LogLevel(Message):
    """The server's log has this *level* from now on: debug, info, warning or error. Answered by Ack.

    It is a misuse by a client whose uid is neither the server's nor root's.
    """

    opcode: ClassVar[int] = 35
    id: RequestId
    level: str = attrs.field(validator=max_len(16))


@attrs.frozen
class Explain(Message):
    """Why did the lookups of the request *name* miss, and when? Empty: the latest of any. Answered by Explained."""

    opcode: ClassVar[int] = 36
    id: RequestId
    name: str = attrs.field(default="", validator=_NAME)


# --- requests of a worker whose KV the server moves itself ------------------------------------------------------------


@attrs.frozen
class Attach(Message):
    """A worker exports its KV: *export* is what `_wire.handles` encodes. Follows a Register of the same layout.

    Answered by Ack once the device has opened it; by an error when it can't, and the worker copies for itself then. A
    new Register or Attach ends the former one.
    """

    opcode: ClassVar[int] = 28
    id: RequestId
    export: bytes = attrs.field(validator=max_len(1 << 20))


@attrs.frozen
class StoreBlocks(Message):
    """Reserve, copy, commit: *digests* as in Reserve, and the blocks that hold them, whole chunks in order.

    *blocks* are packed as positions. *event* is empty, or names what the copy must wait for: the pass that writes the
    blocks. Answered by Stored when the copy has ended, or will not begin: the blocks are the engine's own again.
    """

    opcode: ClassVar[int] = 29
    id: RequestId
    session: Number
    parent: bytes = attrs.field(validator=_ID)
    digests: bytes = attrs.field(validator=_RESERVED)
    blocks: bytes = attrs.field(validator=_POSITIONS)
    event: bytes = attrs.field(default=b"", validator=max_len(64))
    group: int = attrs.field(default=0, validator=_GROUP)


@attrs.frozen
class RetrieveBlocks(Message):
    """Pin, copy, done: *count* chunks from position *start* of a lease go into *blocks*, and into no other block.

    *skip*: the leading blocks of the first chunk that are not to be written. *event* is empty, or names what the copy
    must wait for: what still uses the blocks. Answered by Retrieved when the copy has ended, or will not begin.
    """

    opcode: ClassVar[int] = 30
    id: RequestId
    lease: bytes = attrs.field(validator=_ID)
    start: int = attrs.field(validator=ge(0))
    count: int = attrs.field(validator=ge(1))
    skip: int = attrs.field(validator=ge(0))
    blocks: bytes = attrs.field(validator=_POSITIONS)
    event: bytes = attrs.field(default=b"", validator=max_len(64))
    group: int = attrs.field(default=0, validator=_GROUP)


@attrs.frozen
class LetGo(Message):
    """Has every copy ended that the server began for the client with *token*? Acknowledged when it has.

    Asked over another connection, after that client's own was lost: its blocks are its own again with the answer.
    """

    opcode: ClassVar[int] = 31
    id: RequestId
    token: bytes = attrs.field(validator=_ID)


# --- notices, from the client ---------------------------------------------------------------------------------------


@attrs.frozen
class Taken(Message):
    """The engine allocated blocks for this lease: it no longer counts against lease_share."""

    opcode: ClassVar[int] = 40
    session: Number
    lease: bytes = attrs.field(validator=_ID)


@attrs.frozen
class Release(Message):
    """The session's lookup is not wanted any more: pending it is cancelled, answered its lease ends."""

    opcode: ClassVar[int] = 41
    session: Number


@attrs.frozen
class Ended(Message):
    """The session goes, with everything it owned."""

    opcode: ClassVar[int] = 42
    session: Number


@attrs.frozen
class Withdraw(Message):
    """The StoreBlocks or RetrieveBlocks with the id *request* is not wanted any more.

    It is answered nevertheless, by a failure, as soon as no copy of it runs: what has begun ends by itself.
    """

    opcode: ClassVar[int] = 43
    request: RequestId


@attrs.frozen
class Watch(Message):
    """From now on the scheduler is told by Changed what comes into memory and to tiers, and what leaves them.

    A tier that cannot say what it evicts is not told of.
    """

    opcode: ClassVar[int] = 44


# --- replies and pushes, from the server ----------------------------------------------------------------------------


@attrs.frozen
class Pong(Message):
    opcode: ClassVar[int] = 64
    id: Number
    boot: bytes = attrs.field(validator=_ID)


@attrs.frozen
class StatisticsReply(Message):
    """*json* is one object with the keys `server`, `faults`, `held`, `counted` and `tiers`."""

    opcode: ClassVar[int] = 65
    id: Number
    json: bytes = attrs.field(validator=max_len(1 << 20))


@attrs.frozen
class NamespaceKnown(Message):
    """Reply to Register; also pushed with id 0 to the engine's clients when the namespace becomes known or changes.

    *chunk_bytes* is what one of its chunks takes in the arena, over all shards; 0 while there is no namespace.
    *arena_bytes* is what the arena holds: less than a chunk takes, and nothing can be cached. *layout* names what the
    engine's workers have registered, whatever its identity is; b"" while there is no namespace. A Reset names it.
    """

    opcode: ClassVar[int] = 66
    id: Number
    namespace: bytes = attrs.field(validator=_ID)
    chunk_bytes: int = attrs.field(default=0, validator=ge(0))
    arena_bytes: int = attrs.field(default=0, validator=ge(0))
    layout: bytes = attrs.field(default=b"", validator=_LAYOUT)


@attrs.frozen
class Answer(Message):
    """A lookup's state. Reply to Lookup and LookupStatus; pushed with id 0 when a pending lookup became known.

    *asked* is the `id` of the Lookup that this speaks of. *chunks* leading chunks may be read under *lease* for
    *ttl_ms*. Of *loaded* of them a tier has brought parts for this lookup.
    """

    opcode: ClassVar[int] = 67
    id: Number
    session: Number
    asked: Number
    state: AnswerState
    chunks: int = attrs.field(default=0, validator=ge(0))
    lease: bytes = attrs.field(default=b"", validator=_ID)
    ttl_ms: int = attrs.field(default=0, validator=ge(0))
    loaded: int = attrs.field(default=0, validator=ge(0))


@attrs.frozen
class Pinned(Message):
    """Where the chunks are: one byte offset into the arena a chunk, for this worker's shard. Read, then say Done.

    Each slot has *slot_bytes* bytes.
    """

    opcode: ClassVar[int] = 68
    id: Number
    pin: bytes = attrs.field(validator=_ID)
    offsets: bytes = attrs.field(validator=_OFFSETS)
    slot_bytes: int = attrs.field(default=0, validator=ge(0))


@attrs.frozen
class Finished(Message):
    opcode: ClassVar[int] = 69
    id: Number
    valid: bool


@attrs.frozen
class Reserved(Message):
    """Slots for some of the asked chunks: `positions[i]` in the request's digests may be written at `offsets[i]`.

    Each slot has *slot_bytes* bytes. *reservation* is empty when there are none. The rest was dropped, counted by
    reason in *dropped*.
    """

    opcode: ClassVar[int] = 70
    id: Number
    reservation: bytes = attrs.field(validator=_ID)
    positions: bytes = attrs.field(validator=_POSITIONS)
    offsets: bytes = attrs.field(validator=_OFFSETS)
    dropped: dict[str, int] = attrs.field(factory=dict, validator=max_len(64))
    slot_bytes: int = attrs.field(default=0, validator=ge(0))


@attrs.frozen
class Committed(Message):
    """*published* chunks of the reservation became part of the cache with this shard; *kept* are those and what still
    lacks other shards. Both are 0 after a refusal.
    """

    opcode: ClassVar[int] = 71
    id: Number
    published: int = attrs.field(validator=ge(0))
    kept: int = attrs.field(default=0, validator=ge(0))


@attrs.frozen
class Ack(Message):
    opcode: ClassVar[int] = 72
    id: Number


@attrs.frozen
class ErrorReply(Message):
    """The request failed; id 0 when the request's id could not be read (the connection ends after it)."""

    opcode: ClassVar[int] = 73
    id: Number
    kind: ErrorKind
    message: str = attrs.field(validator=max_len(4096))


@attrs.frozen
class ArenaGrown(Message):
    """Push: the arena's first *taken* bytes are backed by memory now; a client may fault its mapping in up to there."""

    opcode: ClassVar[int] = 74
    taken: int = attrs.field(validator=ge(0))


@attrs.frozen
class Stored(Message):
    """The copy has ended: *copied* chunks were written and committed, *published* of them are in the cache now.

    The rest was dropped, counted by reason in *dropped*: "failed", its copy; "aborted", its reservation meanwhile. A
    chunk that was committed and not published lacks other shards.
    """

    opcode: ClassVar[int] = 75
    id: Number
    copied: int = attrs.field(validator=ge(0))
    published: int = attrs.field(validator=ge(0))
    dropped: dict[str, int] = attrs.field(factory=dict, validator=max_len(64))


@attrs.frozen
class Retrieved(Message):
    """The copy has ended. Unless it is *valid*, the blocks hold anything."""

    opcode: ClassVar[int] = 76
    id: Number
    valid: bool


@attrs.frozen
class Changed(Message):
    """Push: parts of the engine's *group* that *came* to a place, and parts that *left* it, by their digests.

    The place is memory if *tier* is 0, else the tier of that number, the nearest being 1. *cleared* comes before the
    two: nothing that was told earlier of the tier holds any more, in any group; or of memory and all tiers, if *tier*
    is 0. So does a change of the namespace, which NamespaceKnown tells.
    """

    opcode: ClassVar[int] = 77
    group: int = attrs.field(validator=_GROUP)
    came: bytes = attrs.field(validator=_DIGESTS)
    left: bytes = attrs.field(validator=_DIGESTS)
    cleared: bool = False
    tier: int = attrs.field(default=0, validator=and_(ge(0), le(MOST_TIERS)))


@attrs.frozen
class InventoryReply(Message):
    """*json* is one object with the lists `engines` and `layouts`, and in `left_out` how many of each had no room."""

    opcode: ClassVar[int] = 78
    id: Number
    json: bytes = attrs.field(validator=max_len(1 << 20))


@attrs.frozen
class Cleared(Message):
    """*chunks* of *layouts* are gone from memory, and the tiers have deleted those layouts. *used* chunks stayed."""

    opcode: ClassVar[int] = 79
    id: Number
    layouts: int = attrs.field(validator=ge(0))
    chunks: int = attrs.field(validator=ge(0))
    bytes: int = attrs.field(validator=ge(0))
    used: int = attrs.field(validator=ge(0))


@attrs.frozen
class Explained(Message):
    """*json* is one object with the list `requests`: the lookups that missed, the latest first."""

    opcode: ClassVar[int] = 80
    id: Number
    json: bytes = attrs.field(validator=max_len(1 << 20))
