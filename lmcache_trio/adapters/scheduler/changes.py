"""What the server says of the chunks in its memory and on its tiers, until the host takes it.

It is bounded: a host that takes nothing for long is told that everything may have left.
"""

from collections.abc import Sequence

import attrs

from lmcache_trio._core.keys import split_digests
from lmcache_trio._wire.messages import Changed
from lmcache_trio.threads import Lock

__all__ = ["CacheChange", "CacheChanges"]

MOST = 65_536
"""Digests that wait for the host: 6 MB."""


@attrs.frozen
class CacheChange:
    """Parts of *group* that *came* into the server's memory, or *left* it; or to and from its tier of number *tier*.

    The nearest tier is 1. *cleared* comes before the two: nothing that was told earlier of the tier holds any more, in
    any group; or of memory and all tiers, if *tier* is 0.
    """

    group: int = 0
    came: Sequence[bytes] = ()
    left: Sequence[bytes] = ()
    cleared: bool = False
    tier: int = 0


class CacheChanges:
    """The loop's thread brings the server's messages, and the host's thread takes what they say."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: list[CacheChange] = []
        self._digests = 0

    def add(self, message: Changed) -> None:
        """The server says so."""
        tier_cleared = message.cleared and message.tier > 0
        if message.cleared and not tier_cleared:
            self.clear()
        came, left = split_digests(message.came), split_digests(message.left)
        with self._lock:
            self._digests += len(came) + len(left)
            if self._digests > MOST:
                self._waiting, self._digests = [CacheChange(cleared=True)], 0
            elif came or left or tier_cleared:
                self._waiting.append(CacheChange(message.group, came, left, tier_cleared, message.tier))

    def clear(self) -> None:
        """What was told before holds no more: the server is another one, or the engine has another namespace."""
        with self._lock:
            self._waiting, self._digests = [CacheChange(cleared=True)], 0

    def take(self) -> Sequence[CacheChange]:
        """What was said since the last call, in order."""
        if not self._waiting:
            return ()
        with self._lock:
            waiting, self._waiting, self._digests = self._waiting, [], 0
        return waiting
