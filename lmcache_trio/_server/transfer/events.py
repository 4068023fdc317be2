"""Waits for what an engine's GPU has still to do, before the copies that must follow it are queued.

An event that never happens keeps nobody waiting but those that it is for. Each has a task of its own, which ends when
the last of them is over, whether it happened or not. This starts no task: `supervise` gives it `start`.
"""

import logging
from collections.abc import Callable, Sequence

import attrs
import trio

from lmcache_trio._core.transfer.transfers import Transfer
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.tasks import Starter
from lmcache_trio._server.transfer.attachments import Attachment
from lmcache_trio.abc import EventDevice
from lmcache_trio.errors import LMCacheTrioError

__all__ = ["CopyEvents"]

log = logging.getLogger("lmcache_trio.server")


@attrs.define(eq=False)
class _Wait:
    """The first *units* units of *transfers* may be copied once *event* has happened."""

    event: bytes
    transfers: list[Transfer]
    units: int
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)


class CopyEvents:
    """All that are waited for. *happened* is told what may be copied now, *failed* what never may."""

    def __init__(
        self,
        start: Starter,
        counts: Counts,
        *,
        happened: Callable[[Transfer, int], None],
        failed: Callable[[Transfer], None],
    ) -> None:
        self._counts = counts
        self._start = start
        self._happened = happened
        self._failed = failed
        self._waits: dict[Transfer, list[_Wait]] = {}

    def wait(
        self, device: EventDevice, attachment: Attachment, event: bytes, transfers: Sequence[Transfer], units: int
    ) -> None:
        """Wait for *event* of *attachment*'s engine, on behalf of *units* units of *transfers*."""
        wait = _Wait(event, list(transfers), units)
        for transfer in transfers:
            self._waits.setdefault(transfer, []).append(wait)
        self._start(self._see, device, attachment, wait, name="event")

    def over(self, transfer: Transfer) -> None:
        """Nothing is waited for on behalf of *transfer* any more."""
        for wait in self._waits.pop(transfer, ()):
            wait.transfers.remove(transfer)
            if not wait.transfers:
                wait.scope.cancel()

    async def _see(self, device: EventDevice, attachment: Attachment, wait: _Wait) -> None:
        if wait.scope.cancel_called:  # its memory may be closed by now
            return
        with wait.scope:
            try:
                await device.wait_event(attachment.attached, wait.event)
            except LMCacheTrioError as exc:
                log.warning("the event of a request of %s: %s", attachment.peer, exc)
                self._end(wait, self._failed)
            except Exception:  # no copy was begun
                self._counts.events["device_bugs"] += 1
                log.exception("bug in the device: the event of a request of %s", attachment.peer)
                self._end(wait, self._failed)
            else:
                self._end(wait, lambda transfer: self._happened(transfer, wait.units))

    def _end(self, wait: _Wait, tell: Callable[[Transfer], None]) -> None:
        """Tell those for whom it was waited; by then it is waited for no more."""
        transfers, wait.transfers = wait.transfers, []
        for transfer in transfers:
            self._waits[transfer].remove(wait)
        for transfer in transfers:
            tell(transfer)
