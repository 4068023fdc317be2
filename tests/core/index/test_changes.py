"""What a watcher is told, against the moves of chunks themselves: it may believe too little, and never too much."""

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.index import changes as module
from lmcache_trio._core.index.changes import Change, Changes

MOVES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([b"a", b"b"]), st.integers(0, 9).map(lambda n: bytes([n])), st.booleans()),
        st.sampled_from([b"a", b"b"]),
        st.none(),
    ),
    max_size=60,
)
"""A chunk that came or left; a namespace that was cleared; or None, somebody looks."""


def believe(told: set[tuple[bytes, bytes]], changes: Changes) -> None:
    for namespace, change in changes.take().items():
        if change.cleared:
            told -= {key for key in told if key[0] == namespace}
        told |= {(namespace, digest) for digest in change.came}
        told -= {(namespace, digest) for digest in change.left}


@given(moves=MOVES, most=st.integers(1, 12))
def test_a_watcher_never_believes_a_chunk_to_be_there_that_is_not(
    moves: list[tuple[bytes, bytes, bool] | bytes | None], most: int
) -> None:
    changes, there, told = Changes(), set[tuple[bytes, bytes]](), set[tuple[bytes, bytes]]()
    with patch.object(module, "MOST", most):
        for move in [*moves, None]:
            if move is None:
                believe(told, changes)
                assert told <= there
                if most > 10:  # so many digests there are
                    assert told == there
                assert not changes.pending
            elif isinstance(move, bytes):
                changes.clear(move)
                there -= {key for key in there if key[0] == move}
            else:
                namespace, digest, is_there = move
                changes.note(namespace, digest, is_there=is_there)
                there = there | {(namespace, digest)} if is_there else there - {(namespace, digest)}
                assert changes.pending


def test_what_was_cleared_comes_before_what_came_later() -> None:
    changes = Changes()
    changes.note(b"n", b"before", is_there=True)
    changes.clear(b"n")
    changes.note(b"n", b"after", is_there=True)
    changes.note(b"n", b"gone", is_there=False)
    assert changes.take() == {b"n": Change([b"after"], [b"gone"], True)}
    assert changes.take() == {}
