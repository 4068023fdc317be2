"""What may follow what, said to the real ends: a server, and a client whose server says anything at all."""

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar, get_origin, get_type_hints

import attrs
import msgspec
import pytest
import trio
import trio.testing
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmcache_trio import Client, Config, Role, open_server
from lmcache_trio._server.handlers import HANDLERS
from lmcache_trio._transport import Connection, dial_pair, introduce
from lmcache_trio._transport.memory import connection_pair
from lmcache_trio._wire import messages as m
from lmcache_trio._wire import protocol
from lmcache_trio._wire.codec import decode, encode
from lmcache_trio._wire.messages import ErrorKind, Hello, Message
from lmcache_trio._wire.protocol import FROM_CLIENT, PUSHES, REPLIES, check_hello, check_welcome, kind_of, speakers
from lmcache_trio.client import serve_connection
from lmcache_trio.errors import ConfigError, Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable
from lmcache_trio.threads import Portal

OTHER = m.PROTOCOL_VERSION + 1
Kind = type[Message]
T = TypeVar("T")

# The protocol once more, by hand: each sentence that a client may say, and its reply (None: a notice).
ANYONE: dict[Kind, Kind | None] = {m.Ping: m.Pong, m.Statistics: m.StatisticsReply, m.CopiesEnded: m.Ack}
SAID_BY: dict[Role, dict[Kind, Kind | None]] = {
    Role.OBSERVER: ANYONE
    | {m.LetGo: m.Ack, m.Inventory: m.InventoryReply, m.Clear: m.Cleared, m.LogLevel: m.Ack, m.Explain: m.Explained},
    Role.SCHEDULER: ANYONE
    | {
        m.Lookup: m.Answer,
        m.LookupStatus: m.Answer,
        m.Reset: m.Ack,
        m.Identify: m.Ack,
        m.Taken: None,
        m.Release: None,
        m.Ended: None,
        m.Watch: None,
    },
    Role.WORKER: ANYONE
    | {m.Register: m.NamespaceKnown, m.Retrieve: m.Pinned, m.Done: m.Finished, m.Reserve: m.Reserved}
    | {m.Commit: m.Committed, m.Abort: m.Ack, m.Attach: m.Ack, m.StoreBlocks: m.Stored}
    | {m.RetrieveBlocks: m.Retrieved, m.Withdraw: None},
}
ERRORS = {
    ErrorKind.UNAVAILABLE: Unavailable,
    ErrorKind.GONE: Gone,
    ErrorKind.MISUSE: Misuse,
    ErrorKind.PROTOCOL: ProtocolError,
}
FROM_CLIENTS = SAID_BY[Role.OBSERVER] | SAID_BY[Role.SCHEDULER] | SAID_BY[Role.WORKER]
REPLY_TO = {said: reply for said, reply in FROM_CLIENTS.items() if reply is not None}
PUSHED = (m.NamespaceKnown, m.Answer, m.ArenaGrown, m.Changed)
SENTENCES = [c for c in vars(m).values() if isinstance(c, type) and issubclass(c, Message) and c is not Message]


def example(kind: Kind, number: int = 5) -> Any:
    """Some valid sentence of *kind*, with *number* for its id."""
    plain: dict[Any, Any] = {int: 1, str: "", bytes: b"", bool: True, dict[str, int]: {}}
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name != "opcode"}
    plain |= {hint: () for hint in hints.values() if get_origin(hint) is tuple}
    fields = {name: plain[hint] if hint in plain else next(iter(hint)) for name, hint in hints.items()}
    return kind(**fields | {"id": number} if "id" in fields else fields)


def test_every_sentence_stands_in_one_place_and_every_one_of_a_client_has_a_handler() -> None:
    assert {c for c in SENTENCES if c.opcode < 16} == {m.Hello, m.Welcome, m.Refused}
    assert {c for c in SENTENCES if 16 <= c.opcode < 64} == set(FROM_CLIENTS) == set(HANDLERS)
    assert {c for c in SENTENCES if c.opcode >= 64} == PUSHES | set(REPLIES.values())


def test_every_request_has_a_reply_that_is_due_and_no_notice_has() -> None:
    assert {c for c in SENTENCES if 16 <= c.opcode < 40} == set(REPLIES)
    assert all("id" in get_type_hints(c) for c in {*REPLIES, *REPLIES.values()})
    assert not any("id" in get_type_hints(c) for c in SENTENCES if 40 <= c.opcode < 64)
    assert REPLY_TO == REPLIES
    assert m.ErrorReply not in REPLIES.values()  # it answers any


