"""The faults that `FaultyTier` injects: their names, when they strike, and what they do to bytes."""

from collections.abc import Sequence
from math import inf

import attrs

from lmcache_trio.errors import ConfigError

__all__ = ["BENEATH", "KINDS", "MEANT_FOR", "OF_BYTES", "OPERATIONS", "Fault", "spoil"]

OPERATIONS = ("open", "contains", "load", "store", "delete")
KINDS = {
    "drop": "the call does nothing: a load or a question finds nothing, a store or delete claims to have been done",
    "delay": "the call comes `seconds` later",
    "hang": "the call waits until `release`, and can be cancelled",
    "hang_thread": "a thread of the call is blocked until `release`, and can't be cancelled",
    "error": "the medium fails (EIO)",
    "no_space": "the medium is full (ENOSPC)",
    "short_read": "half of the bytes arrive",
    "torn_write": "half of the bytes are kept, and nobody says so",
    "bit_flip": "one bit is another",
}
OF_BYTES = frozenset({"short_read", "torn_write", "bit_flip"})
"""They need the bytes of a call."""
MEANT_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(KINDS, OPERATIONS),
    "drop": OPERATIONS[1:],
    "short_read": ("load",),
    "torn_write": ("store",),
    "bit_flip": ("load", "store"),
}
"""In which calls a fault can strike at all."""
BENEATH = OF_BYTES | {"error", "no_space", "hang_thread"}
"""In a load or store they strike below the tier's own checks, where it can be reached."""


def _check_kind(instance: object, attribute: object, value: str) -> None:
    if value not in KINDS:
        raise ConfigError("kind", f"{value!r} is no fault; give one of {', '.join(KINDS)}")


def _check_on(instance: "Fault", attribute: object, value: str) -> None:
    if value not in OPERATIONS:
        raise ConfigError("on", f"{value!r} is no call; give one of {', '.join(OPERATIONS)}")
    if value not in MEANT_FOR[instance.kind]:
        raise ConfigError("on", f"no {instance.kind} in {value!r}; give one of {', '.join(MEANT_FOR[instance.kind])}")


def _check_rate(instance: object, attribute: object, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError("rate", f"{value!r} is no probability; give 0 to 1")


def _check_at(instance: "Fault", attribute: object, value: tuple[int, ...]) -> None:
    if any(number < 1 for number in value):
        raise ConfigError("at", f"{min(value)} is no call's number; they are counted from 1")
    if not value and not instance.rate:
        raise ConfigError("rate", "is 0, and so it would never strike; give a rate, or `at`")


def _check_seconds(instance: object, attribute: object, value: float) -> None:
    if not 0 <= value < inf:
        raise ConfigError("seconds", f"{value!r} is no time to wait; give 0 or more")


@attrs.frozen
class Fault:
    """One kind of fault: in each call *on* with probability *rate*, and in those that *at* counts (from 1).

    ConfigError for what could never strike: a torn write in a load, or neither *rate* nor *at*.
    """

    kind: str = attrs.field(validator=_check_kind, metadata={"help": "What goes wrong."})
    on: str = attrs.field(default="load", validator=_check_on, metadata={"help": "In which call."})
    rate: float = attrs.field(default=0.0, validator=_check_rate, metadata={"help": "In which share of the calls."})
    at: tuple[int, ...] = attrs.field(
        default=(), validator=_check_at, metadata={"help": "In the n-th calls, counted from 1."}
    )
    seconds: float = attrs.field(default=0.1, validator=_check_seconds, metadata={"help": "How long a `delay` is."})


def spoil(views: Sequence[memoryview], kind: str) -> None:
    """Do to bytes what *kind* does: half of each is lost, or one bit of the first is another."""
    for view in views:
        if kind == "bit_flip":
            if len(view):
                view[len(view) // 2] ^= 1
                return
        else:
            half = len(view) // 2
            view[half:] = bytes(len(view) - half)
