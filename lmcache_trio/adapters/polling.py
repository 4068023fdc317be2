"""A scheduler's side whose one call gives the definitive count, for engines that ask once and go on.

The host sends, waits on a lock, and the Trio thread wakes it: a lookup answered from memory is one request and one
reply, with one hop. Only one that is not answered within `poll_interval` gets a task, which asks for its status
and ends at `lookup_timeout`. It changes nothing but `check_lookup_result`.
"""

import trio

from lmcache_trio.adapters.request import Pending
from lmcache_trio.adapters.scheduler import SchedulerAdapter
from lmcache_trio.client import Client
from lmcache_trio.errors import LMCacheTrioError

__all__ = ["PollingSchedulerAdapter"]

_HOST_GRACE = 0.25
"""Seconds that the host waits beyond the loop's deadline, before it takes the background thread for dead."""


class PollingSchedulerAdapter(SchedulerAdapter):
    """As `SchedulerAdapter`; `check_lookup_result` waits, `lookup_timeout` at most, and never gives None."""

    def check_lookup_result(self, request_id: str) -> int:
        """How many leading tokens may be loaded: definitive. Late, unhealthy or gone is 0."""
        request = self._requests.get(request_id)
        pending = None if request is None else self._pending(request)
        if pending is not None and not pending.answered.wait(self._poll_interval):
            self._link.post(self._ask_soon, pending)
            remaining = max(0.0, pending.deadline - self._clock())
            if not pending.answered.wait(remaining + _HOST_GRACE):
                self._too_late(pending)
        return super().check_lookup_result(request_id) or 0

    def _ask_soon(self, pending: Pending) -> None:
        pending.begin_watch()
        if not pending.answered.done:
            self._link.spawn(self._ask, pending)

    async def _ask(self, client: Client | None, pending: Pending) -> None:
        with trio.move_on_after(max(0.0, pending.deadline - self._clock())):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ask_status, pending)
                await pending.wait_settled()
                nursery.cancel_scope.cancel()
            return
        self._too_late(pending)

    async def _ask_status(self, pending: Pending) -> None:
        """One question at a time, one interval of silence before the next."""
        while not pending.answered.done:
            try:
                answer = await pending.client.lookup_status(pending.request.session)
            except LMCacheTrioError:
                return  # gone: whoever noticed that has settled the lookup
            if answer.asked == pending.asked or not answer.asked:
                self._take_answer(pending, answer)
            with trio.move_on_after(self._poll_interval):
                await pending.wait_settled()
