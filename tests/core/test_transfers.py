"""Transfers: the queue of the device's worker, against a model, and its rules one by one."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from lmcache_trio._core.transfers import Batch, Direction, Transfer, Transfers, TransferState
from lmcache_trio.errors import Misuse

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
    assert transfers.statistics()["copy_bytes_running"] == 0
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
    assert transfers.statistics() == {"transfers_queued": 0, "copies_running": 0, "copy_bytes_running": 0}


IN_FLIGHT, BATCH, TURNS = 40, 20, 3


class QueueModel(RuleBasedStateMachine):
    """The model: for each transfer, which of its units were started, have ended, and whether it may still succeed."""

    submitted = Bundle("submitted")

    def __init__(self) -> None:
        super().__init__()
        self.transfers = Transfers(in_flight=IN_FLIGHT, batch=BATCH, turns=TURNS)
        self.running: list[Batch] = []
        self.order: dict[Direction, list[Transfer]] = {LOAD: [], STORE: []}  # not wholly started, by submission
        self.started: dict[Transfer, int] = {}
        self.busy: dict[Transfer, int] = {}
        self.spoilt: set[Transfer] = set()
        self.ended: set[Transfer] = set()
        self.lost: set[Transfer] = set()
        self.loads_in_a_row = 0

    @rule(
        target=submitted,
        direction=st.sampled_from(Direction),
        owner=st.sampled_from("ab"),
        units=st.lists(st.integers(1, 50), min_size=1, max_size=5),
        layered=st.booleans(),
    )
    def submit(self, direction: Direction, owner: str, units: list[int], layered: bool) -> Transfer:
        transfer = Transfer(direction, owner, units, layered)
        self.transfers.submit(transfer)
        self.order[direction].append(transfer)
        self.started[transfer] = self.busy[transfer] = 0
        return transfer

    @rule()
    def start(self) -> None:
        waiting = {direction: list(order) for direction, order in self.order.items()}
        coming = set(self.transfers.coming())
        batch = self.transfers.next()
        size = sum(running.size for running in self.running)
        if batch is None:
            assert size or not any(waiting.values()), "an idle device was given nothing, and something waits"
            return
        assert not self.running or size + batch.size <= IN_FLIGHT
        if batch.direction is STORE:
            assert not waiting[LOAD] or self.loads_in_a_row >= TURNS
        else:
            assert not waiting[STORE] or self.loads_in_a_row < TURNS
        self.loads_in_a_row = 0 if batch.direction is STORE else self.loads_in_a_row + 1
        order = waiting[batch.direction]
        if order[0].layered:  # layer 0 of every one of an owner's before layer 1 of any
            order = [each for each in order if each.layered and each.owner == order[0].owner]
            order.sort(key=self.started.__getitem__)
        assert [part.transfer for part in batch.parts] == order[: len(batch.parts)]
        assert {part.transfer for part in batch.parts} <= coming
        assert len({part.transfer.owner for part in batch.parts}) == 1
        total = 0
        for part in batch.parts:
            assert part.first == self.started[part.transfer]
            assert part.first < part.end
            assert not part.transfer.layered or (len(batch.parts) == 1 and part.end == part.first + 1)
            total += sum(part.transfer.units[part.first : part.end])
            self.started[part.transfer] = part.end
            self.busy[part.transfer] += 1
            if part.end == len(part.transfer.units):
                self.order[batch.direction].remove(part.transfer)
        assert total == batch.size
        units = sum(part.end - part.first for part in batch.parts)
        assert total <= BATCH or units == 1
        self.running.append(batch)

    @rule(data=st.data(), failed=st.booleans())
    def end(self, data: st.DataObject, failed: bool) -> None:
        if not self.running:
            return
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        ended = self.transfers.ended(batch, failed=failed)
        for part in batch.parts:
            self.busy[part.transfer] -= 1
            if failed:
                self.spoil(part.transfer)
        expected = [part.transfer for part in batch.parts if self.is_over(part.transfer)]
        assert ended == expected
        for transfer in ended:
            assert transfer.succeeded is (transfer not in self.spoilt)
        self.ended.update(ended)

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if not self.running:
            return
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.transfers.lost(batch)
        for part in batch.parts:  # which stay busy for good
            self.spoil(part.transfer)
            self.lost.add(part.transfer)

    @rule(transfer=submitted)
    def abort(self, transfer: Transfer) -> None:
        was_over = transfer in self.ended
        at_once = self.transfers.abort(transfer)
        assert at_once is (not was_over and not self.busy[transfer])
        if not was_over:
            self.spoil(transfer)
            if at_once:
                self.ended.add(transfer)

    def spoil(self, transfer: Transfer) -> None:
        self.spoilt.add(transfer)
        if transfer in self.order[transfer.direction]:
            self.order[transfer.direction].remove(transfer)

    def is_over(self, transfer: Transfer) -> bool:
        whole = self.started[transfer] == len(transfer.units)
        return not self.busy[transfer] and (whole or transfer in self.spoilt)

    @invariant()
    def nothing_ends_while_a_copy_of_it_runs(self) -> None:
        for transfer in self.started:
            assert (transfer.state is TransferState.ENDED) == (transfer in self.ended)
            assert not (self.busy[transfer] and transfer.state is TransferState.ENDED)

    @invariant()
    def it_says_what_it_holds(self) -> None:
        assert self.transfers.statistics() == {
            "transfers_queued": sum(map(len, self.order.values())),
            "copies_running": len(self.running),
            "copy_bytes_running": sum(batch.size for batch in self.running),
        }

    def teardown(self) -> None:
        """Whatever happened, everything ends once the device goes on."""
        for _ in range(1000):
            while (batch := self.transfers.next()) is not None:
                self.running.append(batch)
            if not self.running:
                break
            self.ended.update(self.transfers.ended(self.running.pop(0)))
        for transfer in self.started:
            assert (transfer.state is TransferState.ENDED) == (transfer not in self.lost)


TestQueueModel = QueueModel.TestCase
TestQueueModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
