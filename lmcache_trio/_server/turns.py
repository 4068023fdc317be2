"""What the connections share: the loop's time, and the room for messages whose end has not come."""

import attrs
import trio

from lmcache_trio._server.peer import Peer
from lmcache_trio._transport import Unfinished

__all__ = ["Turns"]


@attrs.define(eq=False)
class Turns:
    """Whose turn it is; `connection` says how long one takes."""

    unfinished: Unfinished
    lane: trio.Lock = attrs.field(factory=trio.Lock)
    """Held by the peer whose turn it is among those that ask much."""
    last_in_lane: Peer | None = None
    leaving: trio.Lock = attrs.field(factory=trio.Lock)
    """Held by the peer that is being taken apart."""
