"""What came into memory or to a tier, and what left it, since somebody looked last, by namespace.

Nothing is noted while nobody watches. A watcher is told where a chunk is now, and not each of its moves. A namespace
with more changes than `MOST` is *cleared*: whoever watched it takes nothing of it for present any more, and learns of
later changes only. So a watcher may believe too little, and never too much. No I/O and no clock here.
"""

import attrs

__all__ = ["EVERY", "MOST", "Change", "Changes"]

EVERY = b""
"""Stands for all namespaces at once, those too of which nothing else was noted."""

MOST = 8192
"""Changes of one namespace that are kept: 256 KiB of digests in one message."""


@attrs.frozen
class Change:
    """The changes of one namespace. *cleared* comes before the others: all that was told earlier is void."""

    came: list[bytes]
    left: list[bytes]
    cleared: bool


class Changes:
    """The changes of one place, memory or a tier, that nobody has taken yet."""

    def __init__(self) -> None:
        self.watched = False
        """Does anybody watch? Nothing is noted otherwise."""
        self.pending = False
        """Is there anything to take?"""
        self._is_there: dict[bytes, dict[bytes, bool]] = {}  # by namespace and digest
        self._cleared: set[bytes] = set()

    def note(self, namespace: bytes, digest: bytes, *, is_there: bool) -> None:
        """A chunk came, or left."""
        changed = self._is_there.setdefault(namespace, {})
        if len(changed) >= MOST and digest not in changed:
            self.clear(namespace)
            changed = self._is_there.setdefault(namespace, {})
        changed.pop(digest, None)  # in the order of the latest changes, which is that of a chain
        changed[digest] = is_there
        self.pending = True

    def clear(self, namespace: bytes) -> None:
        """All chunks of *namespace*, or of `EVERY` one, left at once."""
        if namespace == EVERY:
            self._is_there.clear()
        self._is_there.pop(namespace, None)
        self._cleared.add(namespace)
        self.pending = True

    def take(self) -> dict[bytes, Change]:
        """The changes by namespace, once."""
        noted, cleared = self._is_there, self._cleared
        self._is_there, self._cleared, self.pending = {}, set(), False
        found: dict[bytes, Change] = {}
        for namespace in noted.keys() | cleared:
            changed = noted.get(namespace, {})
            came = [digest for digest, is_there in changed.items() if is_there]
            left = [digest for digest, is_there in changed.items() if not is_there]
            found[namespace] = Change(came, left, namespace in cleared)
        return found
