"""The rendezvous: which client is admitted, in which role, and with which reply. `supervise` starts its connection.

HELLO --in order--> WELCOME, and a place among the peers
      `-otherwise-> REFUSED, with the reason and what to do about it
"""

import logging
import os
import resource
import secrets
from collections.abc import Iterator

import attrs

from lmcache_trio._core.groups import EVERY, Group, check_groups, named_groups
from lmcache_trio._core.keys import check_chunk_tokens
from lmcache_trio._server.engine import Engine
from lmcache_trio._server.parts import Parts
from lmcache_trio._server.peer import Peer
from lmcache_trio._transport import Introduction
from lmcache_trio._wire.messages import PROTOCOL_VERSION, Hello, Refused, Role, Welcome
from lmcache_trio._wire.protocol import check_hello, kind_of
from lmcache_trio.config import Config
from lmcache_trio.errors import Misuse, ProtocolError, Unavailable

__all__ = ["new_boot", "receive_hello", "welcome"]

log = logging.getLogger("lmcache_trio.server")

CLIENT_DESCRIPTORS = 4
"""File descriptors that a client takes while it is admitted; 3 later."""
OTHER_DESCRIPTORS = 64
"""Descriptors for all other use: a server has 17 with an empty disk tier, and one more per slab."""
LEAST_CLIENTS = 9
"""Admitted with however few descriptors: a scheduler and 8 workers. No server starts with fewer than 64."""

NO_ARENA = (
    "the server cannot watch this client's process, so it could not tell when a dead client's copies have ended: its "
    "kernel (before Linux 6.5) shows it only processes of its own pid namespace; share that (docker: --pid, "
    "Kubernetes: shareProcessNamespace), or use a newer kernel"
)


def new_boot() -> bytes:
    """16 random bytes that tell this run of the server from every other."""
    return secrets.token_bytes(16)


def receive_hello(parts: Parts, introduction: Introduction) -> Peer | Refused:
    """Decide on the HELLO of a process. A peer that is admitted has its place when this returns."""
    pidfd, peer_pid = introduction.open_pidfd(), introduction.peer_pid
    try:
        if introduction.refusal:
            raise Unavailable(introduction.refusal)
        hello = check_hello(introduction.hello)
        _check_carried(introduction, hello)
        _check(parts, hello)
        replaced = tuple(_replaced_by(parts, hello, peer_pid, pidfd))
        _check_room(parts, len(set(replaced)))
    except (ProtocolError, Misuse, Unavailable) as exc:
        parts.counts.events["refused"] += 1
        log.warning("a client (pid %s) was refused: %s", peer_pid, exc)
        if pidfd is not None:
            os.close(pidfd)
        return Refused(kind_of(exc), str(exc)[:4000])
    for former in replaced:
        parts.peers.dismiss(former)
    return parts.peers.admit(hello, peer_pid, pidfd, is_owner=introduction.is_owner)


def welcome(parts: Parts, peer: Peer, address: str) -> Welcome:
    """The message that admits *peer*, whose own address is *address*."""
    common = Welcome(PROTOCOL_VERSION, address, parts.boot, parts.engines.chunk_tokens_of(peer.hello))
    if peer.hello.role is not Role.WORKER:
        return attrs.evolve(common, arena_note="only a client with role=Role.WORKER gets the arena")
    if peer.pidfd is None:
        return attrs.evolve(common, arena_note=NO_ARENA)
    return attrs.evolve(common, arena_size=parts.memory.size, taken=parts.index.arena.taken)


def _check_carried(introduction: Introduction, hello: Hello) -> None:
    if hello.role is not Role.OBSERVER and not introduction.carries_descriptors:
        raise Misuse(
            f"a {hello.role.name.lower()} cannot connect over tcp://, which carries no descriptors, so the "
            "arena could not come along: have the server listen at a unix:// address, which observers may use too"
        )


def _check(parts: Parts, hello: Hello) -> None:
    """Misuse: *hello* contradicts the connected clients. Unavailable: the server admits no client now."""
    if parts.drain.stopping:
        raise Unavailable("the server is stopping; connect again when it is back")
    if hello.chunk_tokens and hello.block_tokens:
        check_chunk_tokens(hello.chunk_tokens, hello.block_tokens)
    if hello.groups:
        check_groups(hello.groups, hello.block_tokens, hello.chunk_tokens or parts.engines.chunk_tokens_of(hello))
    engine = parts.engines.find(hello)
    if engine is None:
        return
    others = [peer for peer in engine.peers() if peer.hello.token != hello.token and not peer.has_exited()]
    here, said = _difference(engine, hello)
    if here:
        if others:
            raise Misuse(
                f"engine {hello.engine!r} has {here} for the clients that are here, but {said} for this one; all must"
                " agree, and two engines must not share an engine id"
            )
    elif not _chunks_fit(engine, hello):
        if not all(_gives_way(peer, hello) for peer in others):
            chunks = f"chunks of {hello.chunk_tokens} tokens" if hello.chunk_tokens else "any chunks"
            raise Misuse(
                f"engine {hello.engine!r} has chunks of {engine.chunk_tokens} tokens for the clients that are here, and"
                f" this one asks for {chunks} of blocks of {hello.block_tokens or 'any'} tokens; give all clients of an"
                " engine the same block_tokens and chunk_tokens"
            )
    elif hello.role is Role.SCHEDULER:
        parts.engines.check_identity(engine, hello.identity)


