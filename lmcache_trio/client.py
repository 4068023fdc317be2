"""The asynchronous client: one connection to a server, for programs that are Trio programs themselves.

The adapters are built on it too. Any thread may call `request_nowait` and `notice_nowait`; that thread encodes and
sends, so the question of a synchronous host costs no hop on its way out. One task reads. It hands each reply to its
waiter, and each push to `on_push`. A lost connection is over: every waiter gets `Unavailable` at once, and a new client
must be opened.

The client does not retry, does not reconnect, and imports no torch.
"""

import json
import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import attrs
import trio

from lmcache_trio._core.groups import Group
from lmcache_trio._core.keys import DIGEST_BYTES, join_digests
from lmcache_trio._transport import Connection, dial_pair, introduce, wait_listening
from lmcache_trio._transport.arena_map import ArenaMap
from lmcache_trio._transport.conversation import Conversation, Reply, expect
from lmcache_trio._transport.socket_files import NotToBeUsed
from lmcache_trio._wire.codec import POSITIONS, decode, encode
from lmcache_trio._wire.messages import (
    MAX_RESERVED,
    PROTOCOL_VERSION,
    Abort,
    Ack,
    Answer,
    AnswerState,
    ArenaGrown,
    Clear,
    Cleared,
    Commit,
    Committed,
    CopiesEnded,
    Done,
    Ended,
    Explain,
    Explained,
    Finished,
    Hello,
    Identify,
    Inventory,
    InventoryReply,
    LogLevel,
    Lookup,
    LookupStatus,
    Message,
    NamespaceKnown,
    Ping,
    Pinned,
    Pong,
    Refused,
    Register,
    Release,
    Reserve,
    Reserved,
    Reset,
    Retrieve,
    Role,
    Statistics,
    StatisticsReply,
    Taken,
    Welcome,
)
from lmcache_trio._wire.protocol import TAKE_UP, check_welcome, error_of
from lmcache_trio.config import default_addresses, load_client_config
from lmcache_trio.config.addresses import TcpAddress, parse_address
from lmcache_trio.errors import ConfigError, Gone, Misuse, ProtocolError, Unavailable

__all__ = ["Client", "Storing", "connect", "message_of", "open_client", "places_of", "serve_connection", "wait_server"]

_M = TypeVar("_M", bound=Message)


def message_of(kind: type[_M], *values: Any, **more: Any) -> _M:
    """The message *kind* with these fields. `Misuse`, and nothing is sent, if a server could not decode it.

    It is decoded here as by the server, which takes two or three times as long as making it: a few us per round trip.
    """
    try:
        made = kind(*values, **more)
        decode(encode(made))
    except (ProtocolError, ValueError, TypeError, OverflowError) as exc:
        raise Misuse(f"{kind.__name__} cannot have these values: {exc}") from exc
    return made


def _packed(digests: Sequence[bytes]) -> bytes:
    if not isinstance(digests, Sequence) or isinstance(digests, str | bytes):
        raise Misuse(f"digests is a {type(digests).__name__}: give a list of digests, each {DIGEST_BYTES} bytes")
    if set(map(type, digests)) <= {bytes} and set(map(len, digests)) <= {DIGEST_BYTES}:  # a tenth of the loop's time
        return join_digests(digests)
    for i, digest in enumerate(digests):
        if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
            raise Misuse(f"digests[{i}] is {digest!r:.80}: a digest is {DIGEST_BYTES} bytes")
    return join_digests(digests)


