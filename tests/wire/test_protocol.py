"""Client and server are tested against each other in memory: frames of one go into the other."""

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, get_type_hints

import attrs
import msgspec
import pytest
import trio
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lmcache_trio import Config, open_server
from lmcache_trio._server.handlers import HANDLERS
from lmcache_trio._transport import Connection, dial_pair, introduce
from lmcache_trio._wire import messages as m
from lmcache_trio._wire.codec import decode, encode
from lmcache_trio._wire.messages import Hello, Message, Role
from lmcache_trio._wire.protocol import (
    FROM_CLIENT,
    PUSHES,
    REPLIES,
    ClientProtocol,
    ServerProtocol,
    check_hello,
    check_welcome,
    speakers,
)
from lmcache_trio.errors import Gone, Misuse, ProtocolError

REQUESTS: dict[type[Message], Callable[[int], Message]] = {
    m.Ping: lambda i: m.Ping(id=i),
    m.Statistics: lambda i: m.Statistics(id=i),
    m.Register: lambda i: m.Register(id=i, fingerprint=b"f", shard_bytes=1, block_tokens=1),
    m.Lookup: lambda i: m.Lookup(id=i, session=1, start=0, digests=b"", upto=0),
    m.LookupStatus: lambda i: m.LookupStatus(id=i, session=1),
    m.Retrieve: lambda i: m.Retrieve(id=i, lease=b"l", start=0, count=1),
    m.Done: lambda i: m.Done(id=i, pin=b"p"),
    m.Reserve: lambda i: m.Reserve(id=i, session=1, parent=b"", digests=b""),
    m.Commit: lambda i: m.Commit(id=i, reservation=b"r"),
    m.Abort: lambda i: m.Abort(id=i, reservation=b"r"),
    m.CopiesEnded: lambda i: m.CopiesEnded(id=i, token=b"t"),
    m.Reset: lambda i: m.Reset(id=i),
}
ANSWERS: dict[type[Message], Callable[[int], Message]] = {
    m.Pong: lambda i: m.Pong(id=i, boot=b"b"),
    m.StatisticsReply: lambda i: m.StatisticsReply(id=i, json=b"{}"),
    m.NamespaceKnown: lambda i: m.NamespaceKnown(id=i, namespace=b""),
    m.Answer: lambda i: m.Answer(id=i, session=1, asked=1, state=m.AnswerState.PENDING),
    m.Pinned: lambda i: m.Pinned(id=i, pin=b"p", offsets=b""),
    m.Finished: lambda i: m.Finished(id=i, valid=True),
    m.Reserved: lambda i: m.Reserved(id=i, reservation=b"", positions=b"", offsets=b""),
    m.Committed: lambda i: m.Committed(id=i, published=0),
    m.Ack: lambda i: m.Ack(id=i),
}
NOTICES: list[Message] = [m.Taken(session=1, lease=b"l"), m.Release(session=1), m.Ended(session=1)]
ERROR = m.ErrorReply(id=0, kind=m.ErrorKind.PROTOCOL, message="no")


def hello(**changes: Any) -> Hello:
    return attrs.evolve(Hello(version=1, client="c", token=b"t" * 16, role=Role.WORKER, engine="e"), **changes)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("request_type", REQUESTS)
def test_each_role_may_send_its_own_requests_and_no_others(role: Role, request_type: type[Message]) -> None:
    client, server = ClientProtocol(role), ServerProtocol(role)
    request = REQUESTS[request_type](5)
    if request_type in FROM_CLIENT[role]:
        assert server.receive(client.send(request)) == request
        reply = ANSWERS[REPLIES[request_type]](5)
        assert client.receive(server.send(reply)) == reply
    else:
        with pytest.raises(Misuse, match=f"{role.name.lower()} may not send {request_type.__name__}"):
            client.send(request)
        with pytest.raises(ProtocolError, match=request_type.__name__):
            server.receive(encode(request))
    assert client.outstanding == server.outstanding == 0


@pytest.mark.parametrize("notice", NOTICES)
def test_a_notice_is_never_outstanding(notice: Message) -> None:
    client, server = ClientProtocol(Role.SCHEDULER), ServerProtocol(Role.SCHEDULER)
    assert server.receive(client.send(notice)) == notice
    assert client.outstanding == server.outstanding == 0
    with pytest.raises(ProtocolError):
        ServerProtocol(Role.WORKER).receive(encode(notice))


