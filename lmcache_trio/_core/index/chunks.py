"""The chunks in memory: rows, the tree that prefixes form, the order of eviction, and the life of a chunk.

    ABSENT --begin--> WRITING --publish (all shards committed)--> READY --evict--> ABSENT
                         |                                          |
                         |                                          `--reset--> stale --sweep, not read--> ABSENT
                         `--doom--> DOOMED <--sweep, while it is read---------------'
                                       |
                                       `--last copy into it and last reader of it ended--> ABSENT

Rule 1: every transition of a chunk stands in this file. Rule 2: no I/O and no clock here; `index` decides which engine
may write or read, and until when.

A chunk is a *row*, a small positive integer, of flat arrays. Row 0 belongs to no chunk, so a link of 0 leads nowhere;
neither does row 1, which stands for the ring of the cold chunks.
To the garbage collector a million rows are a few arrays and not a million objects. A free list gives rows out again.

A row's `refs` counts the copies into it that have not ended (WRITING), its leases, pins and holds (READY), or the rest
of either (DOOMED). Its bytes go back to the arena at 0, so a DOOMED chunk stays in *quarantine* while any process may
still read or write it. A DOOMED chunk is out of the directory and out of the tree. Its children are roots from then on,
valid by content; a lookup reaches them again when their parent is stored anew.

The order of eviction is a ring of the READY chunks that have no reader, the least recently used first. An ancestor
always stands nearer the recent end than its descendants, so leaves go before their parents. The oldest chunk may still
have children that are read or written, and so are not in the order. Such a chunk is *parked*: it leaves the order, and
comes back when a child of its own comes back or goes. An earlier event has paid for each step of the search for a
victim: O(1) amortised.

Chunks of a namespace that is not *chained*, as the states of a recurrent group, are all roots. Those of them that no
hit is likely to need are *cold*: they stand in a ring of their own, and go before all others, in the order in which
they came into it. A lease of a cold chunk makes it one like any other; so does the search for a victim, if a hit that
ends where prompts branched needs it. `publish` says which ones are cold.

A reset replaces a namespace's whole generation at once. A READY chunk of a replaced generation is *stale*: it is in no
directory, its links are followed no more, and it is given back, piece by piece, before any other chunk is evicted. A
stale chunk that has readers becomes DOOMED when the sweep meets it, or goes with its last reader if that is sooner.

*Marks* tell how long a victim was idle: rows without a chunk, which stand in both rings where the recent end was at a
certain time. So the use of a chunk need not note the time.
"""

import math
from array import array
from bisect import bisect_right
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence

import attrs

from lmcache_trio._core.departures import Cause, Departures
from lmcache_trio._core.groups import longest_hit
from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.changes import Changes
from lmcache_trio._core.index.generations import DOOMED, READY, WRITING, Generations, Namespace
from lmcache_trio._core.index.grants import SessionKey

__all__ = ["MOST_EVICTED", "Chunks", "Writing"]

MOST_EVICTED = 4
"""How much is evicted at most for one chunk, in extents of that chunk, while other chunks are in use.

Measured with one chunk in twenty leased, and new chunks eight times as long as the old ones. If neighbours are used
together, as nearly all are, 98 of 100 stores find a hole within this bound. If chunks are used in random order, 65 do,
until there are holes of their length. The room that a failed store has made stays free for the next one.
"""

DIGEST_ROOM = 32
_COLD = 1
_MARKS = 64
"""Marks in each ring, about. If there are more, every second one goes, and new ones are made half as often."""
_FIRST_ROW = 2 + 2 * _MARKS
"""The rows below it are those of the rings and of the marks."""
_BLOCK = 1024
"""Rows made at a time: a dozen appends per chunk would be a tenth of the cost of a store."""


@attrs.define(eq=False)
class Writing:
    """The fields of a WRITING chunk alone: the session that stores it, and how far its shards are."""

    session: SessionKey
    missing: int
    """Shards whose copy has not ended well yet."""
    deadline: float
    claimed: int = 0
    """One bit per shard."""

    def is_copied(self, shards: int) -> bool:
        """Whether a copy into one of its *shards* is under way."""
        return self.claimed.bit_count() > shards - self.missing