def _object(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ProtocolError("the server's answer is no object")
    return found


@attrs.frozen
class Storing:
    """A store in progress. Its body fills *slots*, each writable bytes, by the position of its chunk in *digests*.

    Chunks that are missing from *slots* were dropped; *dropped* counts them by reason.
    """

    slots: dict[int, memoryview]
    dropped: dict[str, int]


class Client(Conversation):
    """One connection. Made by `open_client`; every async method raises `Unavailable` once the server is gone."""

    def __init__(self, connection: Connection, welcome: Welcome, arena: ArenaMap | None = None) -> None:
        super().__init__(connection)
        self.boot = welcome.boot
        self.chunk_tokens = welcome.chunk_tokens
        """Of its engine's chunks."""
        self.arena_size = welcome.arena_size
        self.taken = welcome.taken
        self.arena_note = welcome.arena_note
        """Why a worker has no `arena`."""
        self.arena = arena
        self.identity = b""
        """The digest of its model that this scheduler sent last."""
        self.namespace = b""
        self.layout = b""
        """The name of the engine's layout, as the server said last. It stays while a shard is missing."""
        self.chunk_bytes = self.arena_bytes = 0
        """The bytes of a chunk of the namespace over all shards (0: not known), and those that the arena holds."""
        self.shard_bytes = 0
        """The length that `register` sent last. The length of a slot comes from the server."""
        self.on_push: Callable[[Message], None] = lambda message: None
        """Called in the Trio thread with each push, except answers to a `lookup` of this client."""
        self._arena_grown = trio.Event()

    # --- everyone ---------------------------------------------------------------------------------------------------

    async def ping(self) -> bytes:
        """The server's boot id."""
        return (await self.request(Ping(self.new_id()), Pong)).boot

    async def statistics(self) -> dict[str, Any]:
        """The server's figures: a table with the keys `server`, `faults`, `held`, `counted`, `rates` and `tiers`, as
        `status --json` prints it.

        A server of another release may have more keys or fewer.
        """
        return _object((await self.request(Statistics(self.new_id()), StatisticsReply)).json)

    async def explain(self, request: str = "") -> list[dict[str, Any]]:
        """The latest lookups of *request* that missed, the latest first, as `explain --json` prints them; empty: of any
        request. For an observer.
        """
        found = _object((await self.request(message_of(Explain, self.new_id(), request), Explained)).json)
        if not isinstance(found.get("requests"), list):
            raise ProtocolError("the server's answer has no list of requests")
        return list(found["requests"])

    async def wait_closed(self) -> None:
        """Return when the connection is lost: by notification."""
        await self._connection.wait_closed()

    # --- an observer ------------------------------------------------------------------------------------------------

    async def inventory(self) -> dict[str, Any]:
        """The server's engines, and what memory holds of each layout: a table with the keys `engines`, `layouts` and
        `left_out`, as `ls --json` prints it.
        """
        return _object((await self.request(Inventory(self.new_id()), InventoryReply)).json)

    async def clear(self, *, namespace: str = "", model: str = "") -> Cleared:
        """Evict the chunks that nobody uses, and delete them from all tiers: of the layouts whose name in hexadecimal
        begins with *namespace*, and whose model is *model*; empty: any.

        `Misuse`: this process runs neither as the server's user nor as root. `Unavailable`: a tier could not delete
        them yet; it will before it is used again.
        """
        return await self.request(message_of(Clear, self.new_id(), namespace, model), Cleared)

    async def set_log_level(self, level: str) -> None:
        """The server logs from *level* on: debug, info, warning or error. `Misuse` as of `clear`."""
        await self.request(message_of(LogLevel, self.new_id(), level), Ack)

    # --- a scheduler ------------------------------------------------------------------------------------------------

    async def lookup(
        self,
        session: int,
        digests: Sequence[bytes],
        *,
        start: int = 0,
        upto: int | None = None,
        budget: float | None = None,
        request: str = "",
    ) -> Answer:
        """How many of the session's first *upto* chunks (default: all) may be read under a lease, definitively.

        *digests* are those from *start* on. Tiers may take *budget* seconds, but not longer than the server's own
        setting allows. *request*: the engine's name of a new session, for people. A cancelled lookup is released.
        """
        asked = self.new_id()
        known = trio.Event()
        found: list[Reply] = []

        def answered(reply: Reply) -> None:
            found.append(reply)
            known.set()

        if budget is not None and not (isinstance(budget, int | float) and 0 <= budget < math.inf):
            raise Misuse(f"budget is {budget!r}: it must be a number of seconds, 0 or more")
        if not isinstance(start, int):
            raise Misuse(f"start is {start!r}: it must be a number of chunks")
        budget_ms = -1 if budget is None else round(budget * 1000)
        packed = _packed(digests)
        end = start + len(digests) if upto is None else upto
        ask = message_of(Lookup, asked, session, start, packed, end, budget_ms, request)
        self._answers[asked] = answered
        try:
            answer = await self.request(ask, Answer)
            if answer.state is AnswerState.PENDING:
                await known.wait()
                answer = expect(found[0], Answer)
        except trio.Cancelled:
            self.release(session)
            raise
        finally:
            self._answers.pop(asked, None)
        return answer

    async def lookup_status(self, session: int) -> Answer:
        """The state of the session's lookup: pending, answered, or unknown."""
        return await self.request(message_of(LookupStatus, self.new_id(), session), Answer)

    def taken_notice(self, session: int, lease: bytes) -> None:
        """Blocks were allocated for the chunks of *lease*."""
        self.notice_nowait(message_of(Taken, session, lease))

    def release(self, session: int) -> None:
        """The session's lookup is not wanted any more."""
        self.notice_nowait(message_of(Release, session))

    def end(self, session: int) -> None:
        """The session goes, with everything it owned."""
        self.notice_nowait(message_of(Ended, session))

    async def identify(self, identity: bytes) -> None:
        """The scheduler's model has this identity (32 bytes at most) from now on, and its engine another namespace."""
        ask = message_of(Identify, self.new_id(), identity)
        self.identity = identity
        await self.request(ask, Ack)

    async def reset(self) -> None:
        """Drop the chunks of the engine's namespace, also while a shard is missing. Returns once the server can serve
        none of them.
        """
        await self.request(Reset(self.new_id(), self.identity, self.layout), Ack)

    # --- a worker ---------------------------------------------------------------------------------------------------

    async def register(
        self,
        fingerprint: bytes,
        shard_bytes: int,
        block_tokens: int,
        *,
        attaching: bool = False,
        part_bytes: Sequence[int] = (),
    ) -> bytes:
        """Register the layout of this shard. With *attaching* it counts only once its memory is attached.

        *shard_bytes* are those of one chunk. *part_bytes*: those of its part in each KV group, *shard_bytes* in all; an
        engine that names no groups leaves it out.

        Returns the engine's namespace, or b"" while other shards are missing.
        """
        ask = message_of(Register, self.new_id(), fingerprint, shard_bytes, block_tokens, attaching, part_bytes)
        self.shard_bytes = shard_bytes
        reply = await self.request(ask, NamespaceKnown)
        self.namespace = reply.namespace or self.namespace
        self.chunk_bytes, self.arena_bytes = reply.chunk_bytes, reply.arena_bytes
        return reply.namespace

    async def retrieve(self, lease: bytes, start: int, count: int, *, group: int = 0) -> Pinned:
        """Pin the parts in *group* of *count* chunks of *lease*, from chunk *start* on. Cancelled, it ends the pin."""
        ask = message_of(Retrieve, self.new_id(), lease, start, count, group)
        return await self.request(ask, Pinned, lambda late: self.done_nowait(late.pin))

    async def done(self, pin: bytes) -> bool:
        """The read has ended. Are the bytes that were read still valid?"""
        return (await self.request(message_of(Done, self.new_id(), pin), Finished)).valid

    def done_nowait(self, pin: bytes) -> None:
        """The read has ended, and it does not matter whether it was valid."""
        self.request_unheard(message_of(Done, self.new_id(), pin))

    async def reserve(self, session: int, parent: bytes, digests: Sequence[bytes], *, group: int = 0) -> Reserved:
        """Slots for the parts in *group* of some of *digests*, `MAX_RESERVED` at most. Cancelled, it aborts the
        reservation.
        """
        packed = _packed(digests)
        if len(digests) > MAX_RESERVED:
            raise Misuse(f"{len(digests)} digests: reserve {MAX_RESERVED} at a time, each lot behind the one before")
        if parent:
            _packed([parent])
        return await self.request(
            message_of(Reserve, self.new_id(), session, parent, packed, group),
            Reserved,
            lambda late: self.abort_nowait(late.reservation),
        )

    async def commit(self, reservation: bytes) -> Committed:
        """All bytes are written. Returns how many chunks were published, and how many kept: 0 after a refusal."""
        return await self.request(message_of(Commit, self.new_id(), reservation), Committed)

    async def abort(self, reservation: bytes) -> None:
        """The copy has ended and is to be forgotten."""
        await self.request(message_of(Abort, self.new_id(), reservation), Ack)

    def abort_nowait(self, reservation: bytes) -> None:
        """As `abort`, without waiting: may be called while being cancelled."""
        if reservation:
            self.request_unheard(message_of(Abort, self.new_id(), reservation))

    async def copies_ended(self, token: bytes) -> None:
        """After a reconnect: no copy of the old connection is running any more."""
        await self.request(message_of(CopiesEnded, self.new_id(), token), Ack)

    @asynccontextmanager
    async def storing(
        self, session: int, parent: bytes, digests: Sequence[bytes], *, group: int = 0
    ) -> AsyncIterator[Storing]:
        """Slots for parts in *group*, which the body fills. They are committed at its end, and aborted if it raises.

        The body must not end before its copies: await a copy in a thread (`threads.offload` does), and use no view
        after the body. `register` comes first. `Unavailable`: no arena is mapped.
        """
        _packed(digests)
        slots: dict[int, memoryview] = {}
        dropped: Counter[str] = Counter()
        async with AsyncExitStack() as stack:
            for start in range(0, len(digests), MAX_RESERVED):
                lot = digests[start : start + MAX_RESERVED]
                part = await stack.enter_async_context(self._storing_lot(session, parent, lot, group))
                slots |= {start + position: slot for position, slot in part.slots.items()}
                dropped.update(part.dropped)
                parent = lot[-1]
            yield Storing(slots, dict(dropped))

    @asynccontextmanager
    async def _storing_lot(
        self, session: int, parent: bytes, digests: Sequence[bytes], group: int
    ) -> AsyncIterator[Storing]:
        """`storing` of no more chunks than one message can ask for."""
        self._mapped()
        reserved = await self.reserve(session, parent, digests, group=group)
        try:
            slots = dict(zip(POSITIONS.unpack(reserved.positions), self.slots(reserved), strict=True))
            yield Storing(slots, dict(reserved.dropped))
        except BaseException:
            self.abort_nowait(reserved.reservation)
            raise
        if reserved.reservation:
            await self.commit(reserved.reservation)

    @asynccontextmanager
    async def retrieving(
        self, lease: bytes, start: int, count: int, *, group: int = 0
    ) -> AsyncIterator[list[memoryview]]:
        """The bytes of parts in *group*, for the body to read. `Gone` at its end: what it read must not be used."""
        self._mapped()
        pinned = await self.retrieve(lease, start, count, group=group)
        try:
            yield self.slots(pinned)
        except BaseException:
            self.done_nowait(pinned.pin)
            raise
        if not await self.done(pinned.pin):
            raise Gone("what was read is not valid any more: treat it as a miss")

    def slots(self, named: Reserved | Pinned) -> list[memoryview]:
        """The slots that *named* names, in its order, each as long as the server said. Any thread may call this.

        `Unavailable`: there is no arena. `ProtocolError`: a slot lies outside of it.
        """
        return self._mapped().slots(named)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _mapped(self) -> ArenaMap:
        if self.arena is None:
            raise Unavailable(self.arena_note or "this client has no arena: open it with role=Role.WORKER")
        if not self.shard_bytes:
            raise Misuse("register the layout before storing or retrieving")
        return self.arena

    def said(self, message: Message) -> None:
        if isinstance(message, NamespaceKnown):
            self.namespace = message.namespace
            self.layout = message.layout or self.layout
            self.chunk_bytes, self.arena_bytes = message.chunk_bytes, message.arena_bytes
        elif isinstance(message, ArenaGrown):
            self.taken = max(self.taken, message.taken)
            self._arena_grown.set()
        self.on_push(message)

    async def _populate(self, arena: ArenaMap) -> None:
        while True:
            self._arena_grown = trio.Event()
            await arena.populate(self.taken)
            await self._arena_grown.wait()


@asynccontextmanager
async def serve_connection(
    connection: Connection, welcome: Welcome, arena: ArenaMap | None = None
) -> AsyncIterator[Client]:
    """A client over *connection*, which is closed at the end."""
    client = Client(connection, welcome, arena)
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read)
            nursery.start_soon(client.write)
            if arena is not None:
                nursery.start_soon(client._populate, arena)
            try:
                yield client
            except BaseException as exc:  # noqa: BLE001
                failure = exc  # past the nursery, which would wrap it in a group
            connection.close()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if failure is None or group.split(trio.Cancelled)[1] is not None:
            raise
    if failure is not None:
        raise failure


