"""The life of a chunk:

    ABSENT --begin--> WRITING --publish (all shards committed)--> READY --evict--> ABSENT
                         |                                          |
                         `--doom--> DOOMED <--doom, while retained--'--doom, not retained--> ABSENT
                                       |
                                       `--last copy into it and last reader of it ended--> ABSENT

Rule 1: every transition of a chunk lives in this file. Rule 2: no I/O and no clock here; *who* may write or read, and
until when, is the business of `index`.

A row's `refs` counts the copies into it that have not ended (WRITING), its leases, pins and holds (READY), or what is
left of either (DOOMED): its extent goes back to the arena at 0, so a DOOMED chunk's bytes stay in quarantine while any
process may still read or write them. A DOOMED chunk is out of the directory and out of the tree; its children are
roots from then on, valid by content, and a lookup reaches them again when their parent is stored anew.

Eviction is leaf first. The order holds READY chunks that nobody has retained, ancestors nearer the recent end than
their descendants. An oldest chunk that still has children can only have children outside the order (retained, or being
written): it is *parked*, which is to be READY, not retained, and not in the order; it comes back when a child
of its own comes back or goes. So each step of the search for a victim is paid for by an earlier event: O(1) amortised.
"""

from collections import OrderedDict
from collections.abc import Sequence
from enum import IntEnum

from lmcache_trio._core.arena import Arena
from lmcache_trio._core.grants import SessionKey
from lmcache_trio._core.policy import EvictionPolicy
from lmcache_trio._core.rows import TABLES, Namespace, Rows
from lmcache_trio.errors import Misuse

__all__ = ["Chunks", "State", "Writing"]


class State(IntEnum):
    """FREE is a row that is nobody's: an absent chunk has no row."""

    FREE = 0
    WRITING = 1
    READY = 2
    DOOMED = 3


_WRITING, _READY, _DOOMED = int(State.WRITING), int(State.READY), int(State.DOOMED)


class Writing:
    """What only a WRITING chunk has: who may claim its shards, and how far they are."""

    __slots__ = ("begun", "claimed", "deadline", "missing", "session")

    def __init__(self, session: SessionKey, shards: int, deadline: float, begun: set[int]) -> None:
        self.session = session
        self.begun = begun  # its session's rows, this one among them
        self.deadline = deadline
        self.claimed = bytearray(shards)
        self.missing = shards


