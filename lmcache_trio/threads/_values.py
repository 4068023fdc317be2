"""What threads share without a loop: a mutex and a value that is handed over once. Nothing here starts a thread."""

import threading
from typing import Generic, TypeVar

__all__ = ["Handoff", "Lock", "bounded"]

T = TypeVar("T")


Lock = threading.Lock
"""A mutex for state that threads share. Not reentrant; hold it for a few lines and never wait under it."""


class Handoff(Generic[T]):
    """One value, from the loop to host threads that wait for it. A waiter sleeps on one lock: nothing is polled."""

    __slots__ = ("_gate", "_value", "done")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()
        self._value: T | None = None
        self.done = False

    def set(self, value: T) -> bool:
        """Hand *value* over. Only the first call counts; False: there was one already. Call it in one thread only."""
        if self.done:
            return False
        self._value = value
        self.done = True
        self._gate.release()
        return True

    def wait(self, timeout: float) -> T | None:
        """The value, waiting at most *timeout* seconds; None when it did not come. Every later call gives it again."""
        if not self.done and self._gate.acquire(timeout=bounded(timeout)):
            self._gate.release()
        return self._value


def bounded(timeout: float) -> float:
    """*timeout* as a lock takes it: not negative, not above what the platform can wait."""
    return min(max(timeout, 0.0), threading.TIMEOUT_MAX)
