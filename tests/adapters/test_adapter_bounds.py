"""What the host's waits are bounded by, and what the adapters say when there is no cache to be had."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache_trio._transport import arena_map
from lmcache_trio._wire.codec import decode
from lmcache_trio._wire.messages import Lookup, LookupStatus, Message, Release
from lmcache_trio.adapters import WorkerAdapter
from lmcache_trio.client import Client
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, wait_until
from lmcache_trio.threads import Handoff

MakeSide = Callable[..., Side]
TOKENS = list(range(4 * CHUNK))


def test_a_background_thread_that_does_not_turn_gives_zero_by_the_hosts_own_bound(
    live_server: ServerProcess, sides: MakeSide
) -> None:
    side = sides(live_server.address, make_kv(1), lookup_timeout=0.2)
    side.store("r", TOKENS, list(range(16)))
    entered: Handoff[bool] = Handoff()
    stuck: Handoff[bool] = Handoff()

    def hang() -> None:
        entered.set(True)
        stuck.wait(60)

    side.scheduler._link.post(hang)
    assert entered.wait(60)  # an answer that the loop reads before it hangs would be a hit
    try:
        side.scheduler.maybe_submit_lookup_request("q", TOKENS)
        assert side.scheduler.check_lookup_result("q") == 0
    finally:
        stuck.set(True)
    side.scheduler.end_session("q")
    wait_until(lambda: live_server.held["leases"] == 0)


def test_a_silent_server_is_asked_for_the_status_once_and_the_lookup_is_released(
    live_server: ServerProcess, sides: MakeSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = sides(live_server.address, make_kv(1), lookup_timeout=0.3, poll_interval=0.001)
    client = side.scheduler._link.client
    assert client is not None
    sent: list[Message] = []
    send = client._connection.send_nowait

    def counted(frame: bytes) -> None:
        sent.append(decode(frame))
        send(frame)

    monkeypatch.setattr(client._connection, "send_nowait", counted)
    live_server.pause()
    side.scheduler.maybe_submit_lookup_request("q", TOKENS)
    assert side.scheduler.check_lookup_result("q") == 0
    kinds = [type(message) for message in sent]
    assert kinds[0] is Lookup
    assert kinds.count(LookupStatus) == 1  # at most one in flight, though 300 intervals went by
    assert kinds.count(Release) == 1
    live_server.go_on()


def test_a_reset_is_true_when_the_server_confirmed_it_or_is_gone(live_server: ServerProcess, sides: MakeSide) -> None:
    side = sides(live_server.address, make_kv(1), lookup_timeout=0.3)
    live_server.pause()
    assert side.scheduler.reset_cache() is False
    live_server.go_on()
    side.scheduler._lookups.lookup_timeout = 60.0
    assert side.scheduler.reset_cache() is True
    live_server.kill()
    wait_until(lambda: side.scheduler._link.client is None)
    assert side.scheduler.reset_cache() is True


def test_a_worker_that_cannot_map_the_arena_runs_without_a_cache_and_says_why(
    live_server: ServerProcess, sides: MakeSide, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(arena_map._libc, "mmap", lambda *_: None)
    side = sides(live_server.address, make_kv(1))
    assert not side.worker.is_healthy()
    assert not side.scheduler.is_healthy()
    side.store("r", TOKENS, list(range(16)))
    assert side.worker.statistics()["dropped_unavailable"] == 4
    assert side.lookup("q", TOKENS) == 0
    assert sum("cannot be mapped" in line for line in caplog.messages) == 1


def test_a_worker_faults_its_whole_mapping_in_ahead_of_any_copy(live_server: ServerProcess, sides: MakeSide) -> None:
    side = sides(live_server.address, make_kv(1))
    client = side.worker._link.client
    assert client is not None
    arena = client.arena
    assert arena is not None

    def resident() -> int:
        """Bytes of the arena whose pages are in this process' tables."""
        of_it, found = False, 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                of_it = line.startswith(f"{arena._address:x}-")
            elif of_it and line.startswith("Rss:"):
                found += int(line.split()[1]) << 10
        return found

    wait_until(lambda: resident() == client.arena_size == 4 << 20)  # nothing was stored or loaded


def test_a_mapping_is_faulted_in_by_a_call_that_releases_the_gil() -> None:
    """Of ctypes' libraries, PyDLL alone keeps it; the mmap module would too."""
    assert isinstance(arena_map._libc, ctypes.CDLL)
    assert not isinstance(arena_map._libc, ctypes.PyDLL)
    assert arena_map._libc.madvise(0, 0, 0) == 0


class Late(WorkerAdapter):
    """Its loop stands between what it did for a new connection and the moment at which the connection may be used."""

    stands = registered = False

    async def _on_connected(self, client: Client) -> None:
        await super()._on_connected(client)
        self.stands = True
        wait_until(lambda: self.registered or bool(self._link._portal._pending))


def test_kv_that_is_registered_while_a_connection_comes_up_is_registered_with_it(live_server: ServerProcess) -> None:
    worker = Late(live_server.address, engine_id="late", block_tokens=16, connect_timeout=0.01)
    try:
        wait_until(lambda: worker.stands)
        worker.register_kv_caches(make_kv(1))
        worker.registered = True
        wait_until(lambda: worker._link.client is not None)
        assert worker.path_reason != "no KV is registered yet"
        assert live_server.held["namespaces"] == 1
    finally:
        worker.registered = True
        worker.shutdown()
