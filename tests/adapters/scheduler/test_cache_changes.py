"""What a scheduler that watches is told of the server's memory, through its adapter."""

from collections.abc import Callable

import pytest

from lmcache_trio._core.keys import join_digests
from lmcache_trio._wire.messages import Changed
from lmcache_trio.adapters import CacheChange
from lmcache_trio.adapters.scheduler import changes as module
from lmcache_trio.adapters.scheduler.changes import CacheChanges
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, wait_until

TOKENS = list(range(3 * CHUNK))
BLOCKS = list(range(12))


def digests(*numbers: int) -> list[bytes]:
    return [bytes([number]) * 32 for number in numbers]


def said(came: list[bytes], left: list[bytes], *, cleared: bool = False) -> Changed:
    return Changed(0, join_digests(came), join_digests(left), cleared)


def test_changes_come_in_order_and_what_was_cleared_outdates_those_before() -> None:
    changes = CacheChanges()
    assert changes.take() == ()
    changes.add(said(digests(1), []))
    changes.add(said(digests(2), digests(1)))
    assert changes.take() == [CacheChange(0, digests(1), []), CacheChange(0, digests(2), digests(1))]
    changes.add(said(digests(3), []))
    changes.add(said([], [], cleared=True))
    changes.add(said(digests(4), []))
    assert changes.take() == [CacheChange(cleared=True), CacheChange(0, digests(4), [])]
    assert changes.take() == ()


def test_a_host_that_takes_nothing_is_told_that_everything_may_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 4)
    changes = CacheChanges()
    for number in range(100):
        changes.add(said(digests(number), []))
    first, *rest = changes.take()
    assert first == CacheChange(cleared=True)
    assert len(rest) <= 4


def test_engines_of_a_namespace_are_told_what_one_of_them_stored_and_when_the_server_is_gone(
    live_server: ServerProcess, sides: Callable[..., Side]
) -> None:
    one, other = sides(live_server.address, make_kv(7)), sides(live_server.address, make_kv(), watch=True)
    one.store("stored", TOKENS, BLOCKS)
    heard: list[CacheChange] = []

    def hears(change: CacheChange) -> bool:
        heard.extend(other.scheduler.take_changes())
        return change in heard

    names = one.scheduler.extend("stored", TOKENS)
    wait_until(lambda: hears(CacheChange(0, names, [])))
    assert one.scheduler.take_changes() == (), "it does not watch"
    heard.clear()
    live_server.kill()
    wait_until(lambda: hears(CacheChange(cleared=True)))