def _check_room(parts: Parts, replaced: int) -> None:
    """Unavailable: without the *replaced* clients, there are still as many as may be."""
    most = most_clients(parts.config)
    if most and len(parts.peers) - replaced >= most:
        way = "the server's configuration can raise it"
        if not parts.config.limits.clients:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            way = f"not set, it follows from the server's {soft} file descriptors (ulimit -n, LimitNOFILE=)"
        parts.counts.limits["clients"] += 1
        raise Unavailable(f"{most} clients are connected, and no more are let in: that is limits.clients; {way}")


def most_clients(config: Config) -> int:
    """Clients that may be connected; 0: any number."""
    if config.limits.clients or config.address.startswith("memory://"):
        return config.limits.clients
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 0:  # RLIM_INFINITY is -1
        return 0
    readers = config.http.connections if config.http.address else 0
    return max(LEAST_CLIENTS, (soft - OTHER_DESCRIPTORS - readers) // CLIENT_DESCRIPTORS)


def _difference(engine: Engine, hello: Hello) -> tuple[str, str]:
    """What *engine* has and *hello* says otherwise, of that which all clients of an engine say alike; else ""."""
    if (engine.shards, engine.replicas) != (hello.shards, hello.replicas):
        return _ranks(engine.shards, engine.replicas), _ranks(hello.shards, hello.replicas)
    groups = named_groups(hello.groups)
    return (_words(engine.groups), _words(groups)) if engine.groups != groups else ("", "")


def _words(groups: tuple[Group, ...]) -> str:
    if groups == (EVERY,):
        return "one KV group"
    named = (f"{each.need.name.lower()} of {each.tokens} in blocks of {each.block_tokens}" for each in groups)
    return f"{len(groups)} KV groups ({', '.join(named)} tokens)"


def _ranks(shards: int, replicas: int) -> str:
    return f"{shards} shards" if replicas == 1 else f"{shards} shards of {replicas} replicas"


def _replica(hello: Hello) -> str:
    return "" if hello.replicas == 1 else f", replica {hello.replica},"


def _chunks_fit(engine: Engine, hello: Hello) -> bool:
    """Whether the client that says *hello* can work with the chunks of *engine*."""
    return hello.chunk_tokens in (0, engine.chunk_tokens) and engine.chunk_tokens % (hello.block_tokens or 1) == 0


def _gives_way(peer: Peer, hello: Hello) -> bool:
    """Whether *peer*, a worker that named no length, is dismissed for a scheduler that names one. It comes again."""
    return (
        (hello.role, peer.hello.role) == (Role.SCHEDULER, Role.WORKER)
        and hello.chunk_tokens > 0
        and not peer.hello.chunk_tokens
        and hello.chunk_tokens % (peer.hello.block_tokens or 1) == 0
    )


def _replaced_by(parts: Parts, hello: Hello, peer_pid: int | None, pidfd: int | None) -> Iterator[Peer]:
    """The clients whose place *hello* takes: its own old connection, and dead ones. Misuse: a live client has it."""
    for peer in parts.peers:
        if peer.hello.token == hello.token:
            if not peer.is_process(peer_pid, pidfd):
                raise Misuse("another process is connected with this client's token; each client must draw its own")
            yield peer
    engine = parts.engines.find(hello)
    if engine is None:
        return
    holder = engine.scheduler if hello.role is Role.SCHEDULER else engine.workers.get(hello.rank)
    if holder is not None and holder.hello.token != hello.token:
        if not holder.has_exited():
            what = (
                "a scheduler" if hello.role is Role.SCHEDULER else f"a worker of shard {hello.shard}{_replica(hello)}"
            )
            raise Misuse(
                f"engine {hello.engine!r} has {what} already (process {holder.peer_pid}); end that one first, or give "
                "each engine an engine id of its own"
            )
        yield holder
    if any(_difference(engine, hello)) or not _chunks_fit(engine, hello):
        yield from engine.peers()  # all of them are dead or give way, or `_check` would have refused
