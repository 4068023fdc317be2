"""A server with a disk: what an engine stored is found again by a server that was started anew."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache_trio._transport.conversation import Reply
from lmcache_trio._wire.messages import Lookup
from lmcache_trio.adapters import SchedulerAdapter
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, same_blocks, wait_until
from lmcache_trio.threads import Handoff

TOKENS = list(range(4 * CHUNK))
BLOCKS = list(range(16))
OTHERS = list(range(32, 48))


@pytest.fixture
def disk_server(tmp_path: Path) -> ServerProcess:
    settings = ("tiers.0.backend=disk", f"tiers.0.path={tmp_path}/disk", "tiers.0.size=64MiB")
    return ServerProcess(f"unix://{tmp_path}/s.ipc", *settings, "grace=5.0", "memory.size=16MiB")


def written(server: ServerProcess, chunks: int) -> bool:
    (tier,) = server.statistics()["tiers"]
    return bool(tier["stores"] == chunks)


@pytest.mark.parametrize("end", ["end", "kill"])
def test_what_was_stored_is_a_hit_after_a_restart_byte_for_byte(
    disk_server: ServerProcess, sides: Callable[..., Side], end: str
) -> None:
    disk_server.start()
    try:
        disk_server.wait_tier()
        kv = make_kv(7)
        one = sides(disk_server.address, kv)
        one.store("stored", TOKENS, BLOCKS)
        if end == "kill":
            wait_until(lambda: written(disk_server, 4))
        one.close()
        getattr(disk_server, end)()
        disk_server.start()
        disk_server.wait_tier()
        two = sides(disk_server.address, make_kv())
        assert two.lookup("again", TOKENS) == 4 * CHUNK
        assert two.scheduler.loaded_tokens("again") == 4 * CHUNK
        assert two.load("again", 4 * CHUNK, OTHERS) == set()
        assert same_blocks(kv, BLOCKS, two.kv, OTHERS)
        two.scheduler.end_session("again")
        assert two.scheduler.loaded_tokens("again") == 0
        assert two.lookup("in memory", TOKENS) == 4 * CHUNK
        assert two.scheduler.loaded_tokens("in memory") == 0
        two.scheduler.end_session("in memory")
        names = ("leases", "holds", "prefetches", "pins", "sessions", "chunks_writing", "reservations")
        wait_until(lambda: not any(disk_server.held[name] for name in names))
        (tier,) = disk_server.statistics()["tiers"]
        assert (tier["loads"], tier["loads_held"], tier["bytes_in_flight"]) == (4, 0, 0)
    finally:
        disk_server.kill()


def test_an_answer_that_a_tier_gave_before_the_host_noted_its_question_is_taken(
    disk_server: ServerProcess, sides: Callable[..., Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop hears it in its own thread, however late the host's thread is with what it does behind the send."""
    disk_server.start()
    try:
        disk_server.wait_tier()
        sides(disk_server.address, make_kv(7)).store("stored", TOKENS, BLOCKS)
        wait_until(lambda: written(disk_server, 4))
        disk_server.end()
        disk_server.start()
        disk_server.wait_tier()
        two = sides(disk_server.address, make_kv(), scheduler=SchedulerAdapter, lookup_timeout=20.0)
        wait_until(two.scheduler.is_healthy)  # before the worker's memory is attached, the answer is 0 at once
        client = two.scheduler._link.client
        assert client is not None
        ask = client.request_nowait
        heard: Handoff[bool] = Handoff()

        def ask_and_wait(message: Lookup, on_reply: Callable[[Reply], None]) -> None:
            def hear(reply: Reply) -> None:
                heard.set(True)
                on_reply(reply)

            ask(message, hear)
            assert heard.wait(60)  # that the tiers are asked
            assert not Handoff[bool]().wait(0.2)  # so that the loop has taken their answer, unless it waits for us

        monkeypatch.setattr(client, "request_nowait", ask_and_wait)
        assert two.lookup("again", TOKENS) == 4 * CHUNK
    finally:
        disk_server.kill()
