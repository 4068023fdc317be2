"""What may follow what, seen from either end of a client's own connection. No I/O: frames in, sentences out.

    request  --id--> outstanding --reply of its kind or ErrorReply, same id--> answered     (once, in any order)
    notice   client to server, no reply        push   server to client, id 0 where it has one

Which sentences a client may send depends on its role. Whatever breaks a rule raises `ProtocolError` at the side that
hears it (its connection is to be ended) and `Misuse` at the side that would say it; either way nothing has changed.
A message costs one dictionary look-up beyond its decoding.
"""

from collections.abc import Mapping

from lmcache_trio._wire import messages as m
from lmcache_trio._wire.codec import decode, decode_expected, encode
from lmcache_trio._wire.messages import PROTOCOL_VERSION, Hello, Message, Refused, Role, Welcome
from lmcache_trio.errors import Misuse, ProtocolError

__all__ = [
    "FROM_CLIENT",
    "PUSHES",
    "REPLIES",
    "ClientProtocol",
    "ServerProtocol",
    "check_hello",
    "check_welcome",
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
    m.Attach: m.Ack,
    m.StoreBlocks: m.Stored,
    m.RetrieveBlocks: m.Retrieved,
    m.LetGo: m.Ack,
}
"""Each request and the one kind of reply that answers it; an ErrorReply answers any."""

PUSHES = frozenset({m.NamespaceKnown, m.Answer, m.ArenaGrown, m.LayersDone, m.ErrorReply})
"""What the server says unasked, with id 0. An ErrorReply of that kind is its last word on the connection."""

_ANYONE = frozenset({m.Ping, m.Statistics, m.CopiesEnded})
FROM_CLIENT: Mapping[Role, frozenset[type[Message]]] = {
    Role.OBSERVER: _ANYONE | {m.LetGo},
    Role.SCHEDULER: _ANYONE | {m.Lookup, m.LookupStatus, m.Reset, m.Taken, m.Release, m.Ended},
    Role.WORKER: _ANYONE
    | {m.Register, m.Retrieve, m.Done, m.Reserve, m.Commit, m.Abort}
    | {m.Attach, m.StoreBlocks, m.RetrieveBlocks, m.Withdraw},
}
"""What a client of each role may say on its own connection. Whose copies a CopiesEnded speaks of, its token says."""


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


def check_welcome(frame: bytes) -> Welcome | Refused:
    """The server's answer at the rendezvous; `ProtocolError` when it is none, or of another version."""
    answer = decode_expected(frame, Welcome, Refused)
    if isinstance(answer, Welcome) and answer.version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the server speaks version {answer.version} of the protocol, this client {PROTOCOL_VERSION}: "
            "install the same release of lmcache-trio on both sides"
        )
    return answer


class ClientProtocol:
    """The client's end. `send` may run in another thread than `receive`; ids must then come from one counter."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._may_say = FROM_CLIENT[role]
        self._outstanding: dict[int, type[Message]] = {}

    @property
    def outstanding(self) -> int:
        """Requests that were sent and not answered."""
        return len(self._outstanding)

    def send(self, message: Message) -> bytes:
        """The frame for *message*; a request is outstanding from now on. If it is not sent after all: `withdraw`."""
        kind = type(message)
        if kind not in self._may_say:
            raise Misuse(f"a {self._role.name.lower()} may not send {kind.__name__}")
        reply = REPLIES.get(kind)
        if reply is None:
            return encode(message)
        number: int = message.id  # type: ignore[attr-defined]
        if number < 1 or number in self._outstanding:
            raise Misuse(f"{kind.__name__}: id {number} must be positive and not be in use")
        frame = encode(message)
        self._outstanding[number] = reply
        return frame

    def withdraw(self, number: int) -> None:
        """Request *number* was never sent."""
        self._outstanding.pop(number, None)

    def receive(self, frame: bytes) -> Message:
        """The reply or push that *frame* is."""
        message = decode(frame)
        kind = type(message)
        number = getattr(message, "id", 0)
        if number == 0:
            if kind not in PUSHES:
                raise ProtocolError(f"{kind.__name__} is nothing that a server says unasked")
            return message
        expected = self._outstanding.get(number)
        if expected is None:
            raise ProtocolError(f"{kind.__name__} answers request {number}, which is not outstanding")
        if kind is not expected and kind is not m.ErrorReply:
            raise ProtocolError(f"{kind.__name__} answers request {number}, where {expected.__name__} was expected")
        del self._outstanding[number]
        return message


class ServerProtocol:
    """The server's end of one client's connection."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._may_say = FROM_CLIENT[role]
        self._outstanding: dict[int, type[Message]] = {}

    @property
    def outstanding(self) -> int:
        """Requests that were received and not answered."""
        return len(self._outstanding)

    def receive(self, frame: bytes) -> Message:
        """The request or notice that *frame* is."""
        message = decode(frame)
        kind = type(message)
        if kind not in self._may_say:
            raise ProtocolError(f"{kind.__name__} may not be sent by a {self._role.name.lower()}")
        reply = REPLIES.get(kind)
        if reply is not None:
            number: int = message.id  # type: ignore[attr-defined]
            if number == 0 or number in self._outstanding:
                raise ProtocolError(f"{kind.__name__}: id {number} is in use by another request")
            self._outstanding[number] = reply
        return message

    def send(self, message: Message) -> bytes:
        """The frame for a reply, whose request is answered by it, or for a push."""
        kind = type(message)
        number = getattr(message, "id", 0)
        if number == 0:
            if kind not in PUSHES:
                raise Misuse(f"{kind.__name__} with id 0 is nothing that a server says unasked")
            return encode(message)
        expected = self._outstanding.get(number)
        if expected is None:
            raise Misuse(f"{kind.__name__}: request {number} is not outstanding")
        if kind is not expected and kind is not m.ErrorReply:
            raise Misuse(f"{kind.__name__} answers request {number}, where {expected.__name__} was promised")
        frame = encode(message)
        del self._outstanding[number]
        return frame
