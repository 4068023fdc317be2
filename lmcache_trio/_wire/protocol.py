"""What may follow what, for both ends: tables and checks. It remembers nothing and does no I/O.

    Hello --in order--> Welcome | Refused                        at the rendezvous, `check_hello` and `check_welcome`
    request --id--> due --reply of its kind or ErrorReply, same id--> answered      once, in any order
    notice   client to server, no reply         push   server to client, id 0 where it has one

`_transport.conversation` holds a client's end and what is due there; whatever is not due and no push, it takes for the
server's fault. `_server.connection` holds the server's, which keeps no list of ids: it answers what it is asked, if the
client's role may ask it. Beyond its decoding a message costs either end a look-up or two.
"""

from collections.abc import Mapping

from lmcache_trio._wire import messages as m
from lmcache_trio._wire.codec import decode_expected
from lmcache_trio._wire.messages import PROTOCOL_VERSION, ErrorKind, Hello, Message, Refused, Role, Welcome
from lmcache_trio.errors import Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

__all__ = [
    "ERRORS",
    "FROM_CLIENT",
    "PUSHES",
    "REPLIES",
    "check_hello",
    "check_welcome",
    "error_of",
    "kind_of",
    "speakers",
]

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
}
"""Each request and the one kind of reply that answers it; an ErrorReply answers any."""

PUSHES = frozenset({m.NamespaceKnown, m.Answer, m.ArenaGrown, m.ErrorReply})
"""What the server says unasked, with id 0. An ErrorReply of that kind is its last word on the connection."""

_ANYONE = frozenset({m.Ping, m.Statistics, m.CopiesEnded})
FROM_CLIENT: Mapping[Role, frozenset[type[Message]]] = {
    Role.OBSERVER: _ANYONE | {m.LetGo},
    Role.SCHEDULER: _ANYONE | {m.Lookup, m.LookupStatus, m.Reset, m.Identify, m.Taken, m.Release, m.Ended},
    Role.WORKER: _ANYONE
    | {m.Register, m.Retrieve, m.Done, m.Reserve, m.Commit, m.Abort}
    | {m.Attach, m.StoreBlocks, m.RetrieveBlocks, m.Withdraw},
}
"""What a client of each role may say on its own connection. Whose copies a CopiesEnded speaks of, its token says."""

ERRORS: Mapping[ErrorKind, type[LMCacheTrioError]] = {
    ErrorKind.UNAVAILABLE: Unavailable,
    ErrorKind.GONE: Gone,
    ErrorKind.MISUSE: Misuse,
    ErrorKind.PROTOCOL: ProtocolError,
}
"""What each kind of an ErrorReply, or of a Refused, stands for: the branches of `errors`."""


def error_of(kind: ErrorKind, message: str) -> LMCacheTrioError:
    """The error that the other end said."""
    return ERRORS[kind](message)


def kind_of(error: LMCacheTrioError) -> ErrorKind:
    """How *error* is said: by the branch that it is on."""
    return next((kind for kind, cls in ERRORS.items() if isinstance(error, cls)), ErrorKind.UNAVAILABLE)


def speakers(kind: type[Message]) -> tuple[Role, ...]:
    """The roles whose clients may say a *kind* on their own connection; none for what only a server says."""
    return tuple(role for role, sentences in FROM_CLIENT.items() if kind in sentences)


def check_hello(frame: bytes) -> Hello:
    """The Hello that *frame* is: in order, whatever else the server knows.

    `ProtocolError`: it is none, or not one that a client of our own version says. `Misuse`: whoever runs that client
    gave it wrong settings.
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
    return hello


def check_welcome(frame: bytes, hello: Hello) -> Welcome | Refused:
    """The server's answer to *hello*; `ProtocolError` when it is none, of another version, or none to that one."""
    answer = decode_expected(frame, Welcome, Refused)
    if isinstance(answer, Welcome) and answer.version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the server speaks version {answer.version} of the protocol, this client {PROTOCOL_VERSION}: "
            "install the same release of lmcache-trio on both sides"
        )
    if isinstance(answer, Welcome) and hello.chunk_tokens not in (0, answer.chunk_tokens):
        raise ProtocolError(f"it grants chunks of {answer.chunk_tokens} tokens, not the {hello.chunk_tokens} asked for")
    return answer
