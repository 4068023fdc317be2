"""Transfers: the rules of the queue of the device's worker, one by one."""

from collections.abc import Sequence

import pytest

from lmcache_trio._core.transfer.transfers import Batch, Direction, Transfer, Transfers, TransferState
from lmcache_trio.errors import Misuse
from lmcache_trio.statistics import QueueHeld

LOAD, STORE = Direction.LOAD, Direction.STORE


def queue(**settings: int) -> Transfers:
    return Transfers(**{"in_flight": 100, "batch": 50, "turns": 2, **settings})


def submit(transfers: Transfers, direction: Direction, units: Sequence[int], owner: str = "a") -> Transfer:
    transfer = Transfer(direction, owner, units)
    transfers.submit(transfer)
    return transfer


def take(transfers: Transfers) -> Batch:
    batch = transfers.next()
    assert batch is not None
    return batch


def test_loads_go_ahead_of_stores_that_came_before() -> None:
    transfers = queue(batch=10)
    submit(transfers, STORE, [10])
    load = submit(transfers, LOAD, [10])
    assert [part.transfer for part in take(transfers).parts] == [load]


def test_after_some_turns_of_loads_a_store_has_its_turn() -> None:
    transfers = queue(batch=10)
    submit(transfers, STORE, [10] * 5)
    submit(transfers, LOAD, [10] * 20)
    order = [take(transfers).direction for _ in range(9)]
    assert order == [LOAD, LOAD, STORE, LOAD, LOAD, STORE, LOAD, LOAD, STORE]


def test_no_more_than_the_bound_is_with_the_device() -> None:
    transfers = queue(in_flight=25, batch=10)
    submit(transfers, STORE, [10] * 5)
    first, _ = take(transfers), take(transfers)
    assert transfers.next() is None
    transfers.ended(first)
    take(transfers)
    assert transfers.next() is None


def test_a_unit_larger_than_the_bound_goes_alone() -> None:
    transfers = queue(in_flight=25, batch=10)
    submit(transfers, STORE, [1000, 1])
    big = take(transfers)
    assert big.size == 1000
    assert transfers.next() is None
    assert transfers.ended(big) == []
    assert take(transfers).size == 1


def test_neighbours_of_one_owner_share_a_batch_and_others_do_not() -> None:
    transfers = queue()
    a, b, c = submit(transfers, STORE, [10, 10]), submit(transfers, STORE, [10]), submit(transfers, STORE, [10], "b")
    batch = take(transfers)
    assert [part.transfer for part in batch.parts] == [a, b]
    assert [part.transfer for part in take(transfers).parts] == [c]
    assert transfers.ended(batch) == [a, b]
    assert a.succeeded
    assert b.succeeded


def test_layers_go_one_by_one_and_share_with_nobody() -> None:
    transfers = queue()
    layered = Transfer(LOAD, "a", [5, 5, 5], layered=True)
    transfers.submit(layered)
    submit(transfers, LOAD, [5])
    found = [[(part.transfer is layered, part.first, part.end) for part in take(transfers).parts] for _ in range(4)]
    assert found == [[(True, 0, 1)], [(True, 1, 2)], [(True, 2, 3)], [(False, 0, 1)]]


def test_layered_loads_of_one_owner_go_layer_by_layer() -> None:
    transfers = queue()
    loads = [Transfer(LOAD, owner, [5, 5, 5], layered=True) for owner in ("a", "b", "a")]
    for load in loads:
        transfers.submit(load)
    order = [(loads.index(part.transfer), part.first) for _ in range(9) for part in take(transfers).parts]
    assert [unit for unit in order if unit[0] != 1] == [(0, 0), (2, 0), (0, 1), (2, 1), (0, 2), (2, 2)]
    assert [unit for unit in order if unit[0] == 1] == [(1, 0), (1, 1), (1, 2)]


def test_units_that_are_not_allowed_yet_keep_no_other_waiting_and_come_behind_what_is_queued() -> None:
    transfers = queue(batch=10)
    layered = Transfer(STORE, "a", [10, 10, 10], layered=True, allowed=1)
    transfers.submit(layered)
    other = submit(transfers, STORE, [10], "b")
    first = take(transfers)
    assert [(part.transfer, part.first, part.end) for part in first.parts] == [(layered, 0, 1)]
    assert transfers.ended(first) == []
    assert list(transfers.coming()) == [other]
    transfers.allow(layered, 3)
    assert [part.transfer for part in take(transfers).parts] == [other]
    batches = [take(transfers), take(transfers)]
    assert [part.first for batch in batches for part in batch.parts] == [1, 2]
    assert [transfers.ended(batch) for batch in batches] == [[], [layered]]
    assert layered.succeeded


