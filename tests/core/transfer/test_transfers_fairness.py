"""Transfers: whoever waits has its turn after so many copies, whatever a client goes on asking for meanwhile.

How the queue chooses is not said again here: only what each that waits may count on, from outside.
"""

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_trio._core.transfer.transfers import Direction, Transfer, Transfers

MOST_LOADS, MOST = 2, 4
"""MOST: units of one transfer."""


@attrs.frozen
class Ask:
    direction: Direction
    owner: str
    units: int

    def make(self) -> Transfer:
        return Transfer(self.direction, self.owner, [10] * self.units)


asks = st.builds(Ask, st.sampled_from(Direction), st.sampled_from("abc"), st.integers(1, MOST))


@attrs.define(eq=False)
class Waiting:
    """*before*: units of its direction that waited when it came."""

    transfer: Transfer
    before: int
    copies: int = 0
    """Begun since it came, in either direction."""

    def check(self) -> None:
        """At most so many copies of its direction go before it, and MOST_LOADS of loads before each of stores."""
        most = (MOST_LOADS + 1) * (self.before + 1)
        assert self.transfer.started or self.copies <= most, "it has not begun"
        rest = len(self.transfer.units) - self.transfer.started
        assert not rest or self.copies <= most + (MOST_LOADS + 1) * len(self.transfer.units), "it was begun and left"


class Run:
    """A device that carries out one copy after the other."""

    def __init__(self, batch: int) -> None:
        self.transfers = Transfers(in_flight=10, batch=batch, most_loads=MOST_LOADS)
        self.waiting: list[Waiting] = []

    def submit(self, transfer: Transfer) -> None:
        others = [each.transfer for each in self.waiting if each.transfer.direction is transfer.direction]
        before = sum(len(other.units) - other.started for other in others)
        self.transfers.submit(transfer)
        self.waiting.append(Waiting(transfer, before))

    def copy(self) -> None:
        if (batch := self.transfers.next()) is not None:
            for each in self.waiting:
                each.copies += 1
                each.check()
            self.transfers.ended(batch)
            self.waiting = [each for each in self.waiting if each.transfer.started < len(each.transfer.units)]

    def abort(self, choice: int) -> None:
        if self.waiting:
            self.transfers.abort(self.waiting.pop(choice % len(self.waiting)).transfer)


@given(
    flood=st.lists(asks, min_size=1, max_size=3),
    steps=st.lists(st.one_of(st.none(), asks, st.integers(0, 20)), min_size=40, max_size=80),
    batch=st.sampled_from([10, 40]),
)
@settings(max_examples=150, deadline=None)
def test_whoever_waits_has_its_turn_after_so_many_copies_however_much_is_asked_for(
    flood: list[Ask], steps: list[Ask | int | None], batch: int
) -> None:
    """The flood comes anew with each copy; beside it single requests come, and single ones are aborted."""
    run = Run(batch)
    for step in steps:
        for ask in flood:
            run.submit(ask.make())
        if isinstance(step, Ask):
            run.submit(step.make())
        elif step is not None:
            run.abort(step)
        run.copy()


def test_a_client_that_keeps_asking_starves_neither_its_own_first_nor_another() -> None:
    transfers = Transfers(in_flight=10, batch=10)
    first, other = Transfer(Direction.LOAD, "a", [10] * 8), Transfer(Direction.LOAD, "b", [10])
    transfers.submit(first)
    transfers.submit(other)
    for _ in range(9):
        transfers.submit(Transfer(Direction.LOAD, "a", [10] * 8))
        batch = transfers.next()
        assert batch is not None
        transfers.ended(batch)
    assert first.succeeded
    assert other.succeeded
