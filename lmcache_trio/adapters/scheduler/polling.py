"""A scheduler's side whose check waits and gives the definitive count, for engines that ask once and go on.

The host sends and waits on a lock, and the Trio thread wakes it: a lookup that memory answers is one request and one
reply, with one hop. After each `poll_interval` without an answer it asks the server for the lookup's status, so that a
lost message does not lose the answer. It changes `check_lookup_result` alone.
"""

from lmcache_trio.adapters.scheduler.adapter import SchedulerAdapter

__all__ = ["PollingSchedulerAdapter"]


class PollingSchedulerAdapter(SchedulerAdapter):
    """As `SchedulerAdapter`; `check_lookup_result` waits, `lookup_timeout` at most, and never gives None."""

    def check_lookup_result(self, request_id: str) -> int:
        """How many leading tokens may be loaded, definitively. 0 if the server is late, unhealthy or gone."""
        found = super().check_lookup_result(request_id)
        while found is None:
            self.wait_lookups([request_id], self.poll_interval)
            found = super().check_lookup_result(request_id)
            if found is None:
                self.ask_lookup_status(request_id)
        return found