async def _take_up(address: str, trusted: Collection[int]) -> Connection:
    """The connection at the *address* of a WELCOME, while it stands: NNG by itself goes on dialling for ever."""
    with trio.move_on_after(TAKE_UP):
        return await dial_pair(address, trusted=trusted)
    raise Unavailable(f"the server went away, or did not open {address} within {TAKE_UP:g} s")


def places_of(address: str) -> tuple[str, ...]:
    """Where the server at *address* may listen: beside a default address there are others (`default_addresses`)."""
    defaults = default_addresses()
    return defaults if address == defaults[0] else (address,)


async def wait_server(address: str) -> None:
    """Wait until a server listens at one of the `places_of` *address*."""

    async def wait(place: str, found: trio.CancelScope) -> None:
        await wait_listening(place)
        found.cancel()

    places = places_of(address)
    if len(places) == 1:
        return await wait_listening(address)
    async with trio.open_nursery() as nursery:
        for place in places:
            nursery.start_soon(wait, place, nursery.cancel_scope)


async def _introduce(address: str, hello: bytes, trusted: Collection[int], descriptors: list[int]) -> tuple[str, bytes]:
    """The address at which a server answered, and its answer."""
    failed: list[Unavailable] = []
    for place in places_of(address):
        try:
            return place, await introduce(place, hello, trusted=trusted, descriptors=descriptors)
        except Unavailable as exc:
            failed.append(exc)
    if len(failed) == 1:
        raise failed[0]
    kind = NotToBeUsed if any(isinstance(exc, NotToBeUsed) for exc in failed) else Unavailable
    raise kind("; ".join(map(str, failed))) from failed[0]


