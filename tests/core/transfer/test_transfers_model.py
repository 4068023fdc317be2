"""Transfers: the queue of the device's worker against a model that says its rules once more."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from lmcache_trio._core.transfer.transfers import Batch, Direction, Transfer, Transfers, TransferState
from lmcache_trio.statistics import QueueHeld

LOAD, STORE = Direction.LOAD, Direction.STORE
IN_FLIGHT, BATCH, MOST_LOADS = 40, 20, 3


class QueueModel(RuleBasedStateMachine):
    """The model: for each transfer, which of its units were started, have ended, and whether it may still succeed."""

    submitted = Bundle("submitted")

    def __init__(self) -> None:
        super().__init__()
        self.transfers = Transfers(in_flight=IN_FLIGHT, batch=BATCH, most_loads=MOST_LOADS)
        self.running: list[Batch] = []
        self.order: dict[Direction, list[Transfer]] = {LOAD: [], STORE: []}  # with units to start, as they came
        self.held: set[Transfer] = set()  # not allowed yet
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
        allowed=st.booleans(),
    )
    def submit(self, direction: Direction, owner: str, units: list[int], allowed: bool) -> Transfer:
        transfer = Transfer(direction, owner, units, allowed)
        self.transfers.submit(transfer)
        if allowed:
            self.order[direction].append(transfer)
        else:
            self.held.add(transfer)
        self.started[transfer] = self.busy[transfer] = 0
        return transfer

    @rule(transfer=submitted)
    def allow(self, transfer: Transfer) -> None:
        self.transfers.allow(transfer)
        if transfer in self.held and transfer not in self.spoilt:
            self.order[transfer.direction].append(transfer)
        self.held.discard(transfer)

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
            assert not waiting[LOAD] or self.loads_in_a_row >= MOST_LOADS
        else:
            assert not waiting[STORE] or self.loads_in_a_row < MOST_LOADS
        self.loads_in_a_row = 0 if batch.direction is STORE else self.loads_in_a_row + 1
        order = waiting[batch.direction]
        assert [part.transfer for part in batch.parts] == order[: len(batch.parts)]
        assert {part.transfer for part in batch.parts} <= coming
        assert len({part.transfer.owner for part in batch.parts}) == 1
        total = 0
        for part in batch.parts:
            assert part.first == self.started[part.transfer]
            assert part.first < part.end
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
        assert self.transfers.statistics() == QueueHeld(
            transfers_queued=sum(map(len, self.order.values())),
            copies_running=len(self.running),
            copy_bytes_running=sum(batch.size for batch in self.running),
        )

    def teardown(self) -> None:
        """Whatever happened, everything ends once the engines and the device go on."""
        for transfer in self.started:
            self.transfers.allow(transfer)
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
