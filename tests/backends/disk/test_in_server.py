"""A live server whose disk fails, hangs, or is taken away: fenced, as if it were not there, and used when it works."""

import queue
import shutil
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from lmcache_trio_backends.disk.home import Home
from support.live import OpenLive, WatchedTier, chain_of

from lmcache_trio._server.tiers.tiers import FIRST_OPENING
from lmcache_trio.errors import ConfigError
from lmcache_trio.testing.faulty_tier import Fault

MIB = 1 << 20


def disk(path: Path) -> DiskTier:
    return DiskTier(DiskConfig(path=str(path), size=24 * MIB, slab_size=4 * MIB))


async def on_disk(live: OpenLive, tier: Any, *chains: list[bytes]) -> None:
    """*chains* are on the disk, and a server that is opened now has none of them in memory."""
    async with live(tier) as server:
        for chain in chains:
            assert await server.store(chain) == len(chain)
        await server.written_back()
        assert server.tier()["backend"]["chunks"] == sum(map(len, chains))


async def test_a_directory_that_may_not_be_used_ends_the_start_however_slow_the_machine_is(
    live: OpenLive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index").write_text("the user's")
    slow, go_on, ready, refusals = Home.open, queue.SimpleQueue[None](), trio.Event(), []

    def late(home: Home, *, flush: bool) -> None:
        go_on.get(timeout=60)
        slow(home, flush=flush)

    async def serve() -> None:
        try:
            async with live(disk(tmp_path)):
                ready.set()
        except ConfigError as exc:
            refusals.append(exc)

    monkeypatch.setattr(Home, "open", late)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with trio.move_on_after(FIRST_OPENING + 2):  # by then a server is ready that does not wait for its disk
            await ready.wait()
        go_on.put(None)
    assert [exc.key for exc in refusals] == ["tiers.0.path"]
    assert "files that are not a disk tier's" in refusals[0].problem
    assert not ready.is_set()


@pytest.mark.parametrize("kind", ["error", "no_space"])
async def test_a_disk_that_fails_in_a_load_is_fenced_and_opened_again_and_gives_hits_again(
    live: OpenLive, tmp_path: Path, kind: str
) -> None:
    tier = WatchedTier.around(disk(tmp_path / "kv"))
    await on_disk(live, tier, chain_of("one", 2), chain_of("other", 3))
    async with live(tier) as server:
        await server.store(chain_of("memory", 2))
        tier.stay_shut()
        tier.faults.append(Fault(kind, on="load", rate=1))
        assert await server.hits(chain_of("one", 2)) == 0
        tier.faults.clear()
        assert (server.tier()["fenced"], server.tier()["failures"]) == (True, 1)
        assert "injected" in server.tier()["reason"]
        assert await server.hits(chain_of("memory", 2)) == 2
        assert await server.hits(chain_of("other", 3)) == 0  # nobody asks a tier that is fenced
        assert await server.store(chain_of("meanwhile", 2)) == 2
        await tier.wait_works_again()
        assert not server.tier()["fenced"]
        assert await server.hits(chain_of("other", 3)) == 3
        if kind == "error":  # what stood in the bad sector is gone, and can be stored again
            assert await server.hits(chain_of("one", 2)) == 0
            assert await server.store(chain_of("one", 2)) == 2
        assert await server.hits(chain_of("one", 2)) == 2
        assert server.tier()["bugs"] == 0


@pytest.mark.parametrize("on", ["contains", "store", "load"])
async def test_a_disk_that_hangs_in_a_thread_is_fenced_and_used_again_when_the_call_has_returned(
    live: OpenLive, tmp_path: Path, on: str, mock_clock: trio.testing.MockClock
) -> None:
    mock_clock.rate = 1.0
    tier = WatchedTier.around(disk(tmp_path / "kv"))
    await on_disk(live, tier, chain_of("one", 2))
    async with live(tier, tier_timeout=100.0) as server:
        await server.store(chain_of("memory", 2))
        await server.written_back()
        tier.faults.append(Fault("hang_thread", on=on, rate=1))

        async def ask() -> None:
            assert await server.hits(chain_of("one", 2)) == 0

        async with trio.open_nursery() as asking:
            if on == "store":
                await server.store(chain_of("new", 1))
            else:
                asking.start_soon(ask)
            with trio.fail_after(60):
                await tier.wait_hanging(1)
                mock_clock.jump(100)  # the patience of whoever asks, and the server's with the tier
        with trio.fail_after(60):
            await server.server._parts.tiers.runners[0].calls.watch()  # until it is fenced
        assert "not returned" in server.tier()["reason"]
        assert await server.hits(chain_of("memory", 2)) == 2
        assert await server.hits(chain_of("one", 2)) == 0
        tier.faults.clear()
        tier.release()
        await tier.wait_works_again()
        assert await server.hits(chain_of("one", 2)) == 2
        assert server.tier()["bugs"] == 0


async def test_a_directory_that_is_removed_costs_what_was_in_it_and_is_made_again(
    live: OpenLive, tmp_path: Path
) -> None:
    tier = WatchedTier.around(disk(tmp_path / "kv"))
    await on_disk(live, tier, chain_of("one", 2))
    async with live(tier) as server:
        await server.store(chain_of("memory", 2))
        await server.written_back()
        tier.stay_shut()
        shutil.rmtree(tmp_path / "kv")
        assert await server.hits(chain_of("memory", 2)) == 2
        assert await server.hits(chain_of("one", 2)) == 0
        assert server.tier()["fenced"]
        assert "was removed" in server.tier()["reason"]
        assert await server.hits(chain_of("memory", 2)) == 2
        await tier.wait_works_again()
        assert await server.hits(chain_of("one", 2)) == 0
        assert await server.store(chain_of("one", 2)) == 2
        await server.written_back()
    async with live(tier) as server:
        assert await server.hits(chain_of("one", 2)) == 2


async def test_a_directory_that_cannot_be_made_again_is_named_until_it_can(live: OpenLive, tmp_path: Path) -> None:
    place = tmp_path / "place"
    tier = WatchedTier.around(disk(place / "kv"))
    await on_disk(live, tier, chain_of("one", 2))
    async with live(tier) as server:
        await server.store(chain_of("memory", 2))
        await server.written_back()
        shutil.rmtree(place)
        place.write_bytes(b"in the way")
        assert await server.hits(chain_of("one", 2)) == 0
        assert server.tier()["fenced"]
        runner = server.server._parts.tiers.runners[0]
        with trio.fail_after(60):
            while "can't be used" not in runner.calls.fence.reason:
                await trio.sleep_until(runner.calls.fence.until)
                await trio.testing.wait_all_tasks_blocked(0.05)
        assert str(place) in server.tier()["reason"]
        assert await server.hits(chain_of("memory", 2)) == 2
        place.unlink()
        await tier.wait_works_again()
        assert await server.store(chain_of("one", 2)) == 2
        assert server.tier()["bugs"] == 0


async def test_a_directory_that_is_replaced_under_a_server_fences_it_until_the_right_one_is_back(
    live: OpenLive, tmp_path: Path
) -> None:
    path, away = tmp_path / "kv", tmp_path / "away"
    tier = WatchedTier.around(disk(path))
    await on_disk(live, tier, chain_of("one", 2))
    async with live(tier) as server:
        path.rename(away)
        path.mkdir()
        assert await server.hits(chain_of("one", 2)) == 0
        assert server.tier()["fenced"]
        assert "replaced by another" in server.tier()["reason"]
        assert await server.store(chain_of("other", 2)) == 2
        await server.written_back()
        assert list(path.iterdir()) == []
        path.rmdir()
        away.rename(path)
        await tier.wait_works_again()
        assert await server.hits(chain_of("one", 2)) == 2
        assert (server.tier()["fenced"], server.tier()["bugs"]) == (False, 0)
