"""The lookup machine does what its table says, under any order of events."""

from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache_trio.adapters.scheduler.lookup_machine import LookupMachine, LookupStage
from lmcache_trio.errors import Misuse

SERVERS = ("a connection", "another connection")


class LookupModel(RuleBasedStateMachine):
    """Against a table of arrows, the words of the latest lookup, and a list of chunks that failed."""

    arrows: ClassVar = {
        ("idle", "submit"): "pending",
        ("taken", "submit"): "pending",
        ("late", "submit"): "pending",
        ("pending", "answer"): "answered",
        ("pending", "refuse"): "idle",
        ("pending", "late"): "late",
        ("answered", "expire"): "idle",
        ("answered", "take"): "taken",
        ("pending", "release"): "idle",
        ("answered", "release"): "idle",
        ("taken", "release"): "idle",
        ("pending", "forget"): "idle",
        ("answered", "forget"): "idle",
        ("late", "forget"): "idle",
    }
    """The events that change something, if they come in time and for the lookup that is awaited."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = LookupMachine()
        self.state = "idle"
        self.server: str | None = None
        self.sent: int | None = None
        self.ids = self.upto = self.answered = 0
        self.deadline = self.until = 0.0
        self.failures: list[int] = []

    def seen(self) -> tuple[object, ...]:
        return tuple(getattr(self.machine, name) for name in LookupMachine.__slots__)

    def refused(self, event: str, *args: object) -> None:
        before = self.seen()
        with pytest.raises(Misuse):
            getattr(self.machine, event)(*args)
        assert self.seen() == before

    def said(self, event: str, *args: object, counts: bool = True) -> bool:
        """*event* tells by its result whether it changed anything; it does where the table has it, if it *counts*."""
        to = self.arrows.get((self.state, event)) if counts else None
        before = self.seen()
        changed = getattr(self.machine, event)(*args)
        if to is None:
            assert changed is False
            assert self.seen() == before
            return False
        assert changed is (self.state != "late")  # a late lookup was released already
        self.state = to
        return True

    def offered(self, chunks: int) -> int:
        return min([chunks, *self.failures])

    # --- what is asked ----------------------------------------------------------------------------------------------

    @rule(server=st.sampled_from(SERVERS), sent=st.integers(0, 9))
    def told(self, server: str, sent: int) -> None:
        if self.state != "pending":  # as its caller does: in the same breath as a submit, or without one
            self.machine.told(server, sent)
            self.server, self.sent = server, sent

    @rule(upto=st.integers(0, 4), deadline=st.floats(0, 100))
    def submit(self, upto: int, deadline: float) -> None:
        again = self.state == "late" and upto == self.upto
        may = (self.state, "submit") in self.arrows and upto > 0 and not again
        assert self.machine.may_ask(upto) == may
        if not may:
            return self.refused("submit", self.ids + 1, upto, deadline)
        self.machine.submit(self.ids + 1, upto, deadline)
        self.ids, self.upto, self.deadline, self.state = self.ids + 1, upto, deadline, "pending"

    # --- what the server says ---------------------------------------------------------------------------------------

    @rule(server=st.sampled_from(SERVERS), chunks=st.integers(0, 9), data=st.data(), back=st.integers(0, 2))
    def answer(self, server: str, chunks: int, data: st.DataObject, back: int) -> None:
        until, loaded = data.draw(st.floats(0, 100)), data.draw(st.integers(0, chunks))
        awaited = server == self.server and back == 0
        if self.said("answer", server, self.ids - back, chunks, b"lease", until, loaded, counts=awaited):
            self.answered, self.until, self.in_memory = chunks, until, chunks - loaded

    @rule(server=st.sampled_from(SERVERS), back=st.integers(0, 2))
    def refuse(self, server: str, back: int) -> None:
        self.said("refuse", server, self.ids - back, counts=server == self.server and back == 0)

    @rule(server=st.sampled_from(SERVERS))
    def doubt(self, server: str) -> None:
        self.machine.doubt(server)
        if server == self.server:
            self.sent = None

    @rule()
    def lose(self) -> None:
        self.machine.lose()
        self.state, self.server, self.sent = "idle", None, None

    # --- the clock, and the engine ----------------------------------------------------------------------------------

    @rule(now=st.floats(0, 100))
    def late(self, now: float) -> None:
        self.said("late", now, counts=now >= self.deadline)

    @rule(now=st.floats(0, 100))
    def expire(self, now: float) -> None:
        self.said("expire", now, counts=now >= self.until)

    @rule(event=st.sampled_from(["release", "forget"]))
    def unwanted(self, event: str) -> None:
        self.said(event)

    @rule()
    def take(self) -> None:
        if self.state != "answered":
            return self.refused("take")
        assert self.machine.take() == b"lease"
        self.state = "taken"

    @rule(chunk=st.integers(-1, 9))
    def fail(self, chunk: int) -> None:
        if chunk < 0:
            return self.refused("fail", chunk)
        self.machine.fail(chunk)
        self.failures.append(chunk)

    # --- always -----------------------------------------------------------------------------------------------------

    @invariant()
    def it_stands_where_the_table_says(self) -> None:
        assert self.machine.state is LookupStage(self.state)

    @invariant()
    def it_offers_an_answer_only_and_nothing_from_a_failed_chunk_on(self) -> None:
        assert self.machine.chunks == (self.offered(self.answered) if self.state == "answered" else 0)
        assert (self.machine.lease == b"lease") == (self.state == "answered")
        if self.state == "answered":
            assert self.machine.in_memory == self.in_memory
        assert [self.machine.limit(n) for n in range(10)] == [self.offered(n) for n in range(10)]

    @invariant()
    def a_server_knows_what_it_was_told_on_its_connection_and_did_not_refuse(self) -> None:
        for server in SERVERS:
            assert self.machine.known_at(server) == (self.sent if server == self.server else None)


TestLookupMachine = LookupModel.TestCase


def test_a_negative_chunk_cannot_fail() -> None:
    with pytest.raises(Misuse, match="failed chunk"):
        LookupMachine().fail(-1)


def test_taking_an_answer_hands_over_its_lease() -> None:
    machine = LookupMachine()
    machine.told("here", 3)
    machine.submit(1, 3, 5.0)
    machine.answer("here", 1, 3, b"the lease", 10.0)
    assert machine.take() == b"the lease"
    assert (machine.chunks, machine.lease) == (0, b"")


def test_a_late_lookup_is_asked_again_for_another_number_of_chunks_only() -> None:
    machine = LookupMachine()
    machine.told("here", 3)
    machine.submit(1, 3, 5.0)
    assert machine.late(5.0)
    assert not machine.may_ask(3)
    assert machine.may_ask(4)
    assert not machine.forget()  # the server was released when it was late
    assert machine.may_ask(3)
