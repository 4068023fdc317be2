"""A tier out of blocking methods: where they run, and what becomes of their errors. The how-to has a whole one."""

import errno
import os
from collections.abc import Awaitable, Callable

import attrs
import pytest
import trio
import trio.testing

from lmcache_trio.abc import ChunkKey, Load, Record
from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.tier_contract import key_of, load_of, record_of
from lmcache_trio.threads import BlockingTier


@attrs.frozen
class NoConfig:
    """No settings."""


class ScriptedTier(BlockingTier):
    """Each method calls `script`."""

    Config = NoConfig
    script: Callable[[], bool] = staticmethod(lambda: True)

    def start(self) -> None:
        self.script()

    def has(self, key: ChunkKey) -> bool:
        return self.script()

    def read(self, load: Load) -> bool:
        return self.script()

    def write(self, record: Record) -> bool:
        return self.script()

    def forget(self, namespace: bytes) -> None:
        self.script()

    def statistics(self) -> dict[str, int | str]:
        return {"chunks": 0, "bytes_used": 0, "bytes_capacity": 0}


class TwoAtOnce(ScriptedTier):
    threads = 2


def fail() -> bool:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def bug() -> bool:
    raise ZeroDivisionError


async def test_an_os_error_is_unavailable_in_every_call_and_a_bug_stays_one() -> None:
    tier = ScriptedTier(NoConfig())
    key = key_of(1)
    async with tier.open():
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: tier.contains([key]),
            lambda: tier.load([load_of(key)]),
            lambda: tier.store([record_of(key)]),
            lambda: tier.delete(key.namespace),
        ]
        for call in calls:
            tier.script = fail
            with pytest.raises(Unavailable, match="Input/output error"):
                await call()
            tier.script = bug
            with pytest.raises(ZeroDivisionError):
                await call()


async def test_one_that_could_not_start_is_not_open_and_opens_later() -> None:
    tier = ScriptedTier(NoConfig())
    tier.script = fail
    with pytest.raises(Unavailable, match="Input/output error"):
        async with tier.open():
            pass
    with pytest.raises(Unavailable, match="not open"):
        await tier.contains([key_of(1)])
    tier.script = lambda: True
    async with tier.open():
        assert list(await tier.contains([key_of(1)])) == [True]


@pytest.mark.parametrize(("made", "most"), [(ScriptedTier, 1), (TwoAtOnce, 2)])
async def test_as_many_calls_run_as_it_has_threads_and_they_are_no_others(made: type[ScriptedTier], most: int) -> None:
    tier = made(NoConfig())
    blocked, release = os.pipe()
    running = 0

    def hang() -> bool:
        nonlocal running
        running += 1
        return os.read(blocked, 1) == b"."

    async with tier.open():
        tier.script = hang
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(tier.contains, [key_of(1)])
            with trio.fail_after(5):
                while running < most:
                    await trio.to_thread.run_sync(lambda: None)  # the loop's own threads are free
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert running == most
            os.write(release, b"...")
    os.close(blocked)
    os.close(release)
