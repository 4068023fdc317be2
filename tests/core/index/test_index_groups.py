"""KV groups: parts are stored, leased and evicted on their own, and a hit has every part that its groups need."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_trio._core.groups import EVERY, Group, Need
from lmcache_trio._core.index.index import Index, Lease, Reservation
from lmcache_trio._core.keys import ChunkKey, join_digests
from lmcache_trio.errors import Gone, Misuse

PAGE, CHUNK = 4096, 16
FULL, WINDOW, STATE = Group(Need.EVERY, 0, 16), Group(Need.WINDOW, 33, 16), Group(Need.STATE)  # the window: 2 chunks


class Parts:
    """The groups of one engine, in the arena of *world*, each with parts of one page; and the verbs of the engine."""

    def __init__(self, world: Any, *groups: Group) -> None:
        self.world, self.groups = world, groups
        self.index: Index = world.index
        self.names = tuple([bytes([65 + number]) * 32 for number in range(len(groups))])
        for name, group in zip(self.names, groups, strict=True):
            self.index.attach(name, [PAGE], group, CHUNK)

    def reserve(
        self, group: int, chain: str, *, known: int = 0, engine: str = "e", session: int = 1, worker: int = 1
    ) -> Reservation:
        digests = self.world.digests(chain)
        parent = digests[known - 1] if known else b""
        return self.index.reserve(
            (engine, session), worker, 0, self.names[group], parent, join_digests(digests[known:]), self.world.now
        )

    def store(self, group: int, chain: str, *, known: int = 0) -> Reservation:
        made = self.reserve(group, chain, known=known)
        if made.id:
            self.index.commit(made.id, 1)
        return made

    def lease(self, chain: str, session: int = 7) -> Lease | None:
        return self.index.lease(("e", session), self.names, self.world.digests(chain), self.world.now)

    def touch(self, chain: str) -> None:
        lease = self.lease(chain)
        assert lease is not None
        self.index.release(lease.id)

    def match(self, chain: str) -> int:
        return self.index.match(self.names, self.world.digests(chain))

    def has(self, group: int, chain: str) -> bool:
        return self.index.match((self.names[group],), self.world.digests(chain)[-1:]) == 1

    def read(self, group: int, chain: str) -> None:
        """The server reads the last chunk of *chain*, if its part in *group* is there."""
        hold = self.index.hold(ChunkKey(self.names[group], self.world.digests(chain)[-1]))
        if hold is not None:
            self.index.unhold(hold)

    def kept(self, group: int, chain: str) -> str:
        """The chunks of *chain* whose parts in *group* are there."""
        return "".join(chain[i] for i in range(len(chain)) if self.has(group, chain[: i + 1]))


def positions(made: Reservation) -> Sequence[int]:
    return [slot.position for slot in made.slots]


# --- stores -----------------------------------------------------------------------------------------------------------


def test_a_part_is_stored_without_the_parts_before_it(world: Callable[..., Any]) -> None:
    of = Parts(world(8), FULL, WINDOW)
    assert of.store(0, "abcd", known=2).dropped == {"orphan": 2}
    assert positions(of.store(1, "abcd", known=2)) == [0, 1]
    assert of.kept(1, "abcd") == "cd"


def test_a_part_that_another_engine_writes_does_not_stop_those_behind_it(world: Callable[..., Any]) -> None:
    of = Parts(world(8), FULL, WINDOW)
    for group in (0, 1):
        of.reserve(group, "a", engine="other", worker=2)
    assert of.store(0, "abc").dropped == {"writing": 1, "orphan": 2}
    got = of.store(1, "abc")
    assert (positions(got), got.dropped) == ([1, 2], {"writing": 1})


def test_parts_behind_one_that_finds_no_room_get_none(world: Callable[..., Any]) -> None:
    of = Parts(world(2), FULL, WINDOW)
    got = of.reserve(1, "abcd")
    assert (positions(got), got.dropped) == ([0, 1], {"no_space": 2})


def test_the_part_of_a_failed_store_can_be_stored_again(world: Callable[..., Any]) -> None:
    of = Parts(world(8), STATE)
    failed = of.reserve(0, "ab")
    of.index.abort(failed.id, 1)
    assert of.kept(0, "ab") == ""
    assert positions(of.store(0, "ab", known=1)) == [0]
    assert of.match("ab") == 2


# --- hits -------------------------------------------------------------------------------------------------------------


def test_a_hit_ends_where_all_groups_have_what_it_needs(world: Callable[..., Any]) -> None:
    of = Parts(world(40), FULL, WINDOW, STATE)
    of.store(0, "abcdef")
    assert (of.match("abcdef"), of.lease("abcdef")) == (0, None)
    of.store(1, "abcde", known=2)
    for boundary in (3, 4, 6):
        of.store(2, "abcdef"[:boundary], known=boundary - 1)
    lease = of.lease("abcdef")
    assert lease is not None
    assert (lease.namespaces, lease.chunks, of.match("abcdef")) == (of.names, 4, 4)
    assert (of.world.held["bytes_retained"], of.world.held["bytes_offered"]) == ((4 + 2 + 1) * PAGE,) * 2
    assert (of.world.counted["chunks_hit"], of.world.counted["chunks_missed"]) == (4, 8)
    of.index.take(lease.id)
    of.index.release(lease.id)
    assert (of.world.held["bytes_retained"], of.world.held["bytes_offered"]) == (0, 0)


def test_a_namespace_that_is_not_attached_serves_no_hit(world: Callable[..., Any]) -> None:
    of = Parts(world(4), FULL)
    of.store(0, "a")
    names = (*of.names, b"?" * 32)
    assert of.index.match(names, of.world.digests("a")) == 0
    assert of.index.lease(("e", 1), names, of.world.digests("a"), 0.0) is None


def test_a_read_of_a_group_is_within_what_the_hit_needs_of_it(world: Callable[..., Any]) -> None:
    of = Parts(world(40), FULL, WINDOW, STATE)
    for group in range(3):
        of.store(group, "abcd")
    lease = of.lease("abcd")
    assert lease is not None
    for group, first in ((0, 0), (1, 2), (2, 3)):
        name = of.names[group]
        pin = of.index.pin(lease.id, "e", name, 1, 0, first, 4 - first)
        hold = of.index.hold(ChunkKey(name, of.world.digests("abcd")[first]))
        assert hold is not None
        assert pin.offsets[0] == hold.offsets[0]
        assert of.index.unpin(pin.id, 1)
        for start, count in ((first - 1, 1), (first, 5 - first), (first, 0)):
            with pytest.raises(Misuse, match=f"has chunks {first} to 4"):
                of.index.pin(lease.id, "e", name, 1, 0, start, count)
    with pytest.raises(Gone, match="layout"):
        of.index.pin(lease.id, "e", b"?" * 32, 1, 0, 3, 1)


def test_a_lease_counts_the_parts_of_all_groups_against_its_share(world: Callable[..., Any]) -> None:
    of = Parts(world(16), FULL, WINDOW)  # leases may have 8 pages
    for group in (0, 1):
        of.store(group, "abcdefg")
    lease = of.lease("abcdefg")
    assert lease is not None
    assert lease.chunks == 6  # 6 parts, and the last 2
    again = of.lease("abcdef", session=8)
    assert again is not None
    assert again.chunks == 6  # the same bytes
    third = of.lease("abcdefg", session=9)
    assert third is not None
    assert third.chunks == 6


def test_a_lookup_that_names_a_chunk_twice_costs_nobody_room(world: Callable[..., Any]) -> None:
    of = Parts(world(4, lease_share=1.0), FULL, WINDOW)
    for group in (0, 1):
        of.store(group, "a")
    for _ in range(5):
        lease = of.index.lease(("e", 7), of.names, of.world.digests("a") * 2, of.world.now)
        assert lease is not None
        assert (lease.chunks, of.world.held["bytes_retained"]) == (2, 2 * PAGE)
        of.index.release(lease.id)
        assert of.world.held["bytes_retained"] == 0
    assert len(of.store(0, "wxyz").slots) == 4  # both parts go for them


@given(st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hit_is_the_longest_that_is_there_and_within_the_share(
    world: Callable[..., Any], data: st.DataObject
) -> None:
    chain, groups = "abcdefgh", data.draw(st.lists(st.sampled_from([FULL, WINDOW, STATE]), min_size=1, max_size=3))
    of = Parts(world(64, lease_share=data.draw(st.integers(1, 32)) / 64), *groups)
    share = of.index.room_to_offer // PAGE
    there = [data.draw(st.sets(st.integers(0, 7))) for _ in groups]
    for group, parts in enumerate(there):
        for position in sorted(parts):
            of.store(group, chain[: position + 1], known=position)
    offered: set[tuple[int, int]] = set()
    for session in range(3):
        asked = data.draw(st.integers(1, 8))
        expected = 0
        for boundary in range(1, asked + 1):
            needed = {
                (number, position)
                for number, group in enumerate(groups)
                for position in range(group.first(boundary, CHUNK), boundary)
            }
            present = all(
                position in there[number] and (groups[number] is not FULL or set(range(position)) <= there[number])
                for number, position in needed
            )
            if present and len(needed | offered) <= share:
                expected, best = boundary, needed
        lease = of.lease(chain[:asked], session)
        assert (lease.chunks if lease else 0) == expected
        offered |= best if expected else set()
        assert of.world.held["bytes_offered"] == len(offered) * PAGE


def test_a_hit_that_the_share_cuts_is_found_in_a_time_that_grows_with_its_parts(world: Callable[..., Any]) -> None:
    chunks = 3000
    of = Parts(world(chunks), Group(Need.WINDOW, chunks * CHUNK + 1, 16))
    digests = [number.to_bytes(4, "little") * 8 for number in range(chunks)]
    for first in range(0, chunks, 250):
        made = of.index.reserve(("e", 1), 1, 0, of.names[0], b"", join_digests(digests[first : first + 250]), 0.0)
        of.index.commit(made.id, 1)
    begun = time.process_time()
    lease = of.index.lease(("e", 7), of.names, digests, 0.0)
    assert lease is not None
    assert lease.chunks == chunks // 2
    assert time.process_time() - begun < 5  # in the square of its parts: 10 s and more


def test_a_reset_of_one_namespace_leaves_no_hit(world: Callable[..., Any]) -> None:
    of = Parts(world(16), FULL, STATE)
    for group in (0, 1):
        of.store(group, "ab")
    lease = of.lease("ab")
    assert lease is not None
    of.index.reset(of.names[1])
    assert (of.match("ab"), of.lease("ab", session=8)) == (0, None)
    with pytest.raises(Gone, match="reset"):
        of.index.pin(lease.id, "e", of.names[1], 1, 0, 1, 1)
    assert of.store(1, "ab").slots
    assert of.match("ab") == 2
    of.index.release(lease.id)
    while of.index.sweep(1):
        pass
    assert of.world.held["chunks_stale"] == 0


# --- cold parts -------------------------------------------------------------------------------------------------------


def test_cold_parts_go_first_and_the_oldest_of_them_before_the_others(world: Callable[..., Any]) -> None:
    of = Parts(world(12), FULL, WINDOW)
    of.store(0, "xyz")
    of.store(1, "abcde")
    of.store(1, "pqrs")
    kept = []
    for new in ("1", "2", "3", "4", "5"):
        of.store(0, new)
        kept.append((of.kept(1, "abcde"), of.kept(1, "pqrs")))
    assert kept == [("bcde", "pqrs"), ("cde", "pqrs"), ("de", "pqrs"), ("de", "qrs"), ("de", "rs")]
    assert of.kept(0, "xyz") == "xyz"
    of.store(0, "6")
    assert (of.kept(1, "abcde"), of.kept(1, "pqrs"), of.kept(0, "xyz")) == ("de", "rs", "xy")


def test_a_cold_part_that_a_hit_has_used_is_cold_no_more(world: Callable[..., Any]) -> None:
    of = Parts(world(9), FULL, STATE)
    of.store(0, "abcd")
    of.store(1, "abcd")
    of.touch("ab")
    of.read(1, "ab")
    for new in "1234":
        of.store(0, new)
    assert (of.kept(1, "abcd"), of.kept(0, "abcd")) == ("bd", "abc")


def test_a_cold_part_stays_cold_after_the_server_has_read_it(world: Callable[..., Any]) -> None:
    of = Parts(world(5), FULL, STATE)
    of.store(0, "xy")
    of.store(1, "abc")
    for chain in ("a", "ab", "abc"):
        of.read(1, chain)
    of.store(0, "1")
    of.store(0, "2")
    assert (of.kept(1, "abc"), of.kept(0, "xy")) == ("c", "xy")


def test_a_part_that_a_hit_reads_is_never_evicted_even_if_it_was_cold(world: Callable[..., Any]) -> None:
    of = Parts(world(4, lease_share=1.0), STATE)
    of.store(0, "abcd")
    lease = of.lease("a")
    assert lease is not None
    pin = of.index.pin(lease.id, "e", of.names[0], 1, 0, 0, 1)
    of.index.release(lease.id)
    assert len(of.reserve(0, "wxyz").slots) == 3
    assert of.kept(0, "abcd") == "a"
    assert of.index.unpin(pin.id, 1)


def test_a_row_that_was_a_cold_part_is_a_chunk_like_any_other_next(world: Callable[..., Any]) -> None:
    of = Parts(world(3), FULL, STATE)
    of.store(1, "ab")
    of.store(0, "x")
    of.store(0, "y")  # it takes the place of the cold part
    of.read(0, "y")
    of.store(0, "z")
    assert (of.kept(1, "ab"), of.kept(0, "x"), of.kept(0, "y")) == ("", "x", "y")


@pytest.mark.parametrize(("group", "kept"), [(WINDOW, "tu"), (STATE, "u")])
def test_parts_that_a_hit_needs_where_prompts_branched_are_cold_no_more(
    world: Callable[..., Any], group: Group, kept: str
) -> None:
    """A system prompt, "stu", is stored once more by the second request, which missed its cold parts."""
    of = Parts(world(18), FULL, group)
    for chain in ("stuab", "stucd"):
        assert of.match(chain[:3]) in (0, 3)
        of.store(0, chain)
        of.store(1, chain)
    for new in "123456":
        of.store(0, new)
    assert of.kept(1, "stu") == kept
    assert of.match("stuxy") == 3
    assert of.match("stucd") == 5


def test_a_cold_part_where_prompts_branched_goes_once_it_was_used_longest_ago(world: Callable[..., Any]) -> None:
    of = Parts(world(5), FULL, STATE)
    of.match("s")
    of.store(0, "sa")
    of.store(1, "sa")
    of.store(0, "sb")
    for new in ("1", "2", "3", "4", "5"):
        of.store(0, new)
    assert of.kept(1, "sa") == ""
    assert [of.has(0, new) for new in "12345"] == [True] * 5


GROUP = st.sampled_from([WINDOW, STATE, Group(Need.LOCAL, 48, 16)])
CHAIN = st.text("ab", min_size=1, max_size=6)


@given(
    group=GROUP,
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("chained"), CHAIN),
            st.tuples(st.just("parts"), CHAIN),
            st.tuples(st.just("lease"), CHAIN),
            st.tuples(st.just("hold"), CHAIN),
        ),
        max_size=40,
    ),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_chunk_of_a_chained_namespace_goes_while_there_is_a_cold_part(
    world: Callable[..., Any], group: Group, steps: list[tuple[str, str]]
) -> None:
    of = Parts(world(10), EVERY, group)
    cold: set[str] = set()
    for what, chain in steps:
        if what == "lease":
            lease = of.index.lease(("e", 9), (of.names[1],), of.world.digests(chain), 0.0)
            if lease is not None:
                of.index.release(lease.id)
                cold -= {chain[: i + 1] for i in range(group.first(lease.chunks, CHUNK), lease.chunks)}
        elif what == "hold":
            of.read(0, chain)
            of.read(1, chain)
        else:
            stored = int(what == "parts")
            every = {chain[: i + 1] for i in range(len(chain))}
            chained = {c for c in _prefixes() if of.has(0, c)}
            made = of.store(stored, chain)
            gone = {c for c in chained if not of.has(0, c)}
            fresh = [chain[: position + 1] for position in positions(made)]
            left = {c for c in cold if of.has(1, c)}
            assert not gone or not left - every
            cold = left | (set(fresh[: -group.reach(CHUNK)]) if stored else set())


def _prefixes() -> list[str]:
    return [
        format(n, f"0{length}b").replace("0", "a").replace("1", "b")
        for length in range(1, 7)
        for n in range(1 << length)
    ]
