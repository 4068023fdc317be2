"""Who may come in: versions, roles, engines, tokens."""

import secrets
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from support.server import Opener, Refusal, Rig

from lmcache_trio._transport import dial_pair, introduce
from lmcache_trio._wire.codec import decode, encode
from lmcache_trio._wire.messages import PROTOCOL_VERSION, ErrorKind, Hello, Ping, Pong, Refused, Role, Welcome


async def _say(rig: Rig, **changes: Any) -> Any:
    hello = Hello(PROTOCOL_VERSION, "test", secrets.token_bytes(16), Role.WORKER, "engine")
    return decode(await introduce(rig.server.address, encode(attrs.evolve(hello, **changes))))


async def test_a_welcome_names_the_boot_the_chunk_the_arena_and_an_address_of_ones_own(rig: Rig) -> None:
    one, other = await rig.scheduler("a"), await rig.scheduler("b")
    assert one.welcome.boot == other.welcome.boot == rig.server.boot
    assert len(rig.server.boot) == 16
    assert one.welcome.chunk_tokens == 128
    assert (one.welcome.arena_size, one.welcome.arena_note) == (0, "only a client with role=Role.WORKER gets the arena")
    worker = await rig.worker("a")
    assert (worker.welcome.arena_size, worker.welcome.arena_note) == (rig.memory.size, "")
    assert one.welcome.address != other.welcome.address
    assert await one.get(Pong, Ping) == Pong(1, rig.server.boot)


@pytest.mark.parametrize(
    ("block_tokens", "asked", "granted"),
    [
        *(
            (block, 0, chunk)
            for block, chunk in ((0, 128), (1, 128), (16, 128), (48, 144), (64, 128), (384, 384), (544, 544))
        ),
        *((16, 16, 16), (16, 256, 256), (0, 100, 100), (1152, 2304, 2304)),
    ],
)
async def test_an_engine_gets_the_chunks_that_it_asks_for_or_the_fewest_whole_blocks_that_reach_the_setting(
    rig: Rig, block_tokens: int, asked: int, granted: int
) -> None:
    welcome = await _say(rig, block_tokens=block_tokens, chunk_tokens=asked)
    assert isinstance(welcome, Welcome)
    assert welcome.chunk_tokens == granted


@pytest.mark.parametrize(
    ("setting", "token_bytes", "granted"),
    [("auto", 0, 144), ("auto", 128 << 10, 96), ("auto", 1, 240), (100, 128 << 10, 144), (100, 0, 144)],
)
async def test_the_setting_is_the_rule_by_the_bytes_of_a_token_or_a_number_whatever_they_are(
    rigs: Opener, setting: Any, token_bytes: int, granted: int
) -> None:
    async with rigs(chunk_tokens=setting) as rig:
        scheduler = await _say(rig, role=Role.SCHEDULER, block_tokens=48, token_bytes=token_bytes)
        worker = await _say(rig, shard=0, block_tokens=48)
        asked = await _say(rig, engine="another", block_tokens=48, chunk_tokens=96, token_bytes=token_bytes)
        assert [each.chunk_tokens for each in (scheduler, worker, asked)] == [granted, granted, 96]


async def test_all_clients_of_an_engine_have_the_chunks_of_its_first(rig: Rig) -> None:
    first = await _say(rig, role=Role.SCHEDULER, block_tokens=16, chunk_tokens=64)
    assert first.chunk_tokens == 64
    assert (await _say(rig, shard=0, block_tokens=16)).chunk_tokens == 64
    other = await _say(rig, engine="another", block_tokens=16)
    assert other.chunk_tokens == 128


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_tokens": 16, "chunk_tokens": 256}, "asks for chunks of 256 tokens of blocks of 16 tokens"),
        ({"block_tokens": 48}, "asks for any chunks of blocks of 48 tokens"),
        ({"block_tokens": 48, "chunk_tokens": 100}, "is not a multiple"),
    ],
)
async def test_a_client_that_cannot_use_the_chunks_of_its_engine_is_refused(
    rig: Rig, changes: dict[str, int], words: str
) -> None:
    await rig.scheduler("engine")
    reply = await _say(rig, **changes)
    assert isinstance(reply, Refused)
    assert reply.kind is ErrorKind.MISUSE
    assert words in reply.reason


