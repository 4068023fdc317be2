"""KV groups: which parts a hit needs, and the longest hit that they allow."""

from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmcache_trio._core.groups import EVERY, MOST_GROUPS, Group, Need, check_groups, longest_hit
from lmcache_trio.errors import Misuse

GROUPS = st.one_of(
    st.just(Group(Need.EVERY, 0, 16)),
    st.builds(lambda tokens: Group(Need.WINDOW, tokens, 16), st.integers(2, 700)),
    st.builds(lambda tokens: Group(Need.LOCAL, tokens, 16), st.integers(1, 700)),
    st.just(Group(Need.STATE, 0, 16)),
)


def tokens_attended(group: Group, boundary: int) -> range:
    """The tokens before *boundary* (in tokens) whose KV the first token behind it attends to."""
    if group.need is Need.EVERY:
        return range(boundary)
    if group.need is Need.WINDOW:
        return range(max(0, boundary - (group.tokens - 1)), boundary)
    if group.need is Need.LOCAL:
        return range(boundary // group.tokens * group.tokens, boundary)
    return range(boundary - 1, boundary)


@given(GROUPS, st.integers(1, 40), st.sampled_from([16, 48, 128, 256]))
@example(Group(Need.WINDOW, 129, 16), 4, 128)
@example(Group(Need.WINDOW, 2, 16), 4, 128)
@example(Group(Need.LOCAL, 256, 16), 4, 128)
def test_a_hit_needs_exactly_the_chunks_whose_tokens_are_attended_to(group: Group, boundary: int, chunk: int) -> None:
    attended = {token // chunk for token in tokens_attended(group, boundary * chunk)}
    assert set(range(group.first(boundary, chunk), boundary)) == attended
    reach = group.reach(chunk)
    assert len(attended) <= (reach or boundary)


@given(GROUPS, st.integers(1, 40), st.sampled_from([16, 48, 128, 256]))
def test_a_parts_blocks_hold_all_tokens_that_are_attended_to(group: Group, boundary: int, chunk: int) -> None:
    if group.need is Need.STATE:
        assert group.part_blocks(chunk) == 1
        return
    held = group.part_blocks(chunk) * group.block_tokens
    for token in tokens_attended(group, boundary * chunk):
        end = (token // chunk + 1) * chunk
        assert end - held <= token < end
    assert group.part_blocks(chunk) <= chunk // group.block_tokens


@given(st.data())
def test_the_longest_hit_is_that_of_a_search_through_all(data: st.DataObject) -> None:
    groups = data.draw(st.lists(GROUPS, min_size=1, max_size=4))
    chunk, most = data.draw(st.sampled_from([16, 128])), data.draw(st.integers(0, 24))
    parts = st.lists(st.integers(0, 9).map(lambda n: n < 9), min_size=most, max_size=most)
    present = [data.draw(parts) for _ in groups]

    def serves(boundary: int) -> bool:
        return all(
            present[number][token // chunk]
            for number, group in enumerate(groups)
            for token in tokens_attended(group, boundary * chunk)
        )

    expected = next((boundary for boundary in range(most, 0, -1) if serves(boundary)), 0)
    asked = Counter[tuple[int, int]]()

    def is_present(number: int, position: int) -> int:
        asked[number, position] += 1
        return present[number][position]

    assert longest_hit(is_present, groups, chunk, most) == expected
    assert max(asked.values(), default=1) == 1


def test_a_group_that_cannot_be_is_named() -> None:
    check_groups([Group(Need.EVERY, 0, 16), Group(Need.WINDOW, 512, 32), Group(Need.STATE)], 32, 128)
    for groups, named in (
        ([], "0 groups"),
        ([Group(Need.EVERY, 0, 16)] * (MOST_GROUPS + 1), f"{MOST_GROUPS + 1} groups"),
        ([EVERY], r"group 0 \(every\).*blocks of 0"),
        ([Group(Need.EVERY, 0, 48)], "blocks of 48"),
        ([Group(Need.EVERY, 0, 16), Group(Need.WINDOW, 1, 16)], r"group 1 \(window\) has tokens 1"),
        ([Group(Need.LOCAL, 0, 16)], r"group 0 \(local\) has tokens 0"),
    ):
        with pytest.raises(Misuse, match=named):
            check_groups(groups, 32, 128)
