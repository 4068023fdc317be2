"""What an operator may do to a running server: clear what it caches, in memory and tiers, and change its log."""

import logging
from functools import partial
from pathlib import Path

import pytest
from lmcache_trio_backends.disk import DiskTier
from support.live import chain_of, open_live
from support.server import digests, error_of, open_rig

from lmcache_trio import Config, Misuse, Unavailable, open_client, open_server
from lmcache_trio._wire.messages import Ack, Clear, Cleared, ErrorKind, LogLevel
from lmcache_trio.testing.faulty_tier import Fault, FaultyTier


def disk(path: Path) -> DiskTier:
    return DiskTier(DiskTier.Config(path=str(path), size=64 << 20, slab_size=16 << 20))


async def test_clear_drops_a_models_chunks_from_memory_and_tiers_and_leaves_others(tmp_path: Path) -> None:
    async with open_live("memory://clear", disk(tmp_path)) as live, open_client("memory://clear") as operator:
        await live.store(chain_of("a", 8))
        await live.written_back()
        done = await operator.clear(model="another")
        assert (done.layouts, done.chunks) == (0, 0)
        done = await operator.clear()
        assert (done.layouts, done.chunks, done.used) == (1, 8, 0)
        assert done.bytes == 8 * (64 << 10)
        assert await live.hits(chain_of("a", 8)) == 0
        assert live.tier()["backend"]["chunks"] == 0
        assert live.server.statistics()["counted"]["cleared_chunks"] == 8
        assert await live.store(chain_of("a", 8)) == 8
        assert await live.hits(chain_of("a", 8)) == 8


async def test_what_is_leased_stays_until_it_is_released_and_can_be_read(tmp_path: Path) -> None:
    async with open_live("memory://leased") as live, open_client("memory://leased") as operator:
        await live.store(chain_of("a", 8))
        answer = await live.scheduler.lookup(100, chain_of("a", 3))
        done = await operator.clear()
        assert (done.chunks, done.used) == (5, 3)
        async with live.worker.retrieving(answer.lease, 0, 3) as views:  # Gone, if it were not valid
            assert bytes(views[0][:32]) == chain_of("a", 1)[0]
        live.scheduler.end(100)
        await live.scheduler.ping()
        assert (await operator.clear()).chunks == 3


async def test_a_tier_that_cannot_delete_is_told_of(tmp_path: Path) -> None:
    tier = FaultyTier.around(disk(tmp_path), [Fault("error", on="delete", rate=1.0)])
    async with open_live("memory://cannot", tier) as live, open_client("memory://cannot") as operator:
        await live.store(chain_of("a", 8))
        await live.written_back()
        with pytest.raises(Unavailable, match="8 chunks are gone from memory, but a tier"):
            await operator.clear()
        assert await live.hits(chain_of("a", 8), budget=0.1) == 0


async def test_an_observer_clears_and_a_scheduler_may_not() -> None:
    async with open_rig() as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(4))
        observer = await rig.observer()
        assert isinstance(await observer.ask(Clear), Cleared)
        assert error_of(await observer.ask(LogLevel, "loud")).kind is ErrorKind.MISUSE
        assert error_of(await scheduler.ask(Clear)).kind is ErrorKind.MISUSE
        assert rig.counted()["cleared_chunks"] == 4


async def test_a_client_of_another_user_may_look_and_not_steer(tmp_path: Path) -> None:
    async with open_server(Config(address="memory://steer", memory={"backend": "cpu", "size": 1 << 20})) as server:
        async with open_client(server.address) as client:
            (peer,) = server._parts.peers
            peer.is_owner = False  # as its introduction says of another uid
            assert (await client.inventory())["engines"] == []
            for steer in (client.clear, partial(client.set_log_level, "debug")):
                with pytest.raises(Misuse, match="may not steer this server"):
                    await steer()


async def test_a_process_of_this_user_is_an_owner_at_a_unix_address_and_none_is_over_tcp(tmp_path: Path) -> None:
    for address, is_owner in ((f"unix://{tmp_path}/s.sock", True), ("tcp://127.0.0.1:0", False)):
        async with open_server(Config(address=address, memory={"backend": "cpu", "size": 1 << 20})) as server:
            async with open_client(server.address):
                (peer,) = server._parts.peers
                assert peer.is_owner is is_owner


async def test_the_level_of_the_log_changes_while_the_server_runs() -> None:
    logger = logging.getLogger("lmcache_trio")
    former = logger.level
    try:
        async with open_rig() as rig:
            observer = await rig.observer()
            assert isinstance(await observer.ask(LogLevel, "debug"), Ack)
            assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(former)


async def test_an_inventory_of_more_than_a_reply_holds_says_how_many_are_left_out() -> None:
    async with open_rig() as rig:
        for number in range(100):
            await rig.scheduler(f"{number:04}" + "\x00" * 500)  # in JSON each takes 6 bytes
        async with open_client(rig.server.address) as client:
            listed = await client.inventory()
    assert 0 < listed["left_out"]["engines"] < 100
    assert len(listed["engines"]) + listed["left_out"]["engines"] == 100
