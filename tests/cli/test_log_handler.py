"""The log of a server's process: every kind of line is seen, and none floods it."""

import io
import logging

import pytest

from lmcache_trio._log_handler import TOLD, WINDOW, GatheringHandler


class Log:
    """A handler with a stream of its own, and records at times that a test chooses."""

    def __init__(self) -> None:
        self.handler = GatheringHandler()
        self.handler.setFormatter(logging.Formatter("%(message)s"))
        self.written = io.StringIO()
        self.handler.setStream(self.written)

    def say(self, when: float, message: str, *values: object, level: int = logging.INFO) -> None:
        record = logging.LogRecord("server", level, __file__, 1, message, values, None)
        record.created = when
        self.handler.handle(record)

    def lines(self) -> list[str]:
        return self.written.getvalue().splitlines()


@pytest.fixture
def log() -> Log:
    return Log()


def test_lines_of_one_kind_are_written_some_times_and_then_gathered(log: Log) -> None:
    for i in range(100):
        log.say(i / 10, "refused %d", i)
    log.say(10, "another kind")
    assert log.lines() == [*(f"refused {i}" for i in range(TOLD)), "another kind"]


def test_how_many_were_gathered_is_told_with_the_next_line_after_the_window(log: Log) -> None:
    for i in range(100):
        log.say(i / 10, "refused %d", i)
    log.say(WINDOW - 0.1, "early")
    log.say(WINDOW, "late")
    assert log.lines()[TOLD:] == ["early", f"refused 99 (and {99 - TOLD} more lines like it within 10 s)", "late"]
    log.say(WINDOW + 1, "refused %d", 100)
    assert log.lines()[-1] == "refused 100"


def test_it_is_told_at_the_end_too(log: Log) -> None:
    for i in range(TOLD + 2):
        log.say(0, "refused %d", i)
    log.handler.close()
    assert log.lines()[TOLD:] == [f"refused {TOLD + 1} (and 1 more lines like it within 1 s)"]


def test_a_single_one_more_is_written_as_it_is(log: Log) -> None:
    for i in range(TOLD + 1):
        log.say(0, "refused %d", i)
    log.say(WINDOW, "late")
    assert log.lines()[TOLD:] == [f"refused {TOLD}", "late"]


def test_lines_of_different_levels_are_of_different_kinds_and_debug_is_never_gathered(log: Log) -> None:
    for _ in range(TOLD + 1):
        log.say(0, "here", level=logging.DEBUG)
    for _ in range(TOLD):
        log.say(0, "here", level=logging.WARNING)
    assert len(log.lines()) == 2 * TOLD + 1


def test_nothing_is_kept_of_a_kind_whose_window_is_over(log: Log) -> None:
    for i in range(1000):
        log.say(i * WINDOW, f"kind {i}")
    assert len(log.handler._kinds) == 1
