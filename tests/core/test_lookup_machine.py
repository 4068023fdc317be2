"""The lookup machine does what its picture says, under any order of events."""

from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache_trio._core.lookup import LookupMachine, LookupState
from lmcache_trio.errors import Misuse


class LookupModel(RuleBasedStateMachine):
    """Against a table of the picture's arrows, and a list of chunks that failed."""

    arrows: ClassVar = {
        ("none", "submit"): "pending",
        ("taken", "submit"): "pending",
        ("released", "submit"): "pending",
        ("late", "submit"): "pending",
        ("pending", "late"): "late",
        ("pending", "release"): "late",
        ("answered", "release"): "released",
        ("answered", "taken"): "taken",
        ("none", "forget"): "none",
        ("taken", "forget"): "none",
        ("released", "forget"): "none",
        ("late", "forget"): "none",
    }

    def __init__(self) -> None:
        super().__init__()
        self.machine = LookupMachine()
        self.state = "none"
        self.ids = 0
        self.answered = 0
        self.until = 0.0
        self.failures: list[int] = []

    def follow(self, event: str, *args: int) -> bool:
        """Do *event* on the machine; the table says whether it may."""
        to = self.arrows.get((self.state, event))
        act = getattr(self.machine, event)
        if to is None:
            before = (self.machine.state, self.machine.chunks, self.machine.lease, self.machine.asked)
            with pytest.raises(Misuse):
                act(*args)
            assert before == (self.machine.state, self.machine.chunks, self.machine.lease, self.machine.asked)
            return False
        act(*args)
        self.state = to
        return True

    @rule()
    def submit(self) -> None:
        if self.follow("submit", self.ids + 1):
            self.ids += 1

    @rule(event=st.sampled_from(["late", "release", "taken", "forget"]))
    def event(self, event: str) -> None:
        self.follow(event)

    @rule(chunks=st.integers(0, 9), until=st.floats(0, 100), back=st.integers(0, 2))
    def answer(self, chunks: int, until: float, back: int) -> None:
        accepted = self.machine.answer(self.ids - back, chunks, b"lease", until)
        assert accepted == (self.state == "pending" and back == 0)
        if accepted:
            self.state, self.answered, self.until = "answered", chunks, until

    @rule(now=st.floats(0, 100))
    def expired(self, now: float) -> None:
        used_up = self.machine.expired(now)
        assert used_up == (self.state == "answered" and now >= self.until)
        if used_up:
            self.state = "released"

    @rule(chunk=st.integers(0, 9))
    def failed(self, chunk: int) -> None:
        self.machine.failed(chunk)
        self.failures.append(chunk)

    @invariant()
    def it_stands_where_the_picture_says(self) -> None:
        assert self.machine.state is LookupState(self.state)

    @invariant()
    def it_offers_an_answer_only_and_nothing_from_a_failed_chunk_on(self) -> None:
        offered = range(self.machine.chunks)
        assert list(offered) == [
            i for i in range(self.answered if self.state == "answered" else 0) if all(i < f for f in self.failures)
        ]
        assert (self.machine.lease == b"lease") == (self.state == "answered")


TestLookupMachine = LookupModel.TestCase


def test_a_negative_chunk_cannot_fail() -> None:
    with pytest.raises(Misuse, match="failed chunk"):
        LookupMachine().failed(-1)


def test_taking_an_answer_hands_over_its_lease() -> None:
    machine = LookupMachine()
    machine.submit(1)
    machine.answer(1, 3, b"the lease", 10.0)
    assert machine.taken() == b"the lease"
    assert (machine.chunks, machine.lease) == (0, b"")