@pytest.mark.parametrize("role", Role)
def test_the_roles_of_a_sentence_are_those_that_may_say_it(role: Role) -> None:
    assert FROM_CLIENT[role] == set(SAID_BY[role])
    for kind in SENTENCES:
        assert (role in speakers(kind)) == (kind in SAID_BY[role])


def test_an_error_is_said_by_its_branch_and_comes_out_as_that_branch() -> None:
    assert set(ERRORS) == set(ErrorKind)
    for kind, branch in ERRORS.items():
        assert kind_of(branch("why")) is kind
        said = protocol.error_of(kind, "why")
        assert (type(said), str(said)) == (branch, "why")
    assert kind_of(ConfigError("path", "is none")) is ErrorKind.MISUSE
    assert kind_of(LMCacheTrioError("of no branch")) is ErrorKind.UNAVAILABLE


# --- at the rendezvous ------------------------------------------------------------------------------------------------


def hello(**changes: Any) -> Hello:
    return attrs.evolve(
        Hello(version=m.PROTOCOL_VERSION, client="c", token=b"t" * 16, role=Role.WORKER, engine="e"), **changes
    )


def test_hello_of_another_version_names_both() -> None:
    assert check_hello(encode(hello())) == hello()
    with pytest.raises(
        ProtocolError, match=rf"server speaks version {m.PROTOCOL_VERSION} .* client {OTHER}: install the same release"
    ):
        check_hello(encode(hello(version=OTHER)))


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
    welcome, said = m.Welcome(version=m.PROTOCOL_VERSION, address="a", boot=b"b", chunk_tokens=16), hello()
    assert check_welcome(encode(welcome), said) == welcome
    refused = m.Refused(kind=ErrorKind.UNAVAILABLE, reason="full")
    assert check_welcome(encode(refused), said) == refused
    with pytest.raises(ProtocolError, match=rf"version {OTHER} .* this client {m.PROTOCOL_VERSION}"):
        check_welcome(encode(attrs.evolve(welcome, version=OTHER)), said)
    with pytest.raises(ProtocolError, match="where Welcome or Refused was expected"):
        check_welcome(encode(m.Ack(id=1)), said)


def test_a_welcome_must_grant_the_chunks_that_the_hello_asked_for() -> None:
    welcome = m.Welcome(version=m.PROTOCOL_VERSION, address="a", boot=b"b", chunk_tokens=16)
    assert check_welcome(encode(welcome), hello(chunk_tokens=16)) == welcome
    with pytest.raises(ProtocolError, match="chunks of 16 tokens, not the 32 asked for"):
        check_welcome(encode(welcome), hello(chunk_tokens=32))


# --- what a server lets each role say ---------------------------------------------------------------------------------


@attrs.frozen
class Caller:
    """A client of some role, in plain sentences."""

    connection: Connection

    async def say(self, message: Message) -> None:
        await self.connection.send(encode(message))

    async def hear(self) -> Any:
        """The next reply, or the last word: not news of the arena or of the namespace."""
        with trio.fail_after(60):
            while True:
                message = decode(await self.connection.receive())
                if isinstance(message, m.ErrorReply) or getattr(message, "id", 0) > 0:
                    return message


Call = Callable[[Role], Awaitable[Caller]]


@pytest.fixture
async def call() -> AsyncIterator[Call]:
    async def come_in(role: Role) -> Caller:
        introduction = hello(token=secrets.token_bytes(16), role=role, engine=secrets.token_hex(8))
        welcome = check_welcome(await introduce(server.address, encode(introduction)), introduction)
        assert isinstance(welcome, m.Welcome)
        return Caller(await dial_pair(welcome.address))

    config = Config(address="memory://server", memory={"backend": "cpu", "size": 1 << 18}, grace=0.0)
    async with open_server(config) as server:
        yield come_in


@pytest.mark.parametrize("role", Role)
async def test_what_a_role_may_say_is_answered_in_kind_and_what_another_may_say_is_misuse_and_the_connection_lives(
    role: Role, call: Call
) -> None:
    client = await call(role)
    for number, (kind, reply) in enumerate(FROM_CLIENTS.items(), 1):
        await client.say(example(kind, number))
        if reply is not None:
            heard = await client.hear()
            assert heard.id == number
            if kind not in SAID_BY[role]:
                assert heard.kind is ErrorKind.MISUSE
                assert heard.message.startswith(f"{kind.__name__} is for a")
            elif type(heard) is not reply:
                assert isinstance(heard, m.ErrorReply)
                assert heard.kind is not ErrorKind.PROTOCOL
                assert "to say, not for" not in heard.message
        await client.say(m.Ping(1000 + number))
        assert (await client.hear()).id == 1000 + number


