"""The life of a chunk:

    ABSENT --begin--> WRITING --publish (all shards committed)--> READY --evict--> ABSENT
                         |                                          |
                         |                                          `--replace--> stale --sweep, not retained--> ABSENT
                         `--doom--> DOOMED <--sweep, while retained-----------------'
                                       |
                                       `--last copy into it and last reader of it ended--> ABSENT

Rule 1: every transition of a chunk lives in this file. Rule 2: no I/O and no clock here; *who* may write or read, and
until when, is the business of `index`, and which goes first that of `order`.

A row's `refs` counts the copies into it that have not ended (WRITING), its leases, pins and holds (READY), or what is
left of either (DOOMED): its extent goes back to the arena at 0, so a DOOMED chunk's bytes stay in quarantine while any
process may still read or write them. A DOOMED chunk is out of the directory and out of the tree; its children are
roots from then on, valid by content, and a lookup reaches them again when their parent is stored anew.

A reset replaces a namespace's whole generation at once. *Stale* is what READY is called in a replaced generation: in no
directory, linked in a tree that nobody follows, and given back piece by piece before anything else is evicted. A stale
chunk that is retained becomes DOOMED when the sweep meets it, or goes with its last reader if that is sooner.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence

from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.generations import DOOMED, READY, WRITING, Generations, Namespace
from lmcache_trio._core.index.order import Order
from lmcache_trio._core.index.policy import EvictionPolicy
from lmcache_trio._core.index.rows import Rows

__all__ = ["MOST_EVICTED", "Chunks", "Writing"]

MOST_EVICTED = 4
"""Times its own length that is evicted for one chunk's room before it gets none, while anything else is in use.

