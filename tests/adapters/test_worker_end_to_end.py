"""Both adapters against a real server over real shared memory: what is stored comes back, and no death hangs anyone."""

from collections.abc import Callable

from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, same_blocks

TOKENS = list(range(3 * CHUNK))
FROM = [5, 9, 1, 33, 34, 35, 36, 60, 2, 7, 8, 3]
INTO = [11, 40, 12, 50, 13, 51, 14, 52, 20, 21, 22, 23]

MakeSide = Callable[..., Side]


def test_what_one_engine_stored_another_loads_byte_for_byte(live_server: ServerProcess, sides: MakeSide) -> None:
    one, other = sides(live_server.address, make_kv(1)), sides(live_server.address, make_kv())
    one.store("r", TOKENS, FROM)
    assert other.lookup("q", TOKENS) == 3 * CHUNK
    assert other.load("q", 3 * CHUNK, INTO) == set()
    assert same_blocks(one.kv, FROM, other.kv, INTO)
    untouched = [b for b in range(64) if b not in INTO]
    assert same_blocks(other.kv, untouched, make_kv(), untouched)
