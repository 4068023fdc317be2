"""The log of a server's process: a line a record to standard error, and repeats gathered to one line.

It refuses to end the process, or to write tracebacks, because nobody can be told: a server outlives its log's reader.
"""

import logging
import os
from contextlib import suppress

import attrs

__all__ = ["LEVELS", "GatheringHandler"]

LEVELS = ("debug", "info", "warning", "error")
"""Of the log. Nothing of ours is worse than an error."""

WINDOW = 60.0
"""Seconds in which lines of one kind are gathered: an hour of a client that is refused each second is 60 + 5 lines."""
TOLD = 5
"""Lines of one kind that are written in a window before the others are gathered: different engines can say the same."""


@attrs.define(eq=False)
class _Kind:
    """Lines that differ only in what was filled in, from the first one in a window on."""

    since: float
    told: int = 0
    gathered: int = 0
    last: logging.LogRecord | None = None


class GatheringHandler(logging.StreamHandler):  # type: ignore[type-arg]  # of text
    """A stream handler that writes `TOLD` lines of one kind per `WINDOW`, and then how many more there were.

    It has no clock of its own: how many more is told with the next record after the window, or when it is closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        self._kinds: dict[tuple[str, int, str], _Kind] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self._tell_gathered(record.created - WINDOW)
        kind = self._kinds.setdefault((record.name, record.levelno, str(record.msg)), _Kind(record.created))
        if kind.told < TOLD or record.levelno <= logging.DEBUG:
            kind.told += 1
            super().emit(record)
        else:
            kind.gathered += 1
            kind.last = record

    def close(self) -> None:
        self._tell_gathered(float("inf"))
        super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        """What cannot be written is lost, and so is all that follows: the reader is gone, or the disk is full."""
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)

    def _tell_gathered(self, begun_by: float) -> None:
        over = [name for name, kind in self._kinds.items() if kind.since <= begun_by]
        for name in over:
            kind = self._kinds.pop(name)
            if kind.gathered == 1 and kind.last is not None:
                super().emit(kind.last)
            elif kind.last is not None:
                seconds = kind.last.created - kind.since
                more = logging.makeLogRecord(kind.last.__dict__)
                more.msg = "%s (and %d more lines like it within %.0f s)"
                more.args = (kind.last.getMessage(), kind.gathered - 1, max(1.0, seconds))
                more.exc_info = more.exc_text = None
                super().emit(more)
