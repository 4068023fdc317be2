"""A session: its lookup's status, against a model that knows only the last few events."""

import math

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache_trio._core.index.session import LookupState, Session, Status
from lmcache_trio.errors import Misuse

A, B, C = (bytes([i]) * 32 for i in range(3))


def test_a_new_session_knows_of_no_lookup() -> None:
    assert Session(1).status(0.0) == Status(0, LookupState.UNKNOWN)


def test_a_chain_is_cut_then_extended_and_its_first_chunks_are_looked_up() -> None:
    session = Session(1)
    assert session.lookup(0, A + B, 2, asked=1) == [A, B]
    assert session.lookup(1, C + A, 2, asked=2) == [A, C]
    assert session.chain == b"".join([A, C, A])
    assert session.lookup(3, b"", 3, asked=3) == [A, C, A]


@pytest.mark.parametrize(("start", "digests", "upto"), [(3, b"", 0), (0, A, 2), (2, b"", 3)])
def test_a_gap_in_the_chain_is_misuse_and_changes_nothing(start: int, digests: bytes, upto: int) -> None:
    session = Session(1)
    session.lookup(0, A + B, 2, asked=1)
    session.answer(1, 2, b"lease", 10.0)
    with pytest.raises(Misuse, match="session 1"):
        session.lookup(start, digests, upto, asked=2)
    assert session.status(4.0) == Status(1, LookupState.ANSWERED, 2, b"lease", 6.0)
    assert session.chain == b"".join([A, B])


def test_an_answer_of_a_former_lookup_is_told_apart() -> None:
    session = Session(1)
    session.lookup(0, A, 1, asked=1)
    session.lookup(1, b"", 1, asked=2)
    assert session.answer(1, 1, b"old", 10.0) is False
    assert session.status(0.0) == Status(2, LookupState.PENDING)
    assert session.answer(2, 1, b"new", 10.0)
    assert session.answer(2, 0) is False


def test_an_answer_whose_lease_ran_out_is_zero_chunks_and_stays_so() -> None:
    session = Session(1)
    session.lookup(0, A, 1, asked=1)
    session.answer(1, 1, b"lease", 10.0)
    assert session.status(9.5) == Status(1, LookupState.ANSWERED, 1, b"lease", 0.5)
    assert session.status(10.0) == Status(1, LookupState.ANSWERED)


class Sessions(RuleBasedStateMachine):
    """The model: the last lookup's id, its answer if it has one, and whether it was released since."""

    def __init__(self) -> None:
        super().__init__()
        self.session = Session(5)
        self.now = 0.0
        self.asked = 0
        self.known: tuple[int, bytes, float] | None = None
        self.pending = False
        self.released = True
        self.length = 0
        self.loaded = 0

    @rule(start=st.integers(0, 4), extra=st.integers(0, 3), upto=st.integers(0, 6))
    def lookup(self, start: int, extra: int, upto: int) -> None:
        before = self.session.status(self.now)
        if start > self.length or upto > start + extra:
            with pytest.raises(Misuse):
                self.session.lookup(start, A * extra, upto, self.asked + 1)
            assert self.session.status(self.now) == before
            return
        self.asked += 1
        assert len(self.session.lookup(start, A * extra, upto, self.asked)) == upto
        self.length, self.pending, self.released, self.known = start + extra, True, False, None

    @rule(back=st.integers(0, 2), chunks=st.integers(1, 4), ttl=st.floats(0.1, 5.0), loaded=st.integers(0, 4))
    def answer(self, back: int, chunks: int, ttl: float, loaded: int) -> None:
        took = self.session.answer(self.asked - back, chunks, b"lease", self.now + ttl, loaded)
        assert took == (self.pending and back == 0)
        if took:
            self.pending, self.known = False, (chunks, b"lease", self.now + ttl)
            self.loaded = loaded

    @rule()
    def release(self) -> None:
        self.session.release()
        self.pending, self.released, self.known = False, True, None

    @rule()
    def reset(self) -> None:
        self.session.lose_lease()
        if self.known:
            self.known = (0, b"", -math.inf)

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def status_says_what_the_model_knows_however_often_it_is_asked(self) -> None:
        status = self.session.status(self.now)
        assert status == self.session.status(self.now)
        if self.released:
            assert status.state is LookupState.UNKNOWN
        elif self.pending:
            assert (status.state, status.asked) == (LookupState.PENDING, self.asked)
        elif self.known is not None:
            alive = self.now < self.known[2]
            assert status.state is LookupState.ANSWERED
            assert (status.chunks, status.lease) == ((self.known[0], b"lease") if alive else (0, b""))
            assert status.loaded == (self.loaded if self.known[1] and alive else 0)
            assert status.ttl == pytest.approx(self.known[2] - self.now if alive else 0.0)


TestSessions = Sessions.TestCase
