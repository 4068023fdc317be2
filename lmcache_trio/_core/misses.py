"""Why a lookup missed: one reason for each missed chunk, from what the server knows of the first one.

The chunks behind the first missed chunk are missing because of it, so its reason is that of the run; but a run whose
end was never stored is cut there, since that end is new. `reason_of` has all cases, in their order.

Rule: no I/O, no clock and no state here.
"""

from collections.abc import Callable
from enum import Enum, StrEnum

import attrs

from lmcache_trio._core.departures import Cause, Departure

__all__ = ["InMemory", "InTiers", "Missed", "Reason", "Seen", "known_run", "reason_of", "reasons_of"]


class Reason(StrEnum):
    """Why a chunk was missed. docs/howto/operate.md says what to do about each."""

    NEVER_STORED = "never_stored"
    NEW_TAIL = "new_tail"
    EVICTED = "evicted"
    WRITING = "writing"
    LATE = "late"
    TIER_FENCED = "tier_fenced"
    NOT_ADMITTED = "not_admitted"
    LEASE_SHARE = "lease_share"
    RESET = "reset"
    NOT_REGISTERED = "not_registered"
    TOO_LARGE = "too_large"
    STOPPING = "stopping"


class InMemory(Enum):
    """Where memory had the chunk."""

    ABSENT = "absent"
    WRITING = "writing"
    READY = "ready"


class InTiers(Enum):
    """What became of the question to the tiers."""

    NONE = "none"
    """There are no tiers, or none has the chunk."""
    UNASKED = "unasked"
    """The lookup left tiers no time."""
    LATE = "late"
    """A tier had not answered, or not loaded, when the time was over."""
    CLOSED = "closed"
    """A tier that may have it is out of use."""
    NO_SHARE = "no_share"
    """A tier has it, and lease_share leaves no room for it."""
    NO_ROOM = "no_room"
    """A tier has it, and memory had no room for it: all of it is in use."""
    UNWRITTEN = "unwritten"
    """A tier was offered it, and did not take it."""


@attrs.frozen
class Seen:
    """What the server knows of a run's first chunk, the *position*-th of its prompt.

    *refill*: the engine's cache was reset, and has not been filled again.
    """

    position: int
    memory: InMemory = InMemory.ABSENT
    tiers: InTiers = InTiers.NONE
    left: Departure | None = None
    registered: bool = True
    fits: bool = True
    stopping: bool = False
    refill: bool = False


@attrs.frozen
class Missed:
    """A run of *chunks* missed chunks from *position* on, all for one *reason*."""

    reason: Reason
    position: int
    chunks: int


def reason_of(seen: Seen) -> Reason:
    """The reason of the run that begins with the chunk of *seen*. The first case that fits counts."""
    if not seen.registered:
        return Reason.NOT_REGISTERED
    if not seen.fits:
        return Reason.TOO_LARGE
    if seen.stopping:
        return Reason.STOPPING
    # Memory or a tier has it, or a tier could not say. A load that is late is WRITING.
    if seen.memory is InMemory.READY:
        return Reason.LEASE_SHARE
    if seen.tiers is InTiers.LATE:
        return Reason.LATE
    if seen.memory is InMemory.WRITING:
        return Reason.WRITING
    if seen.tiers is InTiers.NO_SHARE:
        return Reason.LEASE_SHARE
    if seen.tiers is InTiers.NO_ROOM:
        return Reason.NOT_ADMITTED
    # It was there once, or should have been.
    if seen.left is not None:
        if seen.left.cause is not Cause.EVICTED or seen.tiers is InTiers.UNWRITTEN:
            return Reason.NOT_ADMITTED
        if seen.tiers is InTiers.CLOSED:
            return Reason.TIER_FENCED
        return Reason.LATE if seen.tiers is InTiers.UNASKED else Reason.EVICTED
    # Nothing is known of it. If the chunk before it is there, a chunk that left would be known too.
    if seen.position:
        return Reason.NEW_TAIL
    if seen.tiers is InTiers.CLOSED:
        return Reason.TIER_FENCED
    return Reason.RESET if seen.refill else Reason.NEVER_STORED


def _is_known(seen: Seen) -> bool:
    """Whether the run of *seen* ends with the last chunk that is known. Else its reason holds for the whole rest."""
    if not seen.registered or not seen.fits or seen.stopping:
        return False
    if seen.memory is not InMemory.ABSENT or seen.tiers in (InTiers.LATE, InTiers.NO_SHARE, InTiers.NO_ROOM):
        return True
    return seen.left is not None and seen.left.cause is Cause.EVICTED


def reasons_of(seen: Seen, end: int, run: Callable[[], int]) -> list[Missed]:
    """The runs from the chunk of *seen* to *end*, one or two.

    *run* says where the chunks end of which memory or tiers know or knew anything; it is asked only if that matters.
    """
    reason, start = reason_of(seen), seen.position
    known = min(end, max(start + 1, run())) if _is_known(seen) else end
    tail = [Missed(Reason.NEW_TAIL, known, end - known)] if known < end else []
    return [Missed(reason, start, known - start), *tail]


def known_run(known: Callable[[int], bool], start: int, end: int) -> int:
    """Where the run of known chunks from *start* on ends, up to *end*. O(log n) calls of *known*.

    Chunks of a prompt are stored from its beginning and leave from its end, so the known ones are a run; of one with
    gaps any gap may be found.
    """
    low, high, step = start, start + 1, 1
    while high < end and known(high):
        low, step = high, step * 2
        high = low + step
    high = min(high, end)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if known(middle) else (low, middle)
    return high