Measured with one chunk in twenty leased and chunks eight times as long coming in: of stores whose neighbours are used
together, as nearly all are, 98 of 100 find a hole within it; of chunks used in an order that is random, 65, until there
are holes of their length. Each that fails leaves what it evicted free, so the next one begins where it ended.
"""


class Writing:
    """What only a WRITING chunk has: who may claim its shards, and how far they are."""

    __slots__ = ("claimed", "deadline", "engine", "missing")

    def __init__(self, engine: str, shards: int, deadline: float) -> None:
        self.engine = engine
        self.deadline = deadline
        self.claimed = 0  # a bit a shard
        self.missing = shards


class Chunks:
    """All chunks of all namespaces, in one arena."""

    def __init__(self, arena: Arena, policy: EvictionPolicy, write_share: float = 1.0) -> None:
        self.arena = arena
        self.policy = policy
        self._write_share = write_share
        self.rows = Rows()
        self.order = Order(self.rows, policy)
        self._generations = Generations()
        self.namespaces = self._generations.present
        self.writing: OrderedDict[int, Writing] = OrderedDict()  # by deadline, the nearest first
        self.bytes_offered = 0
        self.evictions = 0
        self._quarantined: dict[int, str] = {}  # rows that were doomed while they were written, and by which engine
        self._written_by: Counter[str] = Counter()  # bytes that are WRITING, or in that quarantine, by engine
        self._bytes_written = 0  # by all engines
        self._bytes_idle = 0  # of READY and stale chunks that are not retained: what room can be made of

    def attach(self, name: bytes, shard_bytes: Sequence[int]) -> None:
        self._generations.attach(name, shard_bytes, self.arena.rounded)

    def detach(self, namespace: Namespace) -> None:
        self._generations.detach(namespace)

    @property
    def unused(self) -> "OrderedDict[bytes, Namespace]":
        """Namespaces that no engine uses and that hold chunks; the one that was left longest ago comes first."""
        return self._generations.unused

    def namespace_of(self, row: int) -> Namespace:
        return self._generations[self.rows.namespace[row]]

    # --- ABSENT to WRITING ------------------------------------------------------------------------------------------

    def may_write(self, engine: str, extent: int) -> bool:
        """Whether *extent* bytes more are within the share of *engine*: of the arena without what others write.

        So a number of engines that never commit leaves a part of the arena: of n engines with a share s each, (1 - s)^n
        or more. One chunk is always within it. What the server loads is not bounded here.
        """
        mine = self._written_by.get(engine, 0)
        if not mine or not engine or self._write_share == 1:
            return True
        others = self._bytes_written - mine
        return mine + extent <= self._write_share * (self.arena.taken - others)

    def bytes_written_by(self, engine: str) -> int:
        """Bytes of the chunks that *engine* began and has not committed, those in quarantine among them."""
        return self._written_by.get(engine, 0)

    def begin(self, namespace: Namespace, digest: bytes, parent: int, writing: Writing) -> int:
        """A WRITING row for *digest*, evicting what must go; 0 when there is no room.

        The row is made, and hung under *parent*, before anything is evicted: that alone keeps the chunks that it
        extends from going.
        """
        rows = self.rows
        if not rows.has_spare():
            self.policy.extend(rows.grow())
        row = rows.add(namespace.number, digest, parent)
        offset = self.arena.allocate(namespace.extent)
        if offset is None:
            offset = self._make_room(namespace.extent, wanting=row)
            if offset is None:
                self.order.unhang(row)
                rows.spare(row)
                return 0
        rows.offset[row] = offset
        rows.state[row] = WRITING
        namespace.enter(digest, row)
        self.writing[row] = writing
        self._written_by[writing.engine] += namespace.extent
        self._bytes_written += namespace.extent
        namespace.counts[WRITING] += 1
        return row

    def _make_room(self, extent: int, wanting: int) -> int | None:
        """The place of *extent* bytes for the row *wanting*, whose ancestors stay."""
        arena = self.arena
        if self._bytes_idle + arena.free_bytes < extent:
            return None  # all that could go would not do: let it stay
        outdated = self._generations.outdated
        while outdated:
            self._sweep_one(outdated[0])
            if arena.largest_hole >= extent:
                return arena.allocate(extent)
        # With nothing in use all of it can go, so there will be a hole. What stays may lie so that there never is one:
        # the idle cache is not flushed to find that out.
        all_may_go = self._bytes_idle == arena.used and not self.rows.parent[wanting]
        bound = math.inf if all_may_go else MOST_EVICTED * extent
        for row in self.order.victims():
            namespace = self.namespace_of(row)
            namespace.leave(self.rows.digest(row))
            self.order.unhang(row)
            self.evictions += 1
            if namespace.extent == extent:  # as nearly always: its very place is what is wanted
                namespace.counts[READY] -= 1
                self._bytes_idle -= extent
                self.rows.spare(row)
                if not namespace.users:
                    self._generations.leave(namespace)
                return self.rows.offset[row]
            bound -= namespace.extent
            self._drop(row, namespace)
            if arena.largest_hole >= extent:
                return arena.allocate(extent)
            if bound <= 0:
                return None
        return None

    # --- WRITING ----------------------------------------------------------------------------------------------------

    def claim(self, row: int, namespace: Namespace, shard: int, deadline: float) -> int:
        """A copy into *shard* of a WRITING chunk begins, and may take until *deadline*. Returns its place."""
        writing = self.writing[row]
        writing.claimed |= 1 << shard
        if deadline > writing.deadline:
            writing.deadline = deadline
            self.writing.move_to_end(row)
        self.rows.refs[row] += 1
        return self.rows.offset[row] + namespace.starts[shard]

    def commit(self, namespace: Namespace, rows: Sequence[int], shards: int) -> list[int]:
        """*shards* copies into each of *rows* ended well. Returns those that became READY by it, in order.

        A row that was doomed meanwhile only has its copies counted as ended.
        """
        state, refs, details = self.rows.state, self.rows.refs, self.writing
        published = []
        for row in rows:
            if state[row] == WRITING:
                refs[row] -= shards
                writing = details[row]
                writing.missing -= shards
                if not writing.missing:
                    del details[row]
                    self._end_writing(writing.engine, namespace.extent)
                    state[row] = READY
                    published.append(row)
            else:
                self.let_go_doomed(row, shards)
        if published:
            namespace.counts[WRITING] -= len(published)
            namespace.counts[READY] += len(published)
            self._bytes_idle += len(published) * namespace.extent
            self.order.touch_upwards(published)
        return published

    # --- READY: readers ---------------------------------------------------------------------------------------------

    def match(self, namespace: Namespace, digests: Sequence[bytes]) -> int:
        state, find = self.rows.state, namespace.find
        count = 0
        for digest in digests:
            if state[find(digest)] != READY:
                break
            count += 1
        return count

    def offer(self, namespace: Namespace, digests: Sequence[bytes], limit: int) -> list[int]:
        """Retain the leading READY run, cut where all offered chunks together would hold more than *limit* bytes."""
        rows = self.rows
        state, refs, offered, table_of = rows.state, rows.refs, rows.offered, namespace.table_of
        extent, room = namespace.extent, limit - self.bytes_offered
        run: list[int] = []
        fresh: list[int] = []
        for digest in digests:
            row = table_of[digest[0]].get(digest, 0)
            if state[row] != 2:  # READY, spelt out: this loop is the server's hottest
                break
            if not offered[row]:
                if room < extent:
                    break
                room -= extent
            offered[row] += 1
            count = refs[row]
            if not count:
                fresh.append(row)
            refs[row] = count + 1
            run.append(row)
        self.bytes_offered = limit - room
        self._retained(fresh, namespace)
        return run

    def unoffer(self, rows: Sequence[int]) -> None:
        """*rows* are not held by an offered lease any more, by one lease."""
        offered = self.rows.offered
        gone = 0
        for row in rows:
            count = offered[row] - 1
            offered[row] = count
            if not count:
                gone += 1
        if gone:
            self.bytes_offered -= gone * self.namespace_of(rows[0]).extent

    def retain(self, rows: Sequence[int]) -> None:
        """One more reader of each of *rows*, which are READY or retained already."""
        refs = self.rows.refs
        fresh = []
        for row in rows:
            if not refs[row]:
                fresh.append(row)
            refs[row] += 1
        if fresh:
            self._retained(fresh, self.namespace_of(fresh[0]))

    def _retained(self, rows: list[int], namespace: Namespace) -> None:
        self.policy.remove(rows)
        namespace.retained += len(rows)
        self._bytes_idle -= len(rows) * namespace.extent

    def release(self, rows: Sequence[int], *, touch: bool) -> None:
        """One reader less of each of *rows*, ancestors first in it. *touch*: they were used just now."""
        namespace, refs = self.namespace_of(rows[0]), self.rows.refs
        if namespace.replaced:
            self._release_stale(rows, namespace)
            return
        idle = []
        for row in rows:
            count = refs[row] - 1
            refs[row] = count
            if not count:
                idle.append(row)
        if not idle:
            return
        namespace.retained -= len(idle)
        self._bytes_idle += len(idle) * namespace.extent
        if touch:
            self.order.touch_upwards(idle)
        else:
            for row in idle:
                self.order.put_back(row)

    def _release_stale(self, rows: Sequence[int], namespace: Namespace) -> None:
        state, refs = self.rows.state, self.rows.refs
        for row in rows:
            if state[row] == DOOMED:
                self.let_go_doomed(row)
                continue
            refs[row] -= 1
            if not refs[row]:
                self._bytes_idle += namespace.extent
                self.rows.unlink(row)
                self._drop(row, namespace)

    # --- DOOMED, and back to ABSENT ---------------------------------------------------------------------------------

    def doom(self, row: int) -> None:
        """Take a WRITING chunk out of sight at once; its bytes stay while anyone may write or read them."""
        namespace = self.namespace_of(row)
        namespace.leave(self.rows.digest(row))
        namespace.counts[WRITING] -= 1
        engine = self.writing.pop(row).engine
        self.order.unhang(row)
        if self.rows.refs[row]:
            self.rows.state[row] = DOOMED
            namespace.counts[DOOMED] += 1
            self._quarantined[row] = engine
        else:
            self._end_writing(engine, namespace.extent)
            self._give_back(row, namespace)
            if not namespace.users:
                self._generations.leave(namespace)

    def let_go_doomed(self, row: int, count: int = 1) -> None:
        """*count* copies into, or readers of, a DOOMED chunk ended; the last one frees it."""
        refs = self.rows.refs
        refs[row] -= count
        if not refs[row]:
            namespace = self.namespace_of(row)
            namespace.counts[DOOMED] -= 1
            if row in self._quarantined:
                self._end_writing(self._quarantined.pop(row), namespace.extent)
            self._give_back(row, namespace)
            self._generations.leave(namespace)

    def _end_writing(self, engine: str, extent: int) -> None:
        self._bytes_written -= extent
        self._written_by[engine] -= extent
        if not self._written_by[engine]:
            del self._written_by[engine]

    def _drop(self, row: int, namespace: Namespace) -> None:
        """Give back a READY or stale chunk, which nobody retains and which is out of tree and order."""
        namespace.counts[READY] -= 1
        self._bytes_idle -= namespace.extent
        self._give_back(row, namespace)
        if not namespace.users:
            self._generations.leave(namespace)

    def _give_back(self, row: int, namespace: Namespace) -> None:
        self.arena.free(self.rows.offset[row], namespace.extent)
        self.rows.spare(row)

    # --- a generation's end -----------------------------------------------------------------------------------------

    def replace(self, namespace: Namespace) -> int:
        """Put an empty generation in the place of *namespace*, of which nothing is WRITING: all of it is stale.

        Returns how many chunks that are. Costs the same however many; `sweep` gives them back.
        """
        count = namespace.counts[READY]
        if count:
            self._generations.replace(namespace)
        return count

    def retire(self, namespace: Namespace) -> None:
        """As `replace`, and nothing takes its place."""
        self._generations.retire(namespace)

    def sweep(self, limit: int) -> bool:
        """Deal with up to *limit* chunks of replaced generations. Is there more to do?"""
        outdated = self._generations.outdated
        while outdated and limit > 0:
            self._sweep_one(outdated[0])
            limit -= 1
        return bool(outdated)

    def _sweep_one(self, namespace: Namespace) -> None:
        # Each table gives its youngest chunk in turn, so places come back about in order and few holes are made; the
        # directory itself is taken apart by it: freeing that in one go would take as long as all tables' entries do.
        rows, table = self.rows, namespace.tables.pop()
        if table:
            namespace.tables.insert(0, table)
            _, row = table.popitem()
            # what was retained may be gone already, and its row another chunk's
            if rows.state[row] == READY and rows.namespace[row] == namespace.number:
                rows.unlink(row)
                if rows.refs[row]:
                    rows.state[row] = DOOMED
                    namespace.counts[READY] -= 1
                    namespace.counts[DOOMED] += 1
                else:
                    self.policy.remove((row,))
                    self._drop(row, namespace)
        elif not namespace.tables:
            self._generations.outdated.popleft()
            self._generations.leave(namespace)

    def held(self) -> dict[str, int]:
        """What `statistics` says of chunks."""
        return self._generations.held() | {"bytes_offered": self.bytes_offered}
