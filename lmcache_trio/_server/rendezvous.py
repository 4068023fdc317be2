"""The front door: who may come in, as what, and what they are told. It decides; `supervise` starts what follows.

HELLO --in order--> WELCOME, and a place in the state that others see as taken
      `-otherwise-> REFUSED, with one sentence of why and what to do
"""

import logging
import os
import secrets
from collections.abc import Iterator

import attrs

from lmcache_trio._server.state import Client, Engine, State
from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import PROTOCOL_VERSION, Hello, Refused, Role, Welcome
from lmcache_trio._wire.protocol import check_hello, kind_of
from lmcache_trio.errors import Misuse, ProtocolError, Unavailable

__all__ = ["Admission", "dismiss", "new_boot", "receive_hello", "welcome"]

log = logging.getLogger("lmcache_trio.server")

NO_ARENA = (
    "the server cannot see this client's process (another pid namespace, or TCP), so it could not tell when a dead "
    "client's copies have ended; use unix:// or ipc:// in one pid namespace (docker: --pid), share /dev/shm (--ipc)"
)


@attrs.frozen
class Admission:
    """The outcome of a HELLO: a client that was let in, or the frame that refuses it; and whom the client replaces."""

    client: Client | None
    refusal: bytes = b""
    replaced: tuple[Client, ...] = ()


def new_boot() -> bytes:
    """16 random bytes that tell this run of the server from every other."""
    return secrets.token_bytes(16)


def receive_hello(state: State, frame: bytes, peer_pid: int | None) -> Admission:
    """Decide on *frame*, said by the process *peer_pid*. A client that is let in has its place when this returns."""
    pidfd = None
    try:
        hello = check_hello(frame)
        _check(state, hello)
        replaced = tuple(_replaced_by(state, hello, peer_pid))
        pidfd = _open_pidfd(peer_pid)
    except (ProtocolError, Misuse, Unavailable) as exc:
        state.counted["refused"] += 1
        log.warning("a client (pid %s) was refused: %s", peer_pid, exc)
        return Admission(None, encode(Refused(kind_of(exc), str(exc)[:4000])))
    for former in replaced:
        dismiss(state, former)
    return Admission(state.admit(hello, peer_pid, pidfd), replaced=replaced)


def dismiss(state: State, client: Client) -> None:
    """End *client* and all that it owned, now; its connection's task finds its scope cancelled."""
    if state.lose(client) and client.pidfd is not None:
        os.close(client.pidfd)
        client.pidfd = None


def welcome(state: State, client: Client, address: str) -> Welcome:
    """What *client* is told; its own address is *address*."""
    common = Welcome(PROTOCOL_VERSION, address, state.boot, state.config.chunk_tokens)
    if client.hello.role is Role.OBSERVER:
        return attrs.evolve(common, arena_note="an observer gets no arena")
    if client.pidfd is None:
        return attrs.evolve(common, arena_note=NO_ARENA)
    memory = state.memory
    return attrs.evolve(common, arena_path=memory.path, arena_size=memory.size, taken=state.taken, nonce=memory.nonce)


def _check(state: State, hello: Hello) -> None:
    """Misuse if it does not fit to the clients that are here, Unavailable while nobody is let in."""
    if state.stopping:
        raise Unavailable("the server is stopping; connect again when it is back")
    engine = state.engines.get(hello.engine) if hello.role is not Role.OBSERVER else None
    if engine is not None and engine.shards != hello.shards and _others(engine, hello):
        raise Misuse(
            f"engine {hello.engine!r} has {engine.shards} shards for the clients that are here, but {hello.shards} for "
            "this one; all must agree, and two engines must not share an engine id"
        )


def _others(engine: Engine, hello: Hello) -> bool:
    """Clients that live: one whose process was killed may be here a moment longer than its successor needs."""
    return any(client.hello.token != hello.token and not client.has_exited() for client in engine.clients())


def _replaced_by(state: State, hello: Hello, peer_pid: int | None) -> Iterator[Client]:
    """The clients whose place *hello* takes: its own old connection, and dead ones. Misuse if a live one holds it."""
    for client in state.clients.values():
        if client.hello.token == hello.token:
            if client.peer_pid != peer_pid:
                raise Misuse("another process is connected with this client's token; each client must draw its own")
            yield client
    engine = state.engines.get(hello.engine) if hello.role is not Role.OBSERVER else None
    if engine is None:
        return
    holder = engine.scheduler if hello.role is Role.SCHEDULER else engine.workers.get(hello.shard)
    if holder is not None and holder.hello.token != hello.token:
        if not holder.has_exited():
            what = "a scheduler" if hello.role is Role.SCHEDULER else f"a worker of shard {hello.shard}"
            raise Misuse(
                f"engine {hello.engine!r} has {what} already (process {holder.peer_pid}); end that one first, or give "
                "each engine an engine id of its own"
            )
        yield holder
    if engine.shards != hello.shards:
        yield from engine.clients()  # all of them dead, or `_check` had refused


def _open_pidfd(pid: int | None) -> int | None:
    if not pid:
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # not in this pid namespace, or gone already
        return None
