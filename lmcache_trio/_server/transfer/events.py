"""Waits for the events of engines' GPUs, each before the transfer that must follow it is queued.

An event that never happens keeps only its own transfer waiting. Each wait has a task of its own, which ends with the
transfer. `supervise` passes the starter of these tasks.
"""

import logging
from collections.abc import Callable

import trio

from lmcache_trio._core.transfer.transfers import Transfer
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.tasks import Starter
from lmcache_trio._server.transfer.attachments import Attachment
from lmcache_trio.abc import EventDevice
from lmcache_trio.errors import LMCacheTrioError

__all__ = ["CopyEvents"]

log = logging.getLogger("lmcache_trio.server")


class CopyEvents:
    """The events that are waited for. *happened* is told which transfer may be copied now, *failed* which never may."""

    def __init__(
        self,
        start: Starter,
        counts: Counts,
        *,
        happened: Callable[[Transfer], None],
        failed: Callable[[Transfer], None],
    ) -> None:
        self._counts = counts
        self._start = start
        self._happened = happened
        self._failed = failed
        self._waits: dict[Transfer, trio.CancelScope] = {}

    def wait(self, device: EventDevice, attachment: Attachment, event: bytes, transfer: Transfer) -> None:
        """Wait for *event* of *attachment*'s engine, on behalf of *transfer*."""
        self._waits[transfer] = scope = trio.CancelScope()
        self._start(self._see, device, attachment, event, transfer, scope, name="event")

    def over(self, transfer: Transfer) -> None:
        """*transfer* waits for its event no more. Idempotent."""
        scope = self._waits.pop(transfer, None)
        if scope is not None:
            scope.cancel()

    async def _see(
        self, device: EventDevice, attachment: Attachment, event: bytes, transfer: Transfer, scope: trio.CancelScope
    ) -> None:
        if scope.cancel_called:  # the memory may be closed by now
            return
        tell = self._failed
        with scope:
            try:
                await device.wait_event(attachment.attached, event)
                tell = self._happened
            except LMCacheTrioError as exc:
                log.warning("the event of a request of %s: %s", attachment.peer, exc)
            except Exception:  # no copy was begun
                self._counts.events["device_bugs"] += 1
                log.exception("bug in the device: the event of a request of %s", attachment.peer)
        if self._waits.pop(transfer, None) is not None:
            tell(transfer)
