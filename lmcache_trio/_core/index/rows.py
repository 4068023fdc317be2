"""Chunk records as rows of flat arrays, and the tree that they form.

A row is a small positive integer; row 0 is nobody, so a link of 0 is none. A million rows are a few arrays to the
garbage collector, not a million objects; rows are used again through a free list, and growing is an amortised append.

It keeps links in order and decides nothing: what a state means and when it changes stands in `chunks`.
"""

from array import array

__all__ = ["DIGEST_ROOM", "Rows"]

DIGEST_ROOM = 32
_BLOCK = 1024
"""Rows made at a time: a dozen appends a chunk would be a tenth of what storing it costs."""


class Rows:
    """The arrays. They are public to `chunks`, whose inner loops read them directly."""

    def __init__(self) -> None:
        self.state = bytearray(1)
        self.refs = array("i", [0])  # leases, pins and holds of it; or copies into it that have not ended
        self.offered = array("i", [0])  # leases of it that were not taken
        self.namespace = array("i", [-1])
        self.offset = array("Q", [0])
        self.parent = array("i", [0])
        self.first_child = array("i", [0])
        self.next_sibling = array("i", [0])
        self.previous_sibling = array("i", [0])
        self.first = bytearray(1)  # 1: it began as its chain's first, not as a child
        self._digests = bytearray(DIGEST_ROOM)
        self._spare = array("i")  # a stack
        self._fields = (
            self.refs,
            self.offered,
            self.namespace,
            self.offset,
            self.parent,
            self.first_child,
            self.next_sibling,
            self.previous_sibling,
        )

    def grow(self) -> int:
        """Make a block of rows, all spare. Returns how many."""
        made = len(self.state)
        self.state += bytes(_BLOCK)
        self.first += bytes(_BLOCK)
        self._digests += bytes(_BLOCK * DIGEST_ROOM)
        for field in self._fields:
            field.frombytes(bytes(_BLOCK * field.itemsize))
        self._spare.extend(range(made + _BLOCK - 1, made - 1, -1))
        return _BLOCK

    def has_spare(self) -> bool:
        return bool(self._spare)

    def add(self, namespace: int, digest: bytes, parent: int) -> int:
        """A spare row, now for *digest*, a child of *parent*."""
        row = self._spare.pop()
        self.namespace[row] = namespace
        self._digests[row * DIGEST_ROOM : (row + 1) * DIGEST_ROOM] = digest
        self.first[row] = not parent
        if parent:
            self.parent[row] = parent
            sibling = self.first_child[parent]
            self.next_sibling[row] = sibling
            if sibling:
                self.previous_sibling[sibling] = row
            self.first_child[parent] = row
        return row

    def digest(self, row: int) -> bytes:
        return bytes(self._digests[row * DIGEST_ROOM : (row + 1) * DIGEST_ROOM])

    def detach(self, row: int) -> int:
        """Take *row* out of the tree: its children become roots. Returns the parent that it had."""
        parent, first_child, after = self.parent, self.first_child, self.next_sibling
        above = parent[row]
        if above:
            left, right = self.previous_sibling[row], after[row]
            if left:
                after[left] = right
            else:
                first_child[above] = right
            if right:
                self.previous_sibling[right] = left
            parent[row] = after[row] = self.previous_sibling[row] = 0
        child = first_child[row]
        first_child[row] = 0
        while child:
            following = after[child]
            parent[child] = after[child] = self.previous_sibling[child] = 0
            child = following
        return above

    def unlink(self, row: int) -> None:
        """Forget the links of *row* and leave those of its relatives be, which nobody will follow any more."""
        self.parent[row] = self.first_child[row] = self.next_sibling[row] = self.previous_sibling[row] = 0

    def spare(self, row: int) -> None:
        """Put a detached *row* on the free list."""
        self.state[row] = 0
        self._spare.append(row)