class Chunks:
    """All chunks of all namespaces, in one arena."""

    def __init__(self, arena: Arena, policy: EvictionPolicy) -> None:
        self.arena = arena
        self.policy = policy
        self.rows = Rows()
        self.namespaces: dict[bytes, Namespace] = {}
        self._numbered: list[Namespace] = []
        self.writing: OrderedDict[int, Writing] = OrderedDict()  # by deadline, the nearest first
        self.chunks = [0, 0, 0, 0]  # by state
        self.slots = [0, 0, 0, 0]
        self.bytes = [0, 0, 0, 0]
        self.bytes_retained = 0  # of READY chunks
        self.bytes_offered = 0
        self.evictions = 0

    def attach(self, name: bytes, shard_bytes: Sequence[int]) -> None:
        lengths = tuple(shard_bytes)
        known = self.namespaces.get(name)
        if known is not None:
            if known.lengths != lengths:
                raise Misuse(f"shard_bytes is {lengths}: this namespace was attached with {known.lengths}")
            return
        if not lengths or min(lengths) < 1:
            raise Misuse(f"shard_bytes is {lengths}: give one length of 1 or more a shard")
        starts, extent = [], 0
        for length in lengths:
            starts.append(extent)
            extent += self.arena.rounded(length)
        namespace = Namespace(len(self._numbered), name, lengths, tuple(starts), extent)
        self.namespaces[name] = namespace
        self._numbered.append(namespace)

    def namespace_of(self, row: int) -> Namespace:
        return self._numbered[self.rows.namespace[row]]

    # --- ABSENT to WRITING ------------------------------------------------------------------------------------------

    def begin(self, namespace: Namespace, digest: bytes, parent: int, writing: Writing) -> int:
        """A WRITING row for *digest*, evicting what must go; 0 when there is no room.

        The row is made, and hung under *parent*, before anything is evicted: that alone keeps the chunks that it
        extends from going.
        """
        if not self.rows.has_spare():
            self.policy.extend(self.rows.grow())
        row = self.rows.add(namespace.number, digest, parent)
        offset = self.arena.allocate(namespace.extent)
        if offset is None:
            offset = self._make_room(namespace.extent)
            if offset is None:
                self._unhang(row)
                self.rows.spare(row)
                return 0
        self.rows.offset[row] = offset
        self.rows.state[row] = _WRITING
        namespace.enter(digest, row)
        self.writing[row] = writing
        writing.begun.add(row)
        self._count(_WRITING, namespace, 1)
        return row

    def _make_room(self, extent: int) -> int | None:
        arena, policy, first_child = self.arena, self.policy, self.rows.first_child
        if self.bytes[_READY] - self.bytes_retained + arena.free_bytes < extent:
            return None  # all that could go would not do: let it stay
        while row := policy.oldest():
            policy.remove((row,))
            if first_child[row]:
                continue  # parked
            namespace = self.namespace_of(row)
            namespace.leave(self.rows.digest(row))
            self._count(_READY, namespace, -1)
            self.evictions += 1
            self._unhang(row)
            self._give_back(row, namespace)
            if arena.largest_hole >= extent:
                return arena.allocate(extent)
        return None

    # --- WRITING ----------------------------------------------------------------------------------------------------

    def claim(self, row: int, shard: int, deadline: float) -> int:
        """A copy into *shard* of a WRITING chunk begins, and may take until *deadline*. Returns its place."""
        writing = self.writing[row]
        writing.claimed[shard] = 1
        if deadline > writing.deadline:
            writing.deadline = deadline
            self.writing.move_to_end(row)
        self.rows.refs[row] += 1
        return self.rows.offset[row] + self.namespace_of(row).starts[shard]

    def commit(self, namespace: Namespace, rows: Sequence[int], shards: int) -> list[int]:
        """*shards* copies into each of *rows* ended well. Returns those that became READY by it, in order.

        A row that was doomed meanwhile only has its copies counted as ended.
        """
        state, refs, details = self.rows.state, self.rows.refs, self.writing
        published = []
        for row in rows:
            if state[row] == _WRITING:
                refs[row] -= shards
                writing = details[row]
                writing.missing -= shards
                if not writing.missing:
                    del details[row]
                    writing.begun.remove(row)
                    state[row] = _READY
                    published.append(row)
            else:
                self.let_go_doomed(row, shards)
        if published:
            self._count(_WRITING, namespace, -len(published))
            self._count(_READY, namespace, len(published))
            self._touch_upwards(published)
        return published

    # --- READY: readers ---------------------------------------------------------------------------------------------

    def match(self, namespace: Namespace, digests: Sequence[bytes]) -> int:
        state, find = self.rows.state, namespace.find
        count = 0
        for digest in digests:
            if state[find(digest)] != _READY:
                break
            count += 1
        return count

    def offer(self, namespace: Namespace, digests: Sequence[bytes], limit: int) -> list[int]:
        """Retain the leading READY run, cut where all offered chunks together would hold more than *limit* bytes."""
        rows = self.rows
        state, refs, offered, tables = rows.state, rows.refs, rows.offered, namespace.tables
        extent, room = namespace.extent, limit - self.bytes_offered
        run: list[int] = []
        fresh: list[int] = []
        for digest in digests:
            row = tables[digest[0] % TABLES].get(digest, 0)
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
        self.bytes_retained += extent * len(fresh)
        self.policy.remove(fresh)
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
            self.policy.remove(fresh)
            self.bytes_retained += len(fresh) * self.namespace_of(fresh[0]).extent

    def release(self, rows: Sequence[int], *, touch: bool) -> None:
        """One reader less of each of *rows*, ancestors first in it. *touch*: they were used just now."""
        idle = self._let_go(rows)
        if not idle:
            return
        if touch:
            self._touch_upwards(idle)
        else:
            for row in idle:
                self._put_back(row)

    def _let_go(self, rows: Sequence[int]) -> list[int]:
        state, refs = self.rows.state, self.rows.refs
        idle = []
        for row in rows:
            if state[row] == _READY:
                count = refs[row] - 1
                refs[row] = count
                if not count:
                    idle.append(row)
            else:
                self.let_go_doomed(row)
        if idle:
            self.bytes_retained -= len(idle) * self.namespace_of(idle[0]).extent
        return idle

    # --- DOOMED, and back to ABSENT ---------------------------------------------------------------------------------

    def doom(self, row: int) -> None:
        """Take a WRITING or READY chunk out of sight at once; its bytes stay while anyone may touch them."""
        namespace = self.namespace_of(row)
        state = self.rows.state[row]
        namespace.leave(self.rows.digest(row))
        self._count(state, namespace, -1)
        retained = self.rows.refs[row]
        if state == _WRITING:
            self.writing.pop(row).begun.remove(row)
        elif retained:
            self.bytes_retained -= namespace.extent
        else:
            self.policy.remove((row,))
        self._unhang(row)
        if retained:
            self.rows.state[row] = _DOOMED
            self._count(_DOOMED, namespace, 1)
        else:
            self._give_back(row, namespace)

    def let_go_doomed(self, row: int, count: int = 1) -> None:
        """*count* copies into, or readers of, a DOOMED chunk ended; the last one frees it."""
        refs = self.rows.refs
        refs[row] -= count
        if not refs[row]:
            namespace = self.namespace_of(row)
            self._count(_DOOMED, namespace, -1)
            self._give_back(row, namespace)

    def _give_back(self, row: int, namespace: Namespace) -> None:
        self.arena.free(self.rows.offset[row], namespace.extent)
        self.rows.spare(row)

    def clear(self, namespace: Namespace) -> int:
        """Doom every chunk of *namespace*. Returns how many there were."""
        rows = [row for table in namespace.tables for row in table.values()]
        rows.sort(key=self.rows.offset.__getitem__)  # one hole grows, instead of many
        for row in rows:
            self.doom(row)
        return len(rows)

    # --- order ------------------------------------------------------------------------------------------------------

    def _touch_upwards(self, rows: list[int]) -> None:
        """Bring *rows* (ancestors first) and all their ancestors to the recent end, deepest first."""
        parent, state, refs = self.rows.parent, self.rows.state, self.rows.refs
        order = []
        at = len(rows)
        while at:
            at -= 1
            row = rows[at]
            order.append(row)
            above, stop = parent[row], rows[at - 1] if at else 0
            while above != stop and above:
                if state[above] == _READY and not refs[above]:
                    order.append(above)
                above = parent[above]
        self.policy.touch(order)

    def _put_back(self, row: int) -> None:
        """Put *row* just below its nearest ancestor in order, and before it the parked ancestors that it kept out."""
        policy, parent, state, refs = self.policy, self.rows.parent, self.rows.state, self.rows.refs
        chain = []
        while row and row not in policy and state[row] == _READY and not refs[row]:
            chain.append(row)
            row = parent[row]
        if not chain:
            return
        while row and row not in policy:
            row = parent[row]
        for row_below in reversed(chain):
            policy.insert(row_below, row)
            row = row_below

    def _unhang(self, row: int) -> None:
        above = self.rows.detach(row)
        if above:
            self._put_back(above)

    def _count(self, state: int, namespace: Namespace, more: int) -> None:
        self.chunks[state] += more
        self.slots[state] += more * namespace.shards
        self.bytes[state] += more * namespace.extent
