"""How many tokens would hit with more memory, or with less: a live curve of the hit ratio by size.

A chunk that was used hits again if fewer bytes of other chunks were used in between than fit beside it: that is its
*reuse distance*. To measure each would cost more than a lookup, so only chunks whose digest is below a threshold are
looked at (SHARDS: Waldspurger, Park, Garthwaite, Ahmad, FAST 2015). At a rate R each of them stands for 1 / R chunks,
and a distance among them for 1 / R as many bytes. The sample is bounded: when it is full it forgets chunks that would
not fit into the largest size of interest, or halves its rate. If the sampled chunks were used less often than chunks in
general, or more often, the rest counts at distance 0 (SHARDS-adj): it is of the few hot chunks that begin many prompts.

The model is LRU over whole chunks. A lookup uses all chunks of its prompt at once, the first chunk last, as the index
does. What a miss means otherwise (a store that was dropped, a reset, a lease) is not in it. No I/O and no clock here.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

__all__ = ["FACTORS", "MOST_SAMPLED", "SizeCurve"]

FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Multiples of a size for which the hit ratio is told."""
FIRST_RATE = 3
"""The first rate is 1 / 2**3. A lookup of 32 chunks then samples 4, and pays some 6 us for them."""
MOST_SAMPLED = 16_384
"""Chunks in the sample, at some 300 bytes each. With the largest size as full as that, the real one has an eighth."""
MOST_REFERENCES = 1 << 17
"""Sampled uses after which all counts are halved, so that the curve follows what engines ask for now."""
_FAN = 64  # children of a node in the tree of sums
_SLOTS = _FAN**3
_STEPS = 16  # of the histogram in each power of two