class Chunks:
    """All chunks of all namespaces, in one arena. `Index` reads the arrays, and changes them by methods alone."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.generations = Generations()
        # Two rows belong to no chunk.
        self.state = bytearray(2)
        self._refs = array("i", [0, 0])  # leases, pins and holds of it; or copies into it that have not ended
        self._offered = array("i", [0, 0])  # leases of it that were not taken
        self._namespace = array("i", [-1, -1])  # the number of its generation
        self.offset = array("Q", [0, 0])
        self.parent = array("i", [0, 0])
        self.first = bytearray(2)  # 1: it began as its chain's first chunk, not as a child
        self._cold = bytearray(2)  # 1: no hit is likely to need it
        self._first_child = array("i", [0, 0])
        self._next_sibling = array("i", [0, 0])
        self._previous_sibling = array("i", [0, 0])
        # The ring of the order. Row 0 is the ring's own: its older neighbour is the most recent row, its newer
        # neighbour the oldest one. Row 1 is the same in the ring of the cold chunks.
        self._newer = array("i", [0, _COLD])  # -1: not in a ring
        self._older = array("i", [0, _COLD])
        self._digests = bytearray(2 * DIGEST_ROOM)
        self._spare = array("i")  # a stack
        self.writing: OrderedDict[int, Writing] = OrderedDict()  # by deadline, the nearest first
        self._quarantined: dict[int, str] = {}  # rows that were doomed while they were written, and by which engine
        self.written_by: Counter[str] = Counter()  # bytes that are WRITING, or in that quarantine, by engine
        self.bytes_written = 0  # by all engines
        self.bytes_offered = 0
        self._bytes_idle = 0  # of READY and stale chunks that have no reader: they can be evicted
        self.evictions = 0
        self.evicted_idle = 0.0
        """Seconds for which the chunk that was evicted last had been idle, at the least."""
        self.aborted = 0
        self.changes = Changes()
        self.departures = Departures()
        self._grow()
        self._spare_marks = [self._spare.pop() for _ in range(2, _FIRST_ROW)]
        self._marks = deque[int](), deque[int]()  # by ring, the oldest one first
        self._marked = array("d", bytes(8 * _FIRST_ROW))  # when each mark was made
        self._mark_every, self._next_mark = 1.0, -math.inf

    def namespace_of(self, row: int) -> Namespace:
        return self.generations.numbered[self._namespace[row]]

    def digest(self, row: int) -> bytes:
        return bytes(self._digests[row * DIGEST_ROOM : (row + 1) * DIGEST_ROOM])

    # --- ABSENT to WRITING, and room for it ---------------------------------------------------------------------------

    def begin(self, namespace: Namespace, digest: bytes, parent: int, writing: Writing, now: float) -> int:
        """A WRITING row for *digest*, for which others are evicted; 0 when there is no room.

        The row is made, and hung under *parent*, before any other is evicted, so the chunks that it extends stay.
        """
        extent = namespace.extent
        if not self._spare:
            self._grow()
        row = self._spare.pop()
        self._namespace[row] = namespace.number
        self._digests[row * DIGEST_ROOM : (row + 1) * DIGEST_ROOM] = digest
        self.first[row], self._cold[row] = not parent, 0
        if parent:
            self.parent[row] = parent
            sibling = self._first_child[parent]
            self._next_sibling[row] = sibling
            if sibling:
                self._previous_sibling[sibling] = row
            self._first_child[parent] = row
        offset = self._arena.allocate(extent)
        if offset is None:
            offset = self._make_room(extent, row, now)
            if offset is None:
                self._unhang(row)
                self._free(row)
                return 0
        self.offset[row] = offset
        self.state[row] = WRITING
        namespace.table_of[digest[0]][digest] = row
        namespace.counts[WRITING] += 1
        self.writing[row] = writing
        self.written_by[writing.session[0]] += extent
        self.bytes_written += extent
        return row

    def _grow(self) -> None:
        made = len(self.state)
        for small, width in ((self.state, 1), (self.first, 1), (self._cold, 1), (self._digests, DIGEST_ROOM)):
            small += bytes(_BLOCK * width)
        for links in (self.parent, self._first_child, self._next_sibling, self._previous_sibling, self._older):
            links.frombytes(bytes(_BLOCK * links.itemsize))
        for field in (self._refs, self._offered, self._namespace, self.offset):
            field.frombytes(bytes(_BLOCK * field.itemsize))
        self._newer.extend(array("i", [-1]) * _BLOCK)
        self._spare.extend(range(made + _BLOCK - 1, made - 1, -1))

    def _make_room(self, extent: int, wanting: int, now: float) -> int | None:
        """The offset of *extent* bytes for the row *wanting*, whose ancestors stay."""
        arena, generations = self._arena, self.generations
        if self._bytes_idle + arena.free_bytes < extent:
            return None  # evicting all idle chunks would not do: they stay
        while generations.outdated:
            self.sweep_one()
            if arena.largest_hole >= extent:
                return arena.allocate(extent)
        # If no chunk is in use, all can go, so there will be a hole. If some stay, there may be no hole in the end, and
        # the idle cache is not flushed to find out.
        all_may_go = self._bytes_idle == arena.used and not self.parent[wanting]
        bound = math.inf if all_may_go else MOST_EVICTED * extent
        for row in self._victims():
            namespace = self.namespace_of(row)
            digest = self.digest(row)
            del namespace.table_of[digest[0]][digest]
            self._unhang(row)
            self.evictions += 1
            marks = self._marks[self._cold[row]]
            self.evicted_idle = now - self._marked[marks[0]] if marks else 0.0
            self.departures.note(namespace.name, digest, Cause.EVICTED, now, self.evicted_idle)
            if self.changes.watched:
                self.changes.note(namespace.name, digest, is_there=False)
            if namespace.extent == extent:  # as nearly always: the new chunk takes this place
                namespace.counts[READY] -= 1
                self._bytes_idle -= extent
                self._free(row)
                if not namespace.users:
                    generations.leave(namespace)
                return self.offset[row]
            bound -= namespace.extent
            self._drop(row, namespace)
            if arena.largest_hole >= extent:
                return arena.allocate(extent)
            if bound <= 0:
                return None
        return None

    # --- WRITING ------------------------------------------------------------------------------------------------------

    def claim(self, row: int, namespace: Namespace, shard: int, deadline: float) -> int:
        """A copy into *shard* of a WRITING chunk begins, and may take until *deadline*. Returns the slot's offset."""
        writing = self.writing[row]
        writing.claimed |= 1 << shard
        if deadline > writing.deadline:
            writing.deadline = deadline
            self.writing.move_to_end(row)
        self._refs[row] += 1
        return self.offset[row] + namespace.starts[shard]

    def publish(self, rows: Sequence[int], namespace: Namespace, shards: int) -> list[int]:
        """*shards* copies into each of *rows* ended well. Returns those that became READY by it, in order.

        Of a row that was doomed meanwhile, as by another shard's abort, the copies only count as ended.

        Chunks of a namespace that is not chained are cold, but for the last ones of *rows*, as many as one hit needs:
        prompts end there, and later ones begin with them. Each hit that ends before needs others.
        """
        state, refs, published = self.state, self._refs, []
        for row in rows:
            if state[row] != WRITING:
                self.let_go_doomed(row, shards)
                continue
            refs[row] -= shards
            writing = self.writing[row]
            writing.missing -= shards
            if not writing.missing:
                del self.writing[row]
                self._end_writing(writing.session[0], namespace.extent)
                state[row] = READY
                published.append(row)
        if published:
            namespace.counts[WRITING] -= len(published)
            namespace.counts[READY] += len(published)
            self._bytes_idle += len(published) * namespace.extent
            recent = published
            if not namespace.chained:
                layout = namespace.layout
                last = set(rows[-layout.group.reach(layout.chunk_tokens) :])
                recent = [row for row in published if row in last]
                for row in published:
                    if row not in last:
                        self._cold[row] = 1
                        self._put_back(row)
            self._touch(recent)
        return published

    def _end_writing(self, engine: str, size: int) -> None:
        """*size* bytes that *engine* was writing are READY, or free."""
        self.bytes_written -= size
        self.written_by[engine] -= size
        if not self.written_by[engine]:
            del self.written_by[engine]

    # --- READY: readers -----------------------------------------------------------------------------------------------

    def offer(self, namespace: Namespace, digests: Sequence[bytes], limit: int) -> list[int]:
        """One more reader, a lease that the engine has not taken yet, of each chunk of the leading READY run.

        The run is cut where all offered chunks together would hold more than *limit* bytes.
        """
        state, refs, offered, table_of = self.state, self._refs, self._offered, namespace.table_of
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
        self._keep(fresh, namespace)
        return run

    def longest_hit(self, namespaces: Sequence[Namespace], digests: Sequence[bytes], room: float = math.inf) -> int:
        """Chunks of the longest hit that READY chunks of all *namespaces*, the groups of an engine, serve.

        The hit is cut so that those chunks of them that no lease offers yet have no more than *room* bytes.
        """
        state, offered, most = self.state, self._offered, len(digests)
        chunk_tokens = namespaces[0].layout.chunk_tokens
        spent = [0] * (most + 1)  # by hit: bytes of the chained groups
        for namespace in namespaces:
            cost, table_of = 0, namespace.table_of
            for position in range(most if namespace.chained else 0):
                digest = digests[position]
                row = table_of[digest[0]].get(digest, 0)
                if state[row] != READY:
                    most = position
                    break
                cost += 0 if offered[row] else namespace.extent
                spent[position + 1] += cost
        most = max(0, bisect_right(spent, room, 0, most + 1) - 1)
        others = [namespace for namespace in namespaces if not namespace.chained]
        groups = [namespace.layout.group for namespace in others]

        def row_of(number: int, position: int) -> int:
            digest = digests[position]
            return others[number].table_of[digest[0]].get(digest, 0)

        most = longest_hit(lambda *part: state[row_of(*part)] == READY, groups, chunk_tokens, most)
        cost = spent[most]
        for number, group in enumerate(groups):
            for position in range(group.first(most, chunk_tokens), most):
                cost += 0 if offered[row_of(number, position)] else others[number].extent
        if cost <= room:
            return most
        # A shorter hit, and each one needs other parts: sums over all parts tell what it costs.
        best, begins, sums = 0, [0] * len(groups), [[0] for _ in groups]
        for boundary in range(1, most):
            cost, served = spent[boundary], True
            for number, group in enumerate(groups):
                row, first = row_of(number, boundary - 1), group.first(boundary, chunk_tokens)
                sums[number].append(sums[number][-1] + (0 if offered[row] else others[number].extent))
                cost += sums[number][boundary] - sums[number][first]
                if state[row] != READY:
                    begins[number] = boundary  # the parts from there on are there
                served = served and begins[number] <= first
            best = boundary if served and cost <= room else best
        return best

    def offer_parts(
        self, namespaces: Sequence[Namespace], digests: Sequence[bytes], limit: int
    ) -> tuple[int, list[list[int]]]:
        """Like `offer`, for the groups of an engine: of the longest hit, each group's chunks that it needs."""
        boundary, parts = self.longest_hit(namespaces, digests, limit - self.bytes_offered), []
        for namespace in namespaces:
            layout, table_of = namespace.layout, namespace.table_of
            needed = digests[layout.group.first(boundary, layout.chunk_tokens) : boundary]
            rows = [table_of[digest[0]][digest] for digest in needed]
            for row in rows:
                self.bytes_offered += 0 if self._offered[row] else namespace.extent
                self._offered[row] += 1
                self._cold[row] = 0
            self.retain(rows, namespace)
            parts.append(rows)
        return boundary, parts

    def unoffer(self, rows: Sequence[int], namespace: Namespace) -> None:
        """The lease of *rows* was taken, or is over: its chunks are offered no more."""
        offered, gone = self._offered, 0
        for row in rows:
            count = offered[row] - 1
            offered[row] = count
            gone += not count
        self.bytes_offered -= gone * namespace.extent

    def retain(self, rows: Sequence[int], namespace: Namespace) -> None:
        """One more reader of each of *rows*, which are READY or have readers. A client may have named one twice."""
        refs = self._refs
        fresh: list[int] = []
        for row in rows:
            count = refs[row]
            if not count:
                fresh.append(row)
            refs[row] = count + 1
        if fresh:
            self._keep(fresh, namespace)

    def _keep(self, rows: Sequence[int], namespace: Namespace) -> None:
        """READY *rows* have got their first reader: they can't be evicted now."""
        self._take_out(rows)
        namespace.retained += len(rows)
        self._bytes_idle -= len(rows) * namespace.extent

    def let_go(self, rows: Sequence[int], namespace: Namespace, *, touch: bool) -> None:
        """One reader less of each of *rows*, which come ancestors first. *touch*: they were used just now."""
        refs, idle = self._refs, []
        if namespace.replaced:  # a sweep may have met some of them
            doomed = [row for row in rows if self.state[row] == DOOMED]
            rows = [row for row in rows if self.state[row] != DOOMED]
            for row in doomed:
                self.let_go_doomed(row, 1)
        for row in rows:
            count = refs[row] - 1
            refs[row] = count
            if not count:
                idle.append(row)
        self._bytes_idle += len(idle) * namespace.extent
        if namespace.replaced:  # they are stale
            for row in idle:
                self._unlink(row)
                self._drop(row, namespace)
        elif idle:
            namespace.retained -= len(idle)
            if touch:
                self._touch(idle)
            else:
                for row in idle:
                    self._put_back(row)

    # --- DOOMED, and back to ABSENT -----------------------------------------------------------------------------------

    def doom(self, rows: Sequence[int]) -> None:
        """WRITING *rows* are out of sight at once; their bytes stay while any process may write them."""
        self.aborted += len(rows)
        for row in rows:
            namespace, digest = self.namespace_of(row), self.digest(row)
            del namespace.table_of[digest[0]][digest]
            engine, _ = self.writing.pop(row).session
            self._unhang(row)
            namespace.counts[WRITING] -= 1
            namespace.counts[DOOMED] += 1
            self.state[row] = DOOMED
            self._quarantined[row] = engine
            self.let_go_doomed(row, 0)

    def let_go_doomed(self, row: int, count: int) -> None:
        """*count* copies into, or readers of, a DOOMED chunk ended; the last one frees it."""
        self._refs[row] -= count
        if not self._refs[row]:
            namespace = self.namespace_of(row)
            namespace.counts[DOOMED] -= 1
            if row in self._quarantined:
                self._end_writing(self._quarantined.pop(row), namespace.extent)
            self._arena.free(self.offset[row], namespace.extent)
            self._free(row)
            self.generations.leave(namespace)

    def sweep_one(self) -> None:
        """Give back, or doom, one chunk of the oldest replaced generation. There must be one."""
        # Each table gives its youngest chunk in turn, so places come back about in order and few holes are made. That
        # also takes the directory apart: to free all its entries at once would stop the loop for that long.
        namespace = self.generations.outdated[0]
        names = namespace.tables.pop()
        if names:
            namespace.tables.insert(0, names)
            _, row = names.popitem()
            # a chunk that had readers may be gone, and its row be another chunk's
            if self.state[row] == READY and self._namespace[row] == namespace.number:
                self._unlink(row)
                if self._refs[row]:
                    self.state[row] = DOOMED
                    namespace.counts[READY] -= 1
                    namespace.counts[DOOMED] += 1
                else:
                    self._take_out((row,))
                    self._drop(row, namespace)
        elif not namespace.tables:
            self.generations.outdated.popleft()
            self.generations.leave(namespace)

    def clear(self, namespace: Namespace, at_once: int) -> Iterator[int]:
        """Drop each chunk of *namespace* that is READY and has no reader: yields how many went of each *at_once*."""
        for names in list(namespace.tables):
            digests = list(names)
            for start in range(0, len(digests), at_once):
                gone = 0
                for digest in digests[start : start + at_once]:
                    row = names.get(digest, 0)
                    if not row or self.state[row] != READY or self._refs[row]:
                        continue
                    self._take_out((row,))
                    del names[digest]
                    self._unhang(row)
                    if self.changes.watched:
                        self.changes.note(namespace.name, digest, is_there=False)
                    self._drop(row, namespace)
                    gone += 1
                yield gone
                if namespace.replaced:
                    return

    def _drop(self, row: int, namespace: Namespace) -> None:
        """Give back a READY or stale chunk that has no reader and is out of the tree and the order."""
        namespace.counts[READY] -= 1
        self._bytes_idle -= namespace.extent
        self._arena.free(self.offset[row], namespace.extent)
        self._free(row)
        if not namespace.users:
            self.generations.leave(namespace)

    def _free(self, row: int) -> None:
        """No chunk has *row* any more. It is out of the tree and the order already."""
        self.state[row] = 0  # FREE
        self._spare.append(row)

    # --- the tree -----------------------------------------------------------------------------------------------------

    def _unhang(self, row: int) -> None:
        """Take *row* out of the tree: its children become roots, and its parent, maybe a leaf now, may be evicted."""
        parent, after, before = self.parent, self._next_sibling, self._previous_sibling
        above, child = parent[row], self._first_child[row]
        if above:
            left, right = before[row], after[row]
            if left:
                after[left] = right
            else:
                self._first_child[above] = right
            if right:
                before[right] = left
        self._unlink(row)
        while child:
            following = after[child]
            parent[child] = after[child] = before[child] = 0
            child = following
        if above:
            self._put_back(above)

    def _unlink(self, row: int) -> None:
        """Forget the links of *row*. Those of its relatives stay, but are followed no more."""
        self.parent[row] = self._first_child[row] = self._next_sibling[row] = self._previous_sibling[row] = 0

    # --- the order of eviction ----------------------------------------------------------------------------------------

    def _touch(self, rows: Sequence[int]) -> None:
        """Bring *rows* (ancestors first) and all their idle ancestors to the recent end, deepest first."""
        parent, state, refs, newer, older = self.parent, self.state, self._refs, self._newer, self._older
        top, at = older[0], len(rows)
        while at:
            at -= 1
            row, stop = rows[at], rows[at - 1] if at else 0
            while True:
                if row != top:
                    after = newer[row]
                    if after >= 0:
                        before = older[row]
                        newer[before] = after
                        older[after] = before
                    newer[top] = row
                    older[row] = top
                    newer[row] = 0
                    top = row
                row = parent[row]
                while row and row != stop and not (state[row] == READY and not refs[row]):
                    row = parent[row]
                if not row or row == stop:
                    break
        older[0] = top

    def _put_back(self, row: int) -> None:
        """Put *row* just below its nearest ancestor in the order, after the parked ancestors that it kept out."""
        newer, older, parent, state, refs = self._newer, self._older, self.parent, self.state, self._refs
        chain = []
        while row and newer[row] < 0 and state[row] == READY and not refs[row]:
            chain.append(row)
            row = parent[row]
        if not chain:
            return
        while row and newer[row] < 0:
            row = parent[row]
        if self._cold[chain[0]]:
            row = _COLD
        for below in reversed(chain):  # each on the older side of the one before; after row 0: at the recent end
            before = older[row]
            newer[below] = row
            older[below] = before
            newer[before] = below
            older[row] = below
            row = below

    def _take_out(self, rows: Iterable[int]) -> None:
        """Take *rows* out of the order. Rows that are not in it are left alone."""
        newer, older = self._newer, self._older
        for row in rows:
            after = newer[row]
            if after >= 0:
                before = older[row]
                newer[before] = after
                older[after] = before
                newer[row] = -1

    def _is_before_a_branch(self, row: int) -> bool:
        """Whether a hit that ends where prompts branched needs *row*, a cold chunk: the next prompt may leave there.

        O(chunks that one hit needs of its group). A part that is stored again after it was missed there is kept so.
        """
        namespace = self.namespace_of(row)
        if namespace.chain is None or namespace.chain.replaced:
            return False
        digest, layout = self.digest(row), namespace.layout
        at = namespace.chain.table_of[digest[0]].get(digest, 0)
        for _ in range(layout.group.reach(layout.chunk_tokens)):
            child = self._first_child[at]
            if not at or not child:
                return False
            if self._next_sibling[child]:
                return True
            at = child
        return False

    def mark(self, now: float) -> None:
        """Remember where the recent ends are at *now*. To be called before stores, as often as one likes."""
        if now < self._next_mark:
            return
        if len(self._spare_marks) < len(self._marks):
            self._mark_every *= 2
            for marks in self._marks:
                rows = [marks.popleft() for _ in range(len(marks))]
                marks.extend(rows[1::2])
                self._take_out(rows[::2])
                self._spare_marks += rows[::2]
        self._next_mark = now + self._mark_every
        for ring, marks in enumerate(self._marks):
            row, before = self._spare_marks.pop(), self._older[ring]
            self._newer[row], self._older[row] = ring, before
            self._newer[before] = self._older[ring] = row
            self._marked[row] = now
            marks.append(row)

    def _victims(self) -> Iterator[int]:
        """The chunks to evict, one after the other, each out of the order. Evict one before you ask for the next."""
        while True:
            row, ring = self._newer[_COLD], _COLD
            if row == _COLD:
                row, ring = self._newer[0], 0
            if not row:
                return
            self._take_out((row,))
            if row < _FIRST_ROW:
                self._spare_marks.append(self._marks[ring].popleft())
                continue
            if self._cold[row] and self._is_before_a_branch(row):
                self._cold[row] = 0
                self._touch((row,))
                continue
            if not self._first_child[row]:
                yield row  # else it is parked