@asynccontextmanager
async def connect(address: str, hello: Hello, server_uids: Collection[int] | None = None) -> AsyncIterator[Client]:
    """As `open_client`, with a *hello* of the caller's. A token that the server saw before means a reconnect."""
    if not isinstance(address, str):
        raise Misuse(f"address is {address!r}: it must be a str, as unix:///run/lmcache-trio.sock")
    if hello.role is not Role.OBSERVER and isinstance(parse_address(address), TcpAddress):
        raise ConfigError(
            "address",
            f"a {hello.role.name.lower()} cannot use {address}: tcp:// carries no descriptors, so the arena "
            "could not come along; use a unix:// address, at which observers are served too",
        )
    trusted = load_client_config().server_uids if server_uids is None else server_uids
    descriptors: list[int] = []
    try:
        try:
            address, frame = await _introduce(address, encode(hello), trusted, descriptors)
            reply = check_welcome(frame, hello)
        except Gone as exc:
            raise Unavailable(f"the server at {address} went away") from exc
        except ProtocolError as exc:
            raise ProtocolError(f"cannot speak with the server at {address}: {exc}") from exc
        if isinstance(reply, Refused):
            raise error_of(reply.kind, f"the server at {address} refused: {reply.reason}")
        arena = None
        if hello.role is Role.WORKER and reply.arena_size:
            if len(descriptors) == 1:
                try:
                    arena = ArenaMap(descriptors[0], reply.arena_size)
                except Unavailable as exc:
                    reply = attrs.evolve(reply, arena_note=str(exc)[:500])
            else:
                note = "the arena did not come along: this process has no descriptor left (`ulimit -n`)"
                reply = attrs.evolve(reply, arena_note=note)
    finally:
        for fd in descriptors:
            os.close(fd)
    connection = await _take_up(reply.address, trusted)
    try:
        async with serve_connection(connection, reply, arena) as client:
            client.identity = hello.identity
            yield client
    finally:
        connection.close()