@pytest.mark.parametrize("reply", ANSWERS.values())
def test_a_servers_sentence_from_a_client_is_a_protocol_error(reply: Callable[[int], Message]) -> None:
    for role in Role:
        with pytest.raises(ProtocolError, match="may not be sent by"):
            ServerProtocol(role).receive(encode(reply(1)))


def test_an_id_in_use_is_refused_on_both_sides_and_changes_nothing() -> None:
    client, server = ClientProtocol(Role.OBSERVER), ServerProtocol(Role.OBSERVER)
    server.receive(client.send(m.Ping(id=1)))
    with pytest.raises(Misuse, match="id 1"):
        client.send(m.Statistics(id=1))
    with pytest.raises(ProtocolError, match="id 1"):
        server.receive(encode(m.Statistics(id=1)))
    assert client.receive(server.send(m.Pong(id=1, boot=b""))) == m.Pong(id=1, boot=b"")


def test_an_answered_id_may_be_used_again() -> None:
    client, server = ClientProtocol(Role.OBSERVER), ServerProtocol(Role.OBSERVER)
    for _ in range(3):
        server.receive(client.send(m.Ping(id=1)))
        client.receive(server.send(m.Pong(id=1, boot=b"")))


def test_id_zero_is_no_request() -> None:
    with pytest.raises(Misuse):
        ClientProtocol(Role.OBSERVER).send(m.Ping(id=0))
    with pytest.raises(ProtocolError):
        ServerProtocol(Role.OBSERVER).receive(encode(m.Ping(id=0)))


def test_a_reply_to_no_request_is_refused_on_both_sides() -> None:
    with pytest.raises(ProtocolError, match="not outstanding"):
        ClientProtocol(Role.OBSERVER).receive(encode(m.Pong(id=3, boot=b"")))
    with pytest.raises(Misuse, match="not outstanding"):
        ServerProtocol(Role.OBSERVER).send(m.Pong(id=3, boot=b""))


def test_a_reply_of_another_kind_is_refused_and_the_request_stays_outstanding() -> None:
    client, server = ClientProtocol(Role.OBSERVER), ServerProtocol(Role.OBSERVER)
    server.receive(client.send(m.Ping(id=1)))
    with pytest.raises(Misuse, match="where Pong was promised"):
        server.send(m.Ack(id=1))
    with pytest.raises(ProtocolError, match="where Pong was expected"):
        client.receive(encode(m.Ack(id=1)))
    assert client.outstanding == server.outstanding == 1


def test_an_error_reply_answers_any_request() -> None:
    client, server = ClientProtocol(Role.SCHEDULER), ServerProtocol(Role.SCHEDULER)
    server.receive(client.send(m.Reset(id=1)))
    client.receive(server.send(attrs.evolve(ERROR, id=1)))
    assert client.outstanding == server.outstanding == 0


def test_only_pushes_may_come_unasked() -> None:
    client, server = ClientProtocol(Role.SCHEDULER), ServerProtocol(Role.SCHEDULER)
    pushes: list[Message] = [ANSWERS[m.Answer](0), ANSWERS[m.NamespaceKnown](0), m.ArenaGrown(taken=1), ERROR]
    for push in pushes:
        assert client.receive(server.send(push)) == push
    with pytest.raises(Misuse):
        server.send(m.Ack(id=0))
    with pytest.raises(ProtocolError):
        client.receive(encode(m.Ack(id=0)))
    with pytest.raises(ProtocolError):
        client.receive(encode(m.Taken(session=1, lease=b"")))


def test_a_malformed_frame_leaves_both_ends_as_they_were() -> None:
    client, server = ClientProtocol(Role.OBSERVER), ServerProtocol(Role.OBSERVER)
    frame = client.send(m.Ping(id=1))
    with pytest.raises(ProtocolError):
        server.receive(frame[:-1])
    assert server.outstanding == 0
    assert server.receive(frame) == m.Ping(id=1)
    with pytest.raises(ProtocolError):
        client.receive(b"\xfe")
    assert client.outstanding == 1


def test_a_request_that_was_not_sent_can_be_withdrawn() -> None:
    client = ClientProtocol(Role.OBSERVER)
    client.send(m.Ping(id=1))
    client.withdraw(1)
    assert client.outstanding == 0


def test_hello_of_another_version_names_both() -> None:
    assert check_hello(encode(hello())) == hello()
    with pytest.raises(ProtocolError, match=r"server speaks version 1 .* client 7: install the same release"):
        check_hello(encode(hello(version=7)))


