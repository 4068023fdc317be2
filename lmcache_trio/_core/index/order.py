"""Where a chunk stands in the order of eviction: leaves before parents.

The order holds READY chunks that nobody has retained, ancestors nearer the recent end than their descendants. An oldest
chunk that still has children can only have children outside the order (retained, or being written): it is *parked*,
which is to be READY, not retained, and not in the order; it comes back when a child of its own comes back or goes. So
each step of the search for a victim is paid for by an earlier event: O(1) amortised.

It moves rows about; whether one may go, and what becomes of it, is the business of `chunks`.
"""

from collections.abc import Iterator

from lmcache_trio._core.index.generations import READY
from lmcache_trio._core.index.policy import EvictionPolicy
from lmcache_trio._core.index.rows import Rows

__all__ = ["Order"]


class Order:
    """*policy* is where the order is kept; *rows* are whose it is."""

    def __init__(self, rows: Rows, policy: EvictionPolicy) -> None:
        self._rows = rows
        self._policy = policy

    def victims(self) -> Iterator[int]:
        """What goes next, and next, each out of the order already: the caller evicts it before it asks for more."""
        policy, first_child = self._policy, self._rows.first_child
        while row := policy.oldest():
            policy.remove((row,))
            if not first_child[row]:
                yield row  # and else it is parked

    def touch_upwards(self, rows: list[int]) -> None:
        """Bring *rows* (ancestors first) and all their ancestors to the recent end, deepest first."""
        parent, state, refs = self._rows.parent, self._rows.state, self._rows.refs
        order = []
        at = len(rows)
        while at:
            at -= 1
            row = rows[at]
            order.append(row)
            above, stop = parent[row], rows[at - 1] if at else 0
            while above != stop and above:
                if state[above] == READY and not refs[above]:
                    order.append(above)
                above = parent[above]
        self._policy.touch(order)

    def put_back(self, row: int) -> None:
        """Put *row* just below its nearest ancestor in order, and before it the parked ancestors that it kept out."""
        policy, parent, state, refs = self._policy, self._rows.parent, self._rows.state, self._rows.refs
        chain = []
        while row and row not in policy and state[row] == READY and not refs[row]:
            chain.append(row)
            row = parent[row]
        if not chain:
            return
        while row and row not in policy:
            row = parent[row]
        for row_below in reversed(chain):
            policy.insert(row_below, row)
            row = row_below

    def unhang(self, row: int) -> None:
        """Take *row* out of the tree; its parent may be a leaf now, and go."""
        above = self._rows.detach(row)
        if above:
            self.put_back(above)
