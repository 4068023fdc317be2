"""What the tests of device transfers share."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.server import say_hello
from support.transfer.rig import CHUNK_TOKENS, Open, PlainMemory, Rig, settled

from lmcache_trio import Config, open_server
from lmcache_trio.testing.fake_device import FakeConfig, FakeDevice


@pytest.fixture
def open_rig() -> Open:
    @asynccontextmanager
    async def opened(device: FakeDevice | None = None, *, gpu: bool = False, **more: Any) -> AsyncIterator[Rig]:
        device = FakeDevice() if device is None else device
        config = Config(address="memory://transfer", chunk_tokens=CHUNK_TOKENS, grace=0.05, **more)
        async with open_server(config, memory=PlainMemory(), device=device) as server:
            rig = Rig(server, device, say_hello, gpu=gpu)
            await rig.start()
            await settled()
            rig.before = rig.held
            yield rig
            device.config = FakeConfig(patient=False)  # what is begun from now on
            rig.end_copies()
        assert device.broken_rules == []

    return opened
