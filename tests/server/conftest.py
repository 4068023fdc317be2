"""Servers inside the test's own loop."""

from collections.abc import AsyncIterator

import pytest
from support.server import Opener, Rig, open_rig


@pytest.fixture
def rigs() -> Opener:
    """Opens servers with settings of the test's own."""
    return open_rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with open_rig() as made:
        yield made
