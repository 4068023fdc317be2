"""Names of chunks: known vectors, so that two versions share a cache; and a chain that may be extended."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.groups import EVERY, Group, Need
from lmcache_trio._core.keys import (
    DIGEST_BYTES,
    chain_digests,
    identity_of,
    join_digests,
    layout_of,
    namespace_of,
    namespaces_of,
    seed_of,
)
from lmcache_trio.errors import Misuse

token_lists = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40)


def test_a_digest_is_sha256_over_its_parent_and_packed_tokens() -> None:
    seed = bytes(32)
    first = hashlib.sha256(seed + struct.pack("<4i", 1, 2, 3, 4)).digest()
    second = hashlib.sha256(first + struct.pack("<4i", 5, 6, 7, 8) + b"lora").digest()
    assert chain_digests(seed, [1, 2, 3, 4, 5, 6, 7, 8, 9], 4, [b"", b"lora"]) == [first, second]


def test_known_vectors_hold_from_version_to_version() -> None:
    assert seed_of("a model", "256").hex() == "399fc62fed61b4e0fcc053f41eff799bfd6459face1819a4ed6579e1021f6090"
    assert chain_digests(seed_of("a model", "256"), list(range(256)), 256)[0].hex() == (
        "736cadba09a836c55c2e2adaaf9b2f9ac68f8cfc1d46e9d4be29f9a6b330b227"
    )


@given(token_lists, st.integers(1, 5), st.data())
def test_extending_a_chain_equals_recomputing_it(tokens: list[int], width: int, data: st.DataObject) -> None:
    extras = data.draw(st.lists(st.binary(max_size=3), min_size=len(tokens) // width, max_size=len(tokens) // width))
    whole = chain_digests(bytes(32), tokens, width, extras)
    cut = data.draw(st.integers(0, len(whole)))
    head = chain_digests(bytes(32), tokens[: cut * width], width, extras[:cut])
    parent = head[-1] if head else bytes(32)
    assert head + chain_digests(parent, tokens[cut * width :], width, extras[cut:]) == whole
    packed = join_digests(whole)
    assert [packed[i : i + DIGEST_BYTES] for i in range(0, len(packed), DIGEST_BYTES)] == whole


@given(token_lists, token_lists, st.integers(1, 5))
def test_two_prompts_share_digests_exactly_as_far_as_they_share_chunks(a: list[int], b: list[int], width: int) -> None:
    one, other = chain_digests(bytes(32), a, width), chain_digests(bytes(32), b, width)
    for i, (x, y) in enumerate(zip(one, other, strict=False)):
        assert (x == y) == (a[: (i + 1) * width] == b[: (i + 1) * width])


def test_where_a_part_of_an_identity_ends_matters() -> None:
    assert seed_of("ab", "c") != seed_of("a", "bc")
    assert seed_of("a") != namespace_of(b"a")
    assert namespace_of(b"1", b"2") != namespace_of(b"2", b"1")
    assert namespace_of(b"12") != namespace_of(b"1", b"2")
    assert len({layout_of([b"1", b"2"], 16), layout_of([b"2", b"1"], 16), layout_of([b"1", b"2"], 32)}) == 3


def test_a_layout_is_named_by_its_groups_too() -> None:
    window, longer = Group(Need.WINDOW, 32, 16), Group(Need.WINDOW, 33, 16)
    several: list[tuple[Group, ...]] = [(EVERY,), (window,), (longer,), (EVERY, window), (window, EVERY)]
    assert len({layout_of([b"1"], 16, groups) for groups in several}) == 5
    assert layout_of([b"1"], 16) == layout_of([b"1"], 16, (EVERY,))


def test_the_namespaces_of_groups_differ_and_that_of_an_only_group_is_the_engines() -> None:
    assert namespaces_of(b"n", 1) == (b"n",)
    assert len({b"n", *namespaces_of(b"n", 3)}) == 4
    assert namespaces_of(b"n", 2) == namespaces_of(b"n", 3)[:2]


@pytest.mark.parametrize("tokens", [[2**31], [-(2**31) - 1], [1.5], ["1"]])
def test_a_token_outside_int32_is_refused_by_name(tokens: list[int]) -> None:
    with pytest.raises(Misuse, match="token_ids"):
        chain_digests(bytes(32), tokens, 1)


def test_wrong_lengths_are_refused_by_name() -> None:
    with pytest.raises(Misuse, match="chunk_tokens"):
        chain_digests(bytes(32), [1], 0)
    with pytest.raises(Misuse, match="extras"):
        chain_digests(bytes(32), [1, 2], 1, [b""])


@pytest.mark.parametrize("identity", [(), ("",), ("a model", b""), (7,)])
def test_a_seed_of_nothing_is_refused(identity: tuple[str | bytes, ...]) -> None:
    with pytest.raises(Misuse, match="identity"):
        seed_of(*identity)


def test_a_name_that_is_a_path_of_any_bytes_names_a_model() -> None:
    """As `os.fsdecode` gives it."""
    assert seed_of("/models/\udcff") != seed_of("/models/\udcfe")
    assert identity_of("/models/\udcff") != identity_of("/models/\udcfe")