def test_hello_of_an_impossible_shard_or_a_nameless_engine_is_misuse_unless_it_is_an_observers() -> None:
    with pytest.raises(Misuse, match=r"shard 2 of 2 .* count from 0"):
        check_hello(encode(hello(shard=2, shards=2)))
    for role in (Role.SCHEDULER, Role.WORKER):
        with pytest.raises(Misuse, match=f"a {role.name.lower()} must name its engine"):
            check_hello(encode(hello(engine="", role=role)))
    assert check_hello(encode(hello(engine="", shard=1, role=Role.OBSERVER))).role is Role.OBSERVER


@pytest.mark.parametrize("token", [b"", b"t" * 15, b"t" * 17])
def test_hello_with_a_token_that_is_not_16_bytes_is_refused(token: bytes) -> None:
    for role in Role:
        with pytest.raises(ProtocolError, match=f"token has {len(token)} bytes; it must be 16 random ones"):
            check_hello(encode(hello(token=token, role=role)))


def test_what_is_no_hello_is_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match="Ping came where Hello was expected"):
        check_hello(encode(m.Ping(id=1)))
    with pytest.raises(ProtocolError, match="Hello"):
        check_hello(b"\x01" + msgspec.msgpack.encode({"version": 1}))


def test_welcome_of_another_version_names_both_and_refused_is_taken() -> None:
    welcome = m.Welcome(version=1, address="a", boot=b"b", chunk_tokens=1)
    assert check_welcome(encode(welcome)) == welcome
    refused = m.Refused(kind=m.ErrorKind.UNAVAILABLE, reason="full")
    assert check_welcome(encode(refused)) == refused
    with pytest.raises(ProtocolError, match=r"version 2 .* this client 1"):
        check_welcome(encode(attrs.evolve(welcome, version=2)))
    with pytest.raises(ProtocolError, match="where Welcome or Refused was expected"):
        check_welcome(encode(m.Ack(id=1)))


# --- what the real server lets each role say --------------------------------------------------------------------------

SENTENCES = [c for c in vars(m).values() if isinstance(c, type) and issubclass(c, Message) and c is not Message]
ANYONE: dict[type[Message], type[Message] | None] = {
    m.Ping: m.Pong,
    m.Statistics: m.StatisticsReply,
    m.CopiesEnded: m.Ack,
}
SAID_BY: dict[Role, dict[type[Message], type[Message] | None]] = {
    Role.OBSERVER: ANYONE | {m.LetGo: m.Ack},
    Role.SCHEDULER: ANYONE
    | {m.Lookup: m.Answer, m.LookupStatus: m.Answer, m.Reset: m.Ack, m.Taken: None, m.Release: None, m.Ended: None},
    Role.WORKER: ANYONE
    | {m.Register: m.NamespaceKnown, m.Retrieve: m.Pinned, m.Done: m.Finished, m.Reserve: m.Reserved}
    | {m.Commit: m.Committed, m.Abort: m.Ack, m.Attach: m.Ack, m.StoreBlocks: m.Stored}
    | {m.RetrieveBlocks: m.Retrieved, m.Withdraw: None},
}
"""The protocol once more, by hand: each sentence that a client may say, and the reply that it gets (None: a notice)."""
FROM_CLIENTS = SAID_BY[Role.OBSERVER] | SAID_BY[Role.SCHEDULER] | SAID_BY[Role.WORKER]


def example(kind: type[Message], number: int = 5) -> Any:
    """Some valid sentence of *kind*, with *number* for its id."""
    plain: dict[Any, Any] = {int: 1, str: "", bytes: b"", bool: True, dict[str, int]: {}}
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name != "opcode"}
    fields = {name: plain[hint] if hint in plain else next(iter(hint)) for name, hint in hints.items()}
    return kind(**fields | {"id": number} if "id" in fields else fields)


@attrs.frozen
class Caller:
    """A client of some role, in plain sentences."""

    connection: Connection

    async def say(self, message: Message) -> None:
        await self.connection.send(encode(message))

    async def hear(self) -> Message:
        """The next reply, or the last word: not news of the arena or of the namespace."""
        with trio.fail_after(60):
            while True:
                message = decode(await self.connection.receive())
                if isinstance(message, m.ErrorReply) or getattr(message, "id", 0):
                    return message


@pytest.fixture
async def call() -> AsyncIterator[Callable[[Role], Awaitable[Caller]]]:
    async def come_in(role: Role) -> Caller:
        introduction = hello(token=secrets.token_bytes(16), role=role, engine=secrets.token_hex(8))
        welcome = check_welcome(await introduce(server.address, encode(introduction)))
        assert isinstance(welcome, m.Welcome)
        return Caller(await dial_pair(welcome.address))

    config = Config(address="memory://server", memory={"backend": "cpu", "size": 1 << 18}, grace=0.0)
    async with open_server(config) as server:
        yield come_in