def test_layers_of_a_store_that_are_allowed_share_a_batch_with_each_other_alone() -> None:
    transfers = queue(batch=20)
    stores = [Transfer(STORE, "a", [10, 10, 10], layered=True, allowed=3) for _ in range(2)]
    for store in stores:
        transfers.submit(store)
    found = [[(stores.index(part.transfer), part.first, part.end) for part in take(transfers).parts] for _ in range(4)]
    assert found == [[(0, 0, 2)], [(1, 0, 2)], [(0, 2, 3)], [(1, 2, 3)]]


def test_what_is_allowed_after_its_end_is_not_started() -> None:
    transfers = queue()
    store = Transfer(STORE, "a", [5, 5], layered=True, allowed=1)
    transfers.submit(store)
    batch = take(transfers)
    assert not transfers.abort(store)
    transfers.allow(store, 2)
    assert transfers.next() is None
    assert transfers.ended(batch) == [store]
    transfers.allow(store, 2)
    assert transfers.next() is None


def test_what_was_aborted_before_it_was_queued_is_not_queued_any_more() -> None:
    transfers = queue()
    load = Transfer(LOAD, "a", [5])
    assert transfers.abort(load)
    with pytest.raises(Misuse):
        transfers.submit(load)
    assert transfers.next() is None


def test_a_batch_whose_end_is_lost_makes_room_and_never_ends_what_it_was_for() -> None:
    transfers = queue(in_flight=10, batch=10)
    lost, after = submit(transfers, STORE, [10, 10]), submit(transfers, STORE, [10], "b")
    transfers.lost(take(transfers))
    assert transfers.statistics().copy_bytes_running == 0
    assert not transfers.abort(lost)
    assert [part.transfer for part in take(transfers).parts] == [after]
    assert lost.state is TransferState.ENDING


def test_a_transfer_that_was_aborted_ends_after_the_copy_that_runs_and_starts_no_other() -> None:
    transfers = queue(batch=10)
    store = submit(transfers, STORE, [10, 10, 10])
    batch = take(transfers)
    assert not transfers.abort(store)
    assert not transfers.abort(store)
    assert store.state is TransferState.ENDING
    assert transfers.next() is None
    assert transfers.ended(batch) == [store]
    assert not store.succeeded


def test_a_transfer_that_was_aborted_between_two_copies_has_ended() -> None:
    transfers = queue(batch=10)
    store = submit(transfers, STORE, [10, 10])
    assert transfers.ended(take(transfers)) == []
    assert transfers.abort(store)
    assert store.state is TransferState.ENDED
    assert not transfers.abort(store)
    assert transfers.next() is None


def test_a_copy_that_failed_fails_all_that_it_was_for_and_none_else() -> None:
    transfers = queue(batch=10)
    a, b = submit(transfers, STORE, [10, 10]), submit(transfers, STORE, [10])
    first, second, third = take(transfers), take(transfers), take(transfers)
    assert transfers.ended(first, failed=True) == []
    assert transfers.ended(second) == [a]
    assert transfers.ended(third) == [b]
    assert (a.succeeded, b.succeeded) == (False, True)


def test_what_is_not_so_is_refused_and_changes_nothing() -> None:
    transfers = queue()
    load = submit(transfers, LOAD, [1])
    with pytest.raises(Misuse):
        transfers.submit(load)
    batch = take(transfers)
    transfers.ended(batch)
    with pytest.raises(Misuse):
        transfers.ended(batch)
    with pytest.raises(Misuse):
        Transfer(LOAD, "a", [])
    with pytest.raises(Misuse):
        queue(turns=0)
    with pytest.raises(Misuse):
        transfers.allow(load, 2)
    with pytest.raises(Misuse):
        transfers.allow(Transfer(LOAD, "a", [1], allowed=0), 1)
    assert transfers.statistics() == QueueHeld(0, 0, 0)