async def test_two_runs_of_a_server_have_two_boot_ids(rigs: Opener) -> None:
    boots = set()
    for _ in range(2):
        async with rigs() as rig:
            boots.add(rig.server.boot)
    assert len(boots) == 2


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"version": 1}, ErrorKind.PROTOCOL, f"version {PROTOCOL_VERSION} of the protocol, the client 1"),
        ({"token": b"short"}, ErrorKind.PROTOCOL, "16 random ones"),
        ({"engine": ""}, ErrorKind.MISUSE, "engine id is empty"),
        ({"shard": 2, "shards": 2}, ErrorKind.MISUSE, "count from 0"),
    ],
)
async def test_a_hello_out_of_order_is_refused_with_the_reason(
    rig: Rig, changes: dict[str, Any], kind: ErrorKind, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    reply = await _say(rig, **changes)
    assert isinstance(reply, Refused)
    assert reply.kind is kind
    assert words in reply.reason
    assert rig.held("welcomes", "engines") == {"welcomes": 0, "engines": 0}
    (told,) = caplog.messages
    assert "was refused: " in told
    assert words in told


async def test_bytes_that_are_no_hello_are_refused_and_the_next_client_is_welcome(rig: Rig) -> None:
    for frame in (
        b"",
        b"\xff" * 40,
        encode(Ping(3)),
        encode(Hello(PROTOCOL_VERSION, "x", b"t" * 16, Role.WORKER, "e"))[:-3],
    ):
        reply = decode(await introduce(rig.server.address, frame))
        assert isinstance(reply, Refused)
        assert reply.kind is ErrorKind.PROTOCOL
    assert (await rig.observer()).welcome.boot == rig.server.boot


async def test_a_second_live_scheduler_or_worker_of_a_shard_is_refused_by_name(rig: Rig) -> None:
    await rig.scheduler(shards=2)
    await rig.worker(shard=0, shards=2)
    await rig.worker(shard=1, shards=2)
    with pytest.raises(Refusal, match="'engine' has a scheduler already"):
        await rig.scheduler(shards=2)
    with pytest.raises(Refusal, match="'engine' has a worker of shard 1 already"):
        await rig.worker(shard=1, shards=2)
    assert rig.held("connections")["connections"] == 3


async def test_clients_that_disagree_on_the_number_of_shards_are_refused(rig: Rig) -> None:
    await rig.scheduler(shards=2)
    with pytest.raises(Refusal, match="has 2 shards for the clients that are here, but 4"):
        await rig.worker(shard=3, shards=4)


async def test_replicas_of_a_shard_are_clients_of_their_own_and_all_must_agree_on_how_many(rig: Rig) -> None:
    await rig.worker(shard=0, shards=1, replica=0, replicas=2)
    await rig.worker(shard=0, shards=1, replica=1, replicas=2)
    with pytest.raises(Refusal, match="a worker of shard 0, replica 1, already"):
        await rig.worker(shard=0, shards=1, replica=1, replicas=2)
    with pytest.raises(Refusal, match="has 1 shards of 2 replicas for the clients that are here, but 2 shards for"):
        await rig.scheduler(shards=2)
    with pytest.raises(Refusal, match="replica 2 of 2 does not exist"):
        await rig.worker(shard=0, shards=1, replica=2, replicas=2)
    with pytest.raises(Refusal, match="more than 4096 workers"):
        await rig.worker(shard=0, shards=4096, replica=0, replicas=2)


async def test_the_same_token_replaces_the_old_connection(rig: Rig) -> None:
    old = await rig.worker()
    new = await rig.worker(token=old.token)
    assert await old.gone() == []
    await new.get(Pong, Ping)
    await rig.until(connections=1)


async def test_a_place_is_free_again_once_its_client_has_gone(rig: Rig) -> None:
    old = await rig.scheduler()
    old.connection.close()
    await rig.until(connections=0, engines=0)
    await (await rig.scheduler(shards=3)).get(Pong, Ping)


async def test_a_welcome_that_is_not_taken_up_in_five_seconds_is_withdrawn(
    rig: Rig, autojump_clock: trio.testing.MockClock
) -> None:
    welcome = await _say(rig)
    assert isinstance(welcome, Welcome)
    assert rig.held("welcomes", "engines") == {"welcomes": 1, "engines": 1}
    await trio.sleep(4.9)
    assert rig.held("welcomes") == {"welcomes": 1}
    await trio.sleep(0.2)
    assert rig.held("welcomes", "engines") == {"welcomes": 0, "engines": 0}
    with pytest.raises(Exception, match="listen"):
        await dial_pair(welcome.address)


async def test_a_client_whose_process_cannot_be_seen_gets_no_arena_and_the_reason(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.pidfd_open", _not_here)
    worker = await rig.worker()
    assert worker.welcome.arena_size == 0
    assert "pid namespace" in worker.welcome.arena_note
    with pytest.raises(AssertionError, match="got no arena"):
        await worker.register()


def _not_here(pid: int, flags: int = 0) -> int:
    raise ProcessLookupError


async def test_a_connection_taken_up_by_another_process_is_ended(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmcache_trio._transport.memory import MemoryConnection

    monkeypatch.setattr(MemoryConnection, "peer_pid", property(lambda self: 1))
    worker = await rig.worker()
    assert await worker.gone() == []
    assert rig.counted()["refused"] == 1
