"""Which message may follow which, for both ends: tables and checks. It remembers nothing and does no I/O.

    Hello --in order--> Welcome | Refused                        at the rendezvous, `check_hello` and `check_welcome`
    request --id--> due --reply of its kind or ErrorReply, same id--> answered      once, in any order
    notice   client to server, no reply         push   server to client, id 0 where it has one

`_transport.conversation` is a client's end, and knows which replies are due. A message that is neither due nor a push
is the server's fault. `_server.connection` is the server's end, which keeps no list of ids: it answers each request
that the client's role may make. Beyond its decoding a message costs either end a look-up or two.
"""

from collections.abc import Mapping

from lmcache_trio._wire import messages as m
from lmcache_trio._wire.codec import decode_expected
from lmcache_trio._wire.messages import MAX_SHARDS, PROTOCOL_VERSION, ErrorKind, Hello, Message, Refused, Role, Welcome
from lmcache_trio.errors import Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

__all__ = [
    "ERRORS",
    "FROM_CLIENT",
    "PUSHES",
    "REPLIES",
    "TAKE_UP",
    "check_hello",
    "check_welcome",
    "error_of",
    "kind_of",
    "speakers",
]

TAKE_UP = 5.0
"""Seconds after a Welcome in which the client must take up the address that it names. Both ends wait so long."""

REPLIES: Mapping[type[Message], type[Message]] = {
    m.Ping: m.Pong,
    m.Statistics: m.StatisticsReply,
    m.Register: m.NamespaceKnown,
    m.Lookup: m.Answer,
    m.LookupStatus: m.Answer,
    m.Retrieve: m.Pinned,
    m.Done: m.Finished,
    m.Reserve: m.Reserved,
    m.Commit: m.Committed,
    m.Abort: m.Ack,
    m.CopiesEnded: m.Ack,
    m.Reset: m.Ack,
    m.Identify: m.Ack,
    m.Attach: m.Ack,
    m.StoreBlocks: m.Stored,
    m.RetrieveBlocks: m.Retrieved,
    m.LetGo: m.Ack,
    m.Inventory: m.InventoryReply,
    m.Clear: m.Cleared,
    m.LogLevel: m.Ack,
    m.Explain: m.Explained,
}
"""Each request, and the one kind of reply that answers it. An ErrorReply answers any request."""

PUSHES = frozenset({m.NamespaceKnown, m.Answer, m.ArenaGrown, m.Changed, m.ErrorReply})
"""The messages that the server sends unasked, with id 0. Such an ErrorReply is its last word on the connection."""

_ANYONE = frozenset({m.Ping, m.Statistics, m.CopiesEnded})
FROM_CLIENT: Mapping[Role, frozenset[type[Message]]] = {
    Role.OBSERVER: _ANYONE | {m.LetGo, m.Inventory, m.Clear, m.LogLevel, m.Explain},
    Role.SCHEDULER: _ANYONE | {m.Lookup, m.LookupStatus, m.Reset, m.Identify, m.Taken, m.Release, m.Ended, m.Watch},
    Role.WORKER: _ANYONE
    | {m.Register, m.Retrieve, m.Done, m.Reserve, m.Commit, m.Abort}
    | {m.Attach, m.StoreBlocks, m.RetrieveBlocks, m.Withdraw},
}
"""The messages that a client of each role may send on its own connection. CopiesEnded names its client by the token."""

ERRORS: Mapping[ErrorKind, type[LMCacheTrioError]] = {
    ErrorKind.UNAVAILABLE: Unavailable,
    ErrorKind.GONE: Gone,
    ErrorKind.MISUSE: Misuse,
    ErrorKind.PROTOCOL: ProtocolError,
}
"""The branch of `errors` that each kind of an ErrorReply, or of a Refused, stands for."""


def error_of(kind: ErrorKind, message: str) -> LMCacheTrioError:
    """The error that the other end sent."""
    return ERRORS[kind](message)


def kind_of(error: LMCacheTrioError) -> ErrorKind:
    """The kind that stands for *error*: that of its branch."""
    return next((kind for kind, cls in ERRORS.items() if isinstance(error, cls)), ErrorKind.UNAVAILABLE)


def speakers(kind: type[Message]) -> tuple[Role, ...]:
    """The roles whose clients may send a *kind* on their own connection; none if only a server may."""
    return tuple(role for role, kinds in FROM_CLIENT.items() if kind in kinds)


def check_hello(frame: bytes) -> Hello:
    """The Hello in *frame*, which is in order by itself.

    `ProtocolError`: it is another message, or not one of a client of our own version. `Misuse`: a setting of that
    client is wrong.
    """
    hello = decode_expected(frame, Hello)
    if hello.version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"this server speaks version {PROTOCOL_VERSION} of the protocol, the client {hello.version}: "
            "install the same release of lmcache-trio on both sides"
        )
    if len(hello.token) != 16:
        raise ProtocolError(f"the token has {len(hello.token)} bytes; it must be 16 random ones")
    if hello.role is Role.OBSERVER:
        return hello
    if not hello.engine:
        raise Misuse(f"a {hello.role.name.lower()} must name its engine: the engine id is empty")
    if hello.shard >= hello.shards:
        raise Misuse(f"shard {hello.shard} of {hello.shards} does not exist; shards count from 0")
    if hello.replica >= hello.replicas:
        raise Misuse(f"replica {hello.replica} of {hello.replicas} does not exist; replicas count from 0")
    if hello.shards * hello.replicas > MAX_SHARDS:
        raise Misuse(f"{hello.shards} shards of {hello.replicas} replicas are more than {MAX_SHARDS} workers")
    return hello


def check_welcome(frame: bytes, hello: Hello) -> Welcome | Refused:
    """The answer to *hello* in *frame*. `ProtocolError`: it is another message, of another version, or does not fit."""
    answer = decode_expected(frame, Welcome, Refused)
    if isinstance(answer, Welcome) and answer.version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the server speaks version {answer.version} of the protocol, this client {PROTOCOL_VERSION}: "
            "install the same release of lmcache-trio on both sides"
        )
    if isinstance(answer, Welcome) and hello.chunk_tokens not in (0, answer.chunk_tokens):
        raise ProtocolError(f"it grants chunks of {answer.chunk_tokens} tokens, not the {hello.chunk_tokens} asked for")
    return answer
