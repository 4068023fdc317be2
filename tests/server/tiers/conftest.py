"""Servers with tiers that live in the test's own loop, under a clock that jumps."""

import pytest
import trio.testing
from support.tiers import LoopTier, Worlds, open_world

from lmcache_trio.errors import Unavailable


@pytest.fixture
def worlds(autojump_clock: trio.testing.MockClock) -> Worlds:
    """Opens servers with tiers: `async with worlds(tier, …, **settings) as world`."""
    return open_world


@pytest.fixture
def tier() -> LoopTier:
    return LoopTier()


@pytest.fixture
def unavailable() -> Exception:
    return Unavailable("injected")
