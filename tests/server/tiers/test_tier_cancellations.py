"""A lookup that ends after any number of steps of the loop, in any way, leaves the held figures as before it."""

from typing import Any

import pytest
import trio
import trio.testing
from support.server import digests
from support.tiers import LoopTier, World, Worlds

from lmcache_trio._wire.messages import Ended, Lookup, Release, Reset
from lmcache_trio.errors import Unavailable

STEPS = 60
"""More than a prefetch of three chunks takes here; the test checks that."""


@pytest.mark.parametrize("how", ["end", "release", "another lookup", "the connection lost", "reset", "the tier fails"])
@pytest.mark.parametrize("hang", [False, True])
async def test_whenever_and_however_a_prefetch_ends_nothing_is_left(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock, how: str, hang: bool
) -> None:
    async with worlds(tier, size=64 << 20, tier_timeout=60.0) as world:
        before = world.held()
        for step in range(STEPS):
            chain = digests(3, f"prompt {step}")
            tier.fill(world.namespace, chain)
            peer = await world.rig.scheduler("third") if how == "the connection lost" else world.scheduler
            if how == "the connection lost":
                worker = await world.rig.worker("third")
                await worker.register()
            if hang:
                tier.stall("load", hang=True)
            number = 100_000 + step
            await peer.tell(Lookup(number, step, 0, b"".join(chain), 3))
            for _ in range(step):
                await trio.lowlevel.checkpoint()
            await _end(world, tier, peer, step, how)
            tier.go_on()
            await world.settled()
            if how == "the connection lost":
                worker.connection.close()
            elif how != "end":
                await world.scheduler.end(step)
            await world.settled()
            if how == "the tier fails":
                tier.failing.clear()
                await trio.sleep(61)
            assert {**world.held(), "tasks": 0} == {**before, "tasks": 0}, step
        assert world.held()["tasks"] == before["tasks"]
        hits = world.rig.counted()["hits"]
        assert hang or 0 < hits < 3 * STEPS  # some were answered before their end, and some not


async def _end(world: World, tier: LoopTier, peer: Any, session: int, how: str) -> None:
    if how == "end":
        await peer.tell(Ended(session))
    elif how == "release":
        await peer.tell(Release(session))
    elif how == "another lookup":
        await world.ask(session, [bytes(32)], budget_ms=0)
    elif how == "the connection lost":
        peer.connection.close()
    elif how == "reset":
        await world.scheduler.ask(Reset)
    else:
        tier.failing["load"] = Unavailable("injected")
