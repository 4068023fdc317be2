"""What an operator asks of engines, in the log: one joins, cannot be cached and why, leaves."""

import logging

import pytest
from support.server import HeapConfig, Opener, Rig

from lmcache_trio._wire.messages import ErrorReply, Lookup, Register

INFO, WARNING = logging.INFO, logging.WARNING
DIGEST = b"d" * 32


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(INFO, "lmcache_trio.server")


def lines(caplog: pytest.LogCaptureFixture, word: str) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records if word in record.getMessage()]


async def test_an_engine_that_joins_has_one_line_of_its_layout_and_of_its_tokens_in_memory(
    rigs: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigs(HeapConfig(size=10 << 20), chunk_tokens=256) as rig:
        await rig.scheduler("e1", shards=2)
        one, two = await rig.worker("e1", 0, 2), await rig.worker("e1", 1, 2)
        await one.register(b"1" * 32, shard_bytes=512 << 10)
        assert lines(caplog, "joins") == []
        await two.register(b"2" * 32, shard_bytes=512 << 10)
        ((level, line),) = lines(caplog, "joins")
        assert level == INFO
        for words in ("engine 'e1'", "model not named", "in 2 shard(s)", "4 KiB a token", "holds 2560 tokens"):
            assert words in line
        await one.register(b"1" * 32, shard_bytes=512 << 10)  # nothing new
        assert len(lines(caplog, "joins")) == 1


async def test_an_engine_that_leaves_has_a_line_and_one_that_lost_a_shard_has_another(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, worker = await rig.engine("e1")
    worker.connection.close()
    await rig.until(connections=1)
    assert lines(caplog, "no cache until its shards") == [
        (INFO, "engine 'e1' has no cache until its shards [0] are registered")
    ]
    assert lines(caplog, "left") == []
    scheduler.connection.close()
    await rig.until(engines=0)
    assert lines(caplog, "left") == [(INFO, "engine 'e1' left")]


async def test_an_engine_that_asks_before_its_workers_are_registered_is_told_of_once(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """Its workers may have another engine id, or be fewer than it has shards: nothing else would say so."""
    scheduler, _ = await rig.scheduler("e1"), await rig.worker("e1")
    for session in range(3):
        await scheduler.ask(Lookup, session, 0, DIGEST, 1)
    assert lines(caplog, "no cache until its shards") == [
        (INFO, "engine 'e1' has no cache until its shards [0] are registered")
    ]


async def test_an_engine_whose_chunks_are_larger_than_the_memory_is_logged_with_the_setting_to_raise(
    rigs: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    async with rigs(HeapConfig(size=1 << 20)) as rig:
        worker = await rig.worker("e1")
        await worker.register(shard_bytes=2 << 20)
        ((level, line),) = lines(caplog, "cannot be cached")
        assert level == WARNING
        assert ("2 MiB" in line, "1 MiB" in line, "memory.size" in line) == (True, True, True)


async def test_an_engine_whose_layout_is_refused_is_told_of_with_the_reason(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    worker, other = await rig.worker("e1"), await rig.worker("e2")
    await worker.register(b"f" * 32, shard_bytes=4096)
    refused = await other.ask(Register, b"f" * 32, 8192, 16)
    assert isinstance(refused, ErrorReply)
    ((level, line),) = lines(caplog, "cannot be cached")
    assert level == WARNING
    assert refused.message in line
    assert "'e2'" in line
