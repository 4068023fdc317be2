"""A server with a disk: what an engine stored is found again by a server that was started anew."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, same_blocks, wait_until

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
        assert two.load("again", 4 * CHUNK, OTHERS) == set()
        assert same_blocks(kv, BLOCKS, two.kv, OTHERS)
        two.scheduler.end_session("again")
        names = ("leases", "holds", "prefetches", "pins", "sessions", "chunks_writing", "reservations")
        wait_until(lambda: not any(disk_server.held[name] for name in names))
        (tier,) = disk_server.statistics()["tiers"]
        assert (tier["loads"], tier["loads_held"], tier["bytes_in_flight"]) == (4, 0, 0)
    finally:
        disk_server.kill()
