"""Transfers: whoever waits has its turn after so many copies, whatever a client goes on asking for meanwhile.

How the queue chooses is not said again here: only what each that waits may count on, from outside.
"""

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_trio._core.transfer.transfers import Direction, Transfer, Transfers

TURNS, REACH, MOST = 2, 3, 4
"""MOST: units of one transfer."""


@attrs.frozen
class Ask:
    direction: Direction
    owner: str
    units: int
    layered: bool

    def make(self) -> Transfer:
        return Transfer(self.direction, self.owner, [10] * self.units, self.layered)


asks = st.builds(Ask, st.sampled_from(Direction), st.sampled_from("abc"), st.integers(1, MOST), st.booleans())


@attrs.define(eq=False)
class Waiting:
    """*before*: units of its direction that waited when it came."""

    transfer: Transfer
    before: int
    copies: int = 0
    """Begun since it came, in either direction."""

    def check(self) -> None:
        """At most so many copies of its direction go before it, and TURNS of loads before each of stores."""
        most = (TURNS + 1) * (self.before + (REACH - 1) * MOST)
        assert self.transfer.started or self.copies <= most, "it has not begun"
        rest = len(self.transfer.units) - self.transfer.started
        assert not rest or self.copies <= most + (TURNS + 1) * len(self.transfer.units), "it was begun and left"


class Run:
    """A device that carries out one copy after the other."""

    def __init__(self, batch: int) -> None:
        self.transfers = Transfers(in_flight=10, batch=batch, turns=TURNS, reach=REACH)
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


def test_a_client_that_keeps_asking_for_layers_starves_neither_its_own_first_nor_another() -> None:
    transfers = Transfers(in_flight=10, batch=10)
    first, other = Transfer(Direction.LOAD, "a", [10] * 8, layered=True), Transfer(Direction.LOAD, "b", [10])
    transfers.submit(first)
    transfers.submit(other)
    copies = 0
    while not other.started:
        transfers.submit(Transfer(Direction.LOAD, "a", [10] * 8, layered=True))
        batch = transfers.next()
        assert batch is not None
        transfers.ended(batch)
        copies += 1
        assert copies <= 64 * 8
    assert first.started == 8
    assert first.succeeded


def test_one_that_asks_and_aborts_in_turn_does_not_either() -> None:
    """Those that come and go take their places with them."""
    transfers = Transfers(in_flight=10, batch=10, reach=4)
    first = Transfer(Direction.LOAD, "a", [10] * 8, layered=True)
    transfers.submit(first)
    for copies in range(1, 20):
        another = Transfer(Direction.LOAD, "a", [10] * 8, layered=True)
        transfers.submit(another)
        batch = transfers.next()
        assert batch is not None
        transfers.ended(batch)
        transfers.abort(another)
        assert first.started >= copies - 3
        if first.started == 8:
            break
    assert first.succeeded