def test_every_sentence_stands_in_one_place_and_no_client_sentence_lacks_a_handler() -> None:
    assert {c for c in SENTENCES if c.opcode < 16} == {m.Hello, m.Welcome, m.Refused}
    assert {c for c in SENTENCES if 16 <= c.opcode < 64} == set(FROM_CLIENTS) == set(HANDLERS)
    assert {c for c in SENTENCES if 16 <= c.opcode < 40} == {c for c in FROM_CLIENTS if "id" in get_type_hints(c)}
    assert {c for c in SENTENCES if c.opcode >= 64} == PUSHES | set(REPLIES.values())


def test_every_request_and_no_notice_has_a_reply_that_is_due() -> None:
    assert {said: reply for said, reply in FROM_CLIENTS.items() if reply is not None} == REPLIES
    assert m.ErrorReply not in REPLIES.values()  # it answers any


@pytest.mark.parametrize("role", Role)
def test_the_roles_of_a_sentence_are_those_that_may_say_it(role: Role) -> None:
    assert FROM_CLIENT[role] == set(SAID_BY[role])
    for kind in SENTENCES:
        assert (role in speakers(kind)) == (kind in SAID_BY[role])


@pytest.mark.parametrize("role", Role)
async def test_what_a_role_may_say_is_answered_in_kind_and_what_another_may_say_is_misuse_and_the_connection_lives(
    role: Role, call: Callable[[Role], Awaitable[Caller]]
) -> None:
    client = await call(role)
    for number, (kind, reply) in enumerate(FROM_CLIENTS.items(), 1):
        await client.say(example(kind, number))
        if reply is not None:
            heard: Any = await client.hear()
            assert heard.id == number
            if kind not in SAID_BY[role]:
                assert heard.kind is m.ErrorKind.MISUSE
                assert heard.message.startswith(f"{kind.__name__} is for a")
            elif type(heard) is not reply:  # it is not told of its role at least
                assert isinstance(heard, m.ErrorReply)
                assert "to say, not for" not in heard.message
        await client.say(m.Ping(1000 + number))
        answer: Any = await client.hear()
        assert answer.id == 1000 + number


@pytest.mark.parametrize("role", Role)
async def test_what_no_client_may_say_ends_the_connection(
    role: Role, call: Callable[[Role], Awaitable[Caller]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_trio._server.connection.LAST_WORD", 0.02)
    for kind in [kind for kind in SENTENCES if kind not in FROM_CLIENTS]:
        client = await call(role)
        await client.say(example(kind))
        last = await client.hear()
        assert isinstance(last, m.ErrorReply)
        assert last.kind is m.ErrorKind.PROTOCOL
        assert kind.__name__ in last.message
        with pytest.raises(Gone):
            await client.hear()


class Conversations(RuleBasedStateMachine):
    """Replies in any order, each once: both ends agree with a set of ids about what is outstanding."""

    asked = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        self.client = ClientProtocol(Role.SCHEDULER)
        self.server = ServerProtocol(Role.SCHEDULER)
        self.open: set[int] = set()

    @rule(target=asked, number=st.integers(1, 8), kind=st.sampled_from(sorted(FROM_CLIENT[Role.SCHEDULER], key=str)))
    def ask(self, number: int, kind: type[Message]) -> tuple[int, type[Message]] | None:
        if kind not in REQUESTS:
            self.server.receive(self.client.send(NOTICES[number % 3]))
            return None
        request = REQUESTS[kind](number)
        if number in self.open:
            with pytest.raises(Misuse):
                self.client.send(request)
            return None
        assert self.server.receive(self.client.send(request)) == request
        self.open.add(number)
        return number, kind

    @rule(asked=consumes(asked), fails=st.booleans())
    def answer(self, asked: tuple[int, type[Message]] | None, fails: bool) -> None:
        if asked is None:
            return
        number, kind = asked
        reply = attrs.evolve(ERROR, id=number) if fails else ANSWERS[REPLIES[kind]](number)
        assert self.client.receive(self.server.send(reply)) == reply
        self.open.remove(number)
        with pytest.raises(ProtocolError):
            self.client.receive(encode(reply))

    @invariant()
    def both_ends_agree(self) -> None:
        assert self.client.outstanding == self.server.outstanding == len(self.open)


TestConversations = Conversations.TestCase