@asynccontextmanager
async def open_client(  # noqa: PLR0913  (keywords, each a word of the HELLO)
    address: str,
    *,
    role: Role = Role.OBSERVER,
    engine: str = "",
    shard: int = 0,
    shards: int = 1,
    name: str = "",
    identity: bytes = b"",
    block_tokens: int = 0,
    chunk_tokens: int = 0,
    groups: Sequence[Group] = (),
    token_bytes: int = 0,
    model: str = "",
    server_uids: Collection[int] | None = None,
) -> AsyncIterator[Client]:
    """Connect to the server at *address*. A worker also gets the arena mapped, in `Client.arena`.

    *identity* (32 bytes at most) is a scheduler's digest of its model: engines of other models have other namespaces.
    *block_tokens* are those of the engine's blocks, *chunk_tokens* those of its chunks, a multiple of them. With
    neither (0), the engine's chunks have as many as the server's setting says. *groups*: the engine's KV groups, unless
    it is one of which a hit needs all. *token_bytes*: the bytes that one worker keeps per token, from which the server
    chooses a length; 0: not known. All clients of an engine say the same. *model*: the name of a scheduler's model.
    The server must run as this process' uid, as root, or as one of *server_uids*, by default those that the setting
    `client.server_uids` names.
    `Unavailable`: no server listens there, or one of an uid that is not trusted, or this process may not connect.
    `Misuse`: the server refuses such a client, and says why; or it listens under another scheme; or the scheme is tcp,
    and the role is not observer. `ProtocolError`: the server is of another release, or another kind of program.
    """
    who = name or f"pid {os.getpid()}"
    said = (role, engine, shard, shards, identity, block_tokens, chunk_tokens, groups)
    hello = message_of(Hello, PROTOCOL_VERSION, who, os.urandom(16), *said, token_bytes=token_bytes, model=model)
    async with connect(address, hello, server_uids) as client:
        yield client
