"""A scheduler's side whose check waits and gives the definitive count, for engines that ask once and go on.

The host sends, waits on a lock, and the Trio thread wakes it: a lookup answered from memory is one request and one
reply, with one hop. After each `poll_interval` without an answer the server is asked what became of it, so that a lost
message does not lose the answer. It changes nothing but `check_lookup_result`.
"""

from lmcache_trio.adapters.scheduler.adapter import SchedulerAdapter

__all__ = ["PollingSchedulerAdapter"]


class PollingSchedulerAdapter(SchedulerAdapter):
    """As `SchedulerAdapter`; `check_lookup_result` waits, `lookup_timeout` at most, and never gives None."""

    def check_lookup_result(self, request_id: str) -> int:
        """How many leading tokens may be loaded: definitive. Late, unhealthy or gone is 0."""
        found = super().check_lookup_result(request_id)
        while found is None:
            self.wait_lookups([request_id], self.poll_interval)
            found = super().check_lookup_result(request_id)
            if found is None:
                self.ask_lookup_status(request_id)
        return found
