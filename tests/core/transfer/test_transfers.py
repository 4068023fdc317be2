"""Transfers: the rules of the queue of the device's worker, one by one."""

from collections.abc import Sequence

import pytest

from lmcache_trio._core.transfer.transfers import Batch, Direction, Transfer, Transfers, TransferState
from lmcache_trio.errors import Misuse
from lmcache_trio.statistics import QueueHeld

LOAD, STORE = Direction.LOAD, Direction.STORE


def queue(**settings: int) -> Transfers:
    return Transfers(**{"in_flight": 100, "batch": 50, "most_loads": 2, **settings})


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


def test_a_transfer_that_is_not_allowed_yet_keeps_no_other_waiting_and_comes_behind_the_queue() -> None:
    transfers = queue(batch=10)
    held = Transfer(STORE, "a", [10, 10], allowed=False)
    transfers.submit(held)
    other = submit(transfers, STORE, [10], "b")
    assert list(transfers.coming()) == [other]
    transfers.allow(held)
    transfers.allow(held)
    assert [part.transfer for part in take(transfers).parts] == [other]
    batches = [take(transfers), take(transfers)]
    assert [(part.transfer, part.first) for batch in batches for part in batch.parts] == [(held, 0), (held, 1)]
    assert [transfers.ended(batch) for batch in batches] == [[], [held]]
    assert held.succeeded


def test_a_transfer_that_is_allowed_after_its_end_is_not_started() -> None:
    transfers = queue()
    store = Transfer(STORE, "a", [5, 5], allowed=False)
    transfers.submit(store)
    assert transfers.abort(store)
    transfers.allow(store)
    assert transfers.next() is None


def test_a_transfer_that_was_aborted_before_it_was_queued_is_never_queued() -> None:
    transfers = queue()
    load = Transfer(LOAD, "a", [5])
    assert transfers.abort(load)
    with pytest.raises(Misuse):
        transfers.submit(load)
    assert transfers.next() is None


def test_a_batch_whose_end_is_lost_makes_room_and_never_ends_its_transfers() -> None:
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


def test_a_copy_that_failed_fails_all_its_transfers_and_no_others() -> None:
    transfers = queue(batch=10)
    a, b = submit(transfers, STORE, [10, 10]), submit(transfers, STORE, [10])
    first, second, third = take(transfers), take(transfers), take(transfers)
    assert transfers.ended(first, failed=True) == []
    assert transfers.ended(second) == [a]
    assert transfers.ended(third) == [b]
    assert (a.succeeded, b.succeeded) == (False, True)


def test_a_wrong_event_is_refused_and_changes_nothing() -> None:
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
        queue(most_loads=0)
    with pytest.raises(Misuse):
        transfers.allow(Transfer(LOAD, "a", [1], allowed=False))
    assert transfers.statistics() == QueueHeld(0, 0, 0)