@pytest.mark.parametrize("role", Role)
async def test_what_no_client_may_say_ends_the_connection(
    role: Role, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_trio._server.connection.LAST_WORD", 0.02)
    for kind in [kind for kind in SENTENCES if kind not in FROM_CLIENTS]:
        client = await call(role)
        await client.say(example(kind))
        last = await client.hear()
        assert (type(last), last.kind) == (m.ErrorReply, ErrorKind.PROTOCOL)
        assert kind.__name__ in last.message
        with pytest.raises(Gone):
            await client.hear()


@pytest.mark.parametrize("kind", sorted(REPLY_TO, key=str))
async def test_a_request_with_the_id_of_what_is_said_unasked_ends_the_connection(
    kind: Kind, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply would be a push to the client, and an error its last word."""
    monkeypatch.setattr("lmcache_trio._server.connection.LAST_WORD", 0.02)
    (role, *_) = speakers(kind)
    client = await call(role)
    await client.say(example(kind, 0))
    last = await client.hear()
    assert (type(last), last.id, last.kind) == (m.ErrorReply, 0, ErrorKind.PROTOCOL)
    assert last.message.startswith(f"{kind.__name__}: ")
    assert "`$.id`" in last.message
    with pytest.raises(Gone):
        await client.hear()


# --- what a client believes of its server -----------------------------------------------------------------------------

LAST_WORD = m.ErrorReply(0, ErrorKind.PROTOCOL, "it cannot be read")


async def converse(*, task_status: trio.TaskStatus[tuple[Client, Connection]]) -> None:
    near, far = connection_pair()
    async with serve_connection(near, example(m.Welcome)) as client:
        task_status.started((client, far))
        await trio.sleep_forever()


async def settled(fn: Callable[..., T], *args: Any) -> T:
    value = fn(*args)
    await trio.testing.wait_all_tasks_blocked()
    return value


class Conversations(RuleBasedStateMachine):
    """A server that says anything, in any order. The oracle is a dictionary of what was asked and not answered."""

    def __init__(self) -> None:
        super().__init__()
        self.connect()

    @precondition(lambda self: self.over)
    @rule()
    def connect_again(self) -> None:
        self.portal.stop(60)
        self.connect()

    def connect(self) -> None:
        self.portal = Portal("conversation")
        self.client, self.peer = self.portal.start(converse, timeout=60)
        self.over = False
        self.due: dict[int, Kind] = {}
        self.answered: set[int] = set()
        self.told: dict[int, list[object]] = {}  # by request, what its callback got: a reply, or the type of an error
        self.right: dict[int, list[object]] = {}
        self.pushes: list[Message] = []
        self.right_pushes: list[Message] = []
        self.client.on_push = self.pushes.append

    def teardown(self) -> None:
        self.portal.stop(60)

    def do(self, fn: Callable[..., T], *args: Any) -> T:
        """In the loop, whose tasks then do all that they can."""
        value: T = self.portal.call(settled, fn, *args, timeout=60)
        return value

    def heard_by_peer(self) -> Message:
        return decode(self.do(self.peer.receive_nowait))

    # --- the client asks ---

    @precondition(lambda self: not self.over)
    @rule(kinds=st.lists(st.sampled_from(sorted(REPLY_TO, key=str)), min_size=1, max_size=4), heard=st.booleans())
    def ask(self, kinds: list[Kind], heard: bool) -> None:
        for kind in kinds:
            message = example(kind, self.client.new_id())
            if heard:
                self.right[message.id] = []
                self.do(self.client.request_nowait, message, self.callback(message.id))
            else:
                self.do(self.client.request_unheard, message)
            assert self.heard_by_peer() == message
            self.due[message.id] = kind

    def callback(self, number: int) -> Callable[[Message | LMCacheTrioError], None]:
        told = self.told[number] = []
        return lambda reply: told.append(type(reply) if isinstance(reply, LMCacheTrioError) else reply)

    @precondition(lambda self: self.due)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.due)))
        self.do(self.client.forget, number)
        if number in self.right:
            del self.right[number], self.told[number]

    @precondition(lambda self: not self.over)
    @rule(kind=st.sampled_from([m.Taken, m.Release, m.Ended, m.Withdraw]))
    def notice(self, kind: Kind) -> None:
        self.do(self.client.notice_nowait, example(kind))
        assert self.heard_by_peer() == example(kind)

    @precondition(lambda self: self.over)
    @rule()
    def ask_nobody(self) -> None:
        ask, self.right[ask.id] = (ask := m.Ping(self.client.new_id())), []
        with pytest.raises(Unavailable):
            self.do(self.client.request_nowait, ask, self.callback(ask.id))
        self.do(self.client.request_unheard, ask)
        self.do(self.client.notice_nowait, m.Ended(1))

    # --- the server says ---

    @precondition(lambda self: self.due)
    @rule(data=st.data(), failing=st.sets(st.integers(0, 12)), kind=st.sampled_from(ErrorKind))
    def reply_in_any_order(self, data: st.DataObject, failing: set[int], kind: ErrorKind) -> None:
        some = data.draw(st.permutations(sorted(self.due)))[: data.draw(st.integers(1, 4))]
        replies = {number: example(REPLY_TO[self.due[number]], number) for number in some}
        self.say([m.ErrorReply(n, kind, "no") if n in failing else reply for n, reply in replies.items()])

    @precondition(lambda self: not self.over)
    @rule(kinds=st.lists(st.sampled_from(PUSHED), min_size=1, max_size=3))
    def push(self, kinds: list[Kind]) -> None:
        self.say([example(kind, 0) for kind in kinds])

    @precondition(lambda self: self.due and self.warm())
    @rule(kind=st.sampled_from(SENTENCES), data=st.data())
    def say_anything_of_what_is_due(self, kind: Kind, data: st.DataObject) -> None:
        self.say([example(kind, data.draw(st.sampled_from(sorted(self.due))))])

    @precondition(lambda self: self.answered and self.warm())
    @rule(kind=st.sampled_from(SENTENCES), data=st.data())
    def say_anything_of_what_was_answered(self, kind: Kind, data: st.DataObject) -> None:
        self.say([example(kind, data.draw(st.sampled_from(sorted(self.answered))))])

    @precondition(lambda self: self.warm())
    @rule(kind=st.sampled_from(SENTENCES), number=st.integers(1000, m.MAX_NUMBER))
    def say_anything_of_what_was_never_asked(self, kind: Kind, number: int) -> None:
        self.say([example(kind, number)])

    @precondition(lambda self: self.warm())
    @rule(kind=st.sampled_from(SENTENCES))
    def say_anything_unasked(self, kind: Kind) -> None:
        self.say([example(kind, 0)])

    @precondition(lambda self: self.warm())
    @rule(last=st.sampled_from([b"", b"\xff", b"\x10", encode(m.Pong(1, b""))[:-1], LAST_WORD]))
    def say_what_is_no_sentence_or_a_last_word(self, last: Message | bytes) -> None:
        self.say([last])

    @precondition(lambda self: self.warm())
    @rule()
    def hang_up(self) -> None:
        self.do(self.peer.close)
        self.ends()

    def warm(self) -> bool:
        """Has enough been said for it to be worth an end?"""
        return not self.over and len(self.due) + len(self.answered) > 4

    def say(self, said: Sequence[Message | bytes]) -> None:
        """All of it at once, before the client hears any."""
        self.do(lambda: [self.peer.send_nowait(s if isinstance(s, bytes) else encode(s)) for s in said])
        for message in said:
            if not self.over:
                self.hears(message)

    # --- the oracle ---

    def hears(self, message: Message | bytes) -> None:
        number, kind = getattr(message, "id", 0), type(message)
        if number == 0 and isinstance(message, PUSHED):
            self.right_pushes.append(message)
        elif number not in self.due:
            self.ends()
        elif isinstance(message, m.ErrorReply):
            self.is_told(number, ERRORS[message.kind])
        elif kind is REPLY_TO[self.due[number]]:
            self.is_told(number, message)
        else:
            self.is_told(number, ProtocolError)
            self.ends()

    def is_told(self, number: int, what: object) -> None:
        del self.due[number]
        self.answered.add(number)
        if number in self.right:
            self.right[number].append(what)

    def ends(self) -> None:
        for number in list(self.due):
            self.is_told(number, Unavailable)
        self.over = True

    @invariant()
    def each_was_told_what_it_waited_for_and_nothing_is_kept(self) -> None:
        assert self.told == self.right
        assert self.pushes == self.right_pushes
        assert self.client.lost == self.over
        assert set(self.client._due) == set(self.due)
        assert set(self.client._waiters) == set(self.due) & set(self.right)
        if self.over:
            self.portal.call(self.peer.wait_closed, timeout=60)


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=60)  # each step goes through a thread and back
