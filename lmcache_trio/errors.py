"""The whole error tree, sorted by what the caller can do about it.

`Unavailable`: go on without the cache. `Gone`: a miss. `Misuse`: a bug or a bad setting of the caller's.
`ProtocolError`: the peer's bug. Foreign exceptions are translated into these once, at the edge, with `from exc`.
"""

__all__ = ["ConfigError", "Gone", "LMCacheTrioError", "Misuse", "ProtocolError", "Unavailable"]


class LMCacheTrioError(Exception):
    """Base of every error that this package raises on purpose."""


class Unavailable(LMCacheTrioError):
    """The server, tier or device cannot be reached or used now. Go on without it; it may come back."""


class Gone(LMCacheTrioError):
    """What was named (a lease, pin, reservation, session, chunk) does not exist any more. Treat it as a miss."""


class Misuse(LMCacheTrioError):
    """The caller broke a documented rule. The message names the argument at fault and the fix."""


class ConfigError(Misuse):
    """A setting is unknown, of the wrong type, or does not fit this machine.

    *key* is the dotted name of the setting at fault (`memory.size`); the message says how to fix it.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


class ProtocolError(LMCacheTrioError):
    """The peer sent bytes that are no message, or a message out of order. Its connection is ended."""
