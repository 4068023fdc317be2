"""The page for people: what it shows now, and what the last hour was like.

`page.html` is the whole page. It loads nothing else. It reads the hour and the engines, and then what changes, as
server-sent events. All readers are told the same bytes, made once. Nothing is made while nobody reads. A slow reader
skips what it had no time for.
"""

import base64
import hashlib
import json
import logging
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import attrs
import trio

from lmcache_trio._server.parts import Parts
from lmcache_trio._server.report import report

__all__ = ["EVERY", "HOUR", "HistoryPoint", "LivePage", "page_and_policy"]

log = logging.getLogger("lmcache_trio.http")

EVERY = 10.0
"""Seconds between two points of the history."""
HOUR = 3600.0
TELL = 1.0
"""Seconds between two events for the readers."""


@attrs.frozen
class HistoryPoint:
    """What was counted by the time *at*, in seconds since 1970. The tokens are by source, and by reason."""

    at: float
    lookups: int
    requested: int
    hit: Mapping[str, int]
    missed: Mapping[str, int]


def page_and_policy() -> tuple[bytes, bytes]:
    """The page, and the Content-Security-Policy under which a browser runs its own script and style and loads nothing.

    A value that somebody else chose, such as an engine's name, could not do more there even if it were markup.
    """
    page = files("lmcache_trio._server").joinpath("page.html").read_bytes()
    rules = [b"default-src 'none'", b"connect-src 'self'", b"base-uri 'none'", b"form-action 'none'"]
    for kind, tag in ((b"script-src", b"script"), (b"style-src", b"style")):
        inside = re.search(b"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        assert inside is not None, f"page.html has no {tag!r}"
        digest = base64.b64encode(hashlib.sha256(inside[1]).digest())
        rules.append(b"%s 'sha256-%s'" % (kind, digest))
    return page, b"; ".join(rules)


class LivePage:
    """The figures of the page, of the server of *parts*."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._points: deque[HistoryPoint] = deque([self._point()], maxlen=int(HOUR / EVERY) + 1)
        self._readers = 0
        self._wanted = trio.Event()
        self._told = trio.Event()
        self._event = b""

    async def run(self) -> None:
        """Keep the history, and make the events while somebody reads them. It runs until it is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_history, name="history of the page")
            nursery.start_soon(self._tell, name="events of the page")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Somebody reads the events in this block."""
        self._readers += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._readers -= 1

    async def next_event(self) -> bytes:
        """The next event, once it is made. Inside of `reading` it comes within `TELL` seconds."""
        await self._told.wait()
        return self._event

    def history(self) -> dict[str, Any]:
        """The points of the last hour, the oldest first."""
        return {"seconds": EVERY, "points": [attrs.asdict(point) for point in (*self._points, self._point())]}

    async def _keep_history(self) -> None:
        while True:
            await trio.sleep(EVERY)
            self._points.append(self._point())

    async def _tell(self) -> None:
        while True:
            if not self._readers:
                self._wanted = trio.Event()
                await self._wanted.wait()
            await trio.sleep(TELL)
            try:
                self._event = self.event()
            except Exception:  # a bug of ours: the readers see that nothing comes, and the server serves on
                self._parts.counts.events["handler_bugs"] += 1
                log.exception("bug in the figures of the page")
                continue
            told, self._told = self._told, trio.Event()
            told.set()

    def _point(self) -> HistoryPoint:
        counts = self._parts.counts
        found = (
            counts.events["lookups"],
            counts.requested_tokens,
            dict(counts.hit_tokens),
            dict(counts.missed_tokens),
        )
        return HistoryPoint(time.time(), *found)

    def event(self) -> bytes:
        """One server-sent event with the figures of now. Its cost grows with the number of clients and tiers alone."""
        figures = {"boot": self._parts.boot.hex(), "point": attrs.asdict(self._point()), **report(self._parts)}
        return b"data: " + json.dumps(figures).encode() + b"\n\n"