class SizeCurve:
    """The sample, and the histogram of its reuse distances.

    *most_bytes* is asked for the largest size of interest when the sample is full. *rate* is the first rate's exponent.
    """

    def __init__(
        self, most_bytes: Callable[[], int], *, rate: int = FIRST_RATE, most_sampled: int = MOST_SAMPLED
    ) -> None:
        self._most_bytes = most_bytes
        self._most_sampled = most_sampled
        self._rate = rate  # R = 1 / 2**rate
        self._below = 1 << 32 - rate
        self._first_below = -(-self._below >> 24)  # what the first byte must be below
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # by digest, the least recently used first
        # Bytes of the chunk in each slot, and of 64 and 4,096 slots. Later slots were used later.
        self._bytes, self._by_64, self._by_4096 = [0] * _SLOTS, [0] * _FAN**2, [0] * _FAN
        self._next = 0
        self._total = 0
        self._tokens = 0.0  # that were asked for
        self._sampled = 0.0  # of them, those of sampled chunks, times 1 / R
        self._hits = [0.0] * (64 * _STEPS)  # of `_sampled`, by reuse distance
        self._references = 0

    @property
    def sampled(self) -> int:
        """Chunks in the sample."""
        return len(self._slot_of)

    def looked_up(self, digests: Sequence[bytes], chunk_bytes: int, chunk_tokens: int) -> None:
        """A lookup asks for the chunks *digests* of one prompt, each of *chunk_bytes* bytes."""
        self._tokens += len(digests) * chunk_tokens
        below = self._first_below
        if sampled := [digest for digest in digests if digest[0] < below]:
            self._use(sampled, chunk_bytes, chunk_tokens)
            self._references += len(sampled)
            self._bound()

    def stored(self, digests: bytes, chunk_bytes: int) -> None:
        """A store brings the chunks of *digests*, which are packed. Those of a lookup before it are known."""
        firsts, below = digests[::32], self._first_below
        for i in [i for i, first in enumerate(firsts) if first < below]:
            digest = digests[32 * i : 32 * i + 32]
            if digest not in self._slot_of and int.from_bytes(digest[:4], "big") < self._below:
                self._place(digest, chunk_bytes)
                self._bound()

    def hit_ratio(self, size: int) -> float:
        """The share of tokens that would hit with memory of *size* bytes; 0 before the first lookup."""
        bucket, share = _bucket(size)
        hits = self._tokens - self._sampled + sum(self._hits[:bucket]) + share * self._hits[bucket]
        return min(1.0, max(0.0, hits / self._tokens)) if self._tokens else 0.0

    def table(self, size: int) -> dict[str, float]:
        """The hit ratio by each of `FACTORS`, as multiples of *size*; empty before the first lookup."""
        return {f"{factor:g}": self.hit_ratio(int(factor * size)) for factor in FACTORS} if self._tokens else {}

    def _use(self, digests: Sequence[bytes], chunk_bytes: int, chunk_tokens: int) -> None:
        """Measure the distances of *digests*, then make them the most recent ones, the first of them last."""
        slot_of, rate, sizes, hits = self._slot_of, self._rate, self._bytes, self._hits
        if rate > 8:
            digests = [digest for digest in digests if int.from_bytes(digest[:4], "big") < self._below]
        weight = chunk_tokens << rate
        self._sampled += weight * len(digests)
        slots = [slot_of.get(digest, -1) for digest in digests]
        above, after = 0, -1
        for slot in slots:
            if slot < 0:
                continue
            if slot + 1 == after:  # as nearly always: the two were used together before
                above += sizes[after]
            else:
                above = self._above(slot)
            after = slot
            hits[_bucket((above << rate) + chunk_bytes)[0]] += weight
        if slots and slots[0] == self._next - 1 >= 0 and slots == list(range(slots[0], slots[0] - len(slots), -1)):
            return  # they are the most recent ones, in this order
        for digest in reversed(digests):
            self._place(digest, chunk_bytes)

    # --- the sample -------------------------------------------------------------------------------------------------

    def _above(self, slot: int) -> int:
        """Bytes of the chunks that were used later than the one in *slot*."""
        node, far = slot // _FAN, slot // _FAN**2
        return (
            sum(self._bytes[slot + 1 : (node + 1) * _FAN])
            + sum(self._by_64[node + 1 : (far + 1) * _FAN])
            + sum(self._by_4096[far + 1 :])
        )

    def _vacate(self, slot: int) -> None:
        size = self._bytes[slot]
        self._bytes[slot] = 0
        self._by_64[slot // _FAN] -= size
        self._by_4096[slot // _FAN**2] -= size
        self._total -= size

    def _place(self, digest: bytes, chunk_bytes: int) -> None:
        """Make *digest* the most recent one."""
        if self._next == _SLOTS:
            self._renumber()
        former = self._slot_of.get(digest)
        if former is not None:
            self._vacate(former)
        slot = self._next
        self._next += 1
        self._slot_of[digest] = slot
        self._slot_of.move_to_end(digest)
        self._bytes[slot] = chunk_bytes
        self._by_64[slot // _FAN] += chunk_bytes
        self._by_4096[slot // _FAN**2] += chunk_bytes
        self._total += chunk_bytes

    def _renumber(self) -> None:
        """Give the slots anew, without gaps: some 4 ms, after 250,000 uses of sampled chunks."""
        sizes = [self._bytes[slot] for slot in self._slot_of.values()]
        for slot, digest in enumerate(self._slot_of):
            self._slot_of[digest] = slot
        self._next = len(sizes)
        self._bytes = sizes + [0] * (_SLOTS - len(sizes))
        self._by_64 = list(_sums(self._bytes))
        self._by_4096 = list(_sums(self._by_64))

    def _bound(self) -> None:
        """Keep the sample and the counts within their bounds."""
        if len(self._slot_of) > self._most_sampled:
            most, enough = self._most_bytes(), self._most_sampled * 7 // 8
            while len(self._slot_of) > enough and self._total << self._rate > most:
                self._vacate(self._slot_of.popitem(last=False)[1])
            while len(self._slot_of) > enough:
                self._lower_rate()
        if self._references > MOST_REFERENCES:
            self._references //= 2
            self._tokens /= 2
            self._sampled /= 2
            self._hits = [hits / 2 for hits in self._hits]

    def _lower_rate(self) -> None:
        self._rate += 1
        self._below >>= 1
        self._first_below = -(-self._below >> 24)
        for digest in [each for each in self._slot_of if int.from_bytes(each[:4], "big") >= self._below]:
            self._vacate(self._slot_of.pop(digest))


def _bucket(size: int) -> tuple[int, float]:
    """The step of *size* bytes in the histogram, and which part of the step lies below it."""
    if size < _STEPS:
        return size, 0.0
    shift = size.bit_length() - 5
    return (shift + 1) * _STEPS + (size >> shift) - _STEPS, (size & (1 << shift) - 1) / (1 << shift)


def _sums(numbers: Sequence[int]) -> Iterator[int]:
    for i in range(0, len(numbers), _FAN):
        yield sum(numbers[i : i + _FAN])
