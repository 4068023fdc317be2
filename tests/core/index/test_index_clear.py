"""What `clear` drops: each chunk of a layout that nobody uses, in pieces between which other work goes on."""

from collections.abc import Callable
from typing import Any

from lmcache_trio._core.index.generations import Whole
from lmcache_trio._core.index.index import CLEARED_AT_ONCE

Make = Callable[..., Any]


def test_a_chunk_that_nobody_uses_goes_and_a_leased_one_stays_and_can_be_read(world: Make) -> None:
    w = world(8)
    w.store("abcd")
    lease = w.lease("ab")
    assert sum(w.index.clear(w.name)) == 2
    assert (w.hits("abcd"), w.held["chunks_ready"], w.arena.used) == (2, 2, 2 * 4096)
    assert w.counted["cleared_chunks"] == 2
    pin = w.index.pin(lease.id, "e", w.name, 1, 0, 0, 2)
    assert w.index.unpin(pin.id, 1)
    w.index.release(lease.id)
    assert sum(w.index.clear(w.name)) == 2
    assert (w.hits("abcd"), w.arena.used, w.index.chunks_of(w.name)) == (0, 0, 0)


def test_a_chunk_that_is_being_written_stays_and_is_published(world: Make) -> None:
    w = world(8)
    made = w.reserve("ab", session=99)
    assert sum(w.index.clear(w.name)) == 0
    assert w.index.chunks_of(w.name) == 2
    assert len(w.index.commit(made.id, 1)) == 2
    assert w.hits("ab") == 2


def test_what_is_stored_between_two_pieces_may_stay_and_a_reset_ends_it(world: Make) -> None:
    w = world(8 * CLEARED_AT_ONCE)
    for number in range(4 * CLEARED_AT_ONCE):
        w.store(chr(0x4E00 + number))
    clearing = w.index.clear(w.name)
    gone = next(clearing)
    w.index.reset(w.name)
    assert gone + sum(clearing) < 4 * CLEARED_AT_ONCE
    while w.index.sweep(1000):
        pass
    assert (w.arena.used, w.held["chunks_ready"]) == (0, 0)


def test_a_layout_that_no_engine_uses_is_forgotten_with_its_last_chunk(world: Make) -> None:
    w = world(8)
    w.store("ab")
    w.index.detach(w.name)
    assert sum(w.index.clear(w.name)) == 2
    assert w.held["namespaces"] == 0
    assert sum(w.index.clear(w.name)) == 0


def test_layouts_are_found_by_the_beginning_of_their_name_and_by_their_model(world: Make) -> None:
    w = world(8)
    whole = Whole(b"\xabc" * 16, "m")
    w.index.attach(b"1" * 32, [4096], whole=whole)
    w.index.attach(b"2" * 32, [4096], whole=whole)
    assert w.index.find_layouts("", "") == {w.name: [w.name], whole.name: [b"1" * 32, b"2" * 32]}
    assert list(w.index.find_layouts("ab63", "")) == list(w.index.find_layouts("", "m")) == [whole.name]
    assert w.index.find_layouts("ab63", "other") == w.index.find_layouts("63", "") == {}
    found = {layout.namespace: layout for layout in w.index.layouts()}
    assert found[whole.name.hex()].chunk_bytes == 2 * 4096
