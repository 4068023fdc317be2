"""How long a chunk is: a wish in whole blocks, or "auto" by the bytes of a token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.keys import DEFAULT_CHUNK_TOKENS, chunk_tokens_for

MIB = 1 << 20
BLOCKS = st.integers(1, 2048)


@given(wish=st.integers(1, 65_536), block_tokens=BLOCKS, token_bytes=st.integers(0, 1 << 24))
def test_a_wish_is_the_fewest_whole_blocks_that_reach_it(wish: int, block_tokens: int, token_bytes: int) -> None:
    tokens = chunk_tokens_for(wish, block_tokens, token_bytes)
    assert tokens % block_tokens == 0
    assert tokens - block_tokens < wish <= tokens


@given(block_tokens=BLOCKS, token_bytes=st.integers(1, 1 << 24))
def test_auto_is_the_least_length_of_enough_bytes_and_tokens_that_is_not_too_long(
    block_tokens: int, token_bytes: int
) -> None:
    allowed = list(range(block_tokens, 257, block_tokens)) or [block_tokens]
    enough = [tokens for tokens in allowed if tokens >= 64 and tokens * token_bytes >= 2 * MIB]
    assert chunk_tokens_for("auto", block_tokens, token_bytes) == (enough or allowed[-1:])[0]


@given(block_tokens=BLOCKS)
def test_auto_of_an_engine_that_does_not_say_its_bytes_is_a_wish_of_128(block_tokens: int) -> None:
    assert chunk_tokens_for("auto", block_tokens) == chunk_tokens_for(DEFAULT_CHUNK_TOKENS, block_tokens)


@given(block_tokens=BLOCKS, token_bytes=st.integers(1, 1 << 24), more=st.integers(0, 1 << 20))
def test_more_bytes_a_token_never_make_a_chunk_longer(block_tokens: int, token_bytes: int, more: int) -> None:
    longer = chunk_tokens_for("auto", block_tokens, token_bytes)
    assert chunk_tokens_for("auto", block_tokens, token_bytes + more) <= longer


@pytest.mark.parametrize(
    ("block_tokens", "token_bytes", "tokens"),
    [
        *((16, 128 << 10, 64), (16, 12 << 10, 176), (16, 1 << 10, 256), (64, 40 << 10, 64), (48, 4 << 10, 240)),
        *((384, 4 << 10, 384), (528, 1, 528), (1152, 1 << 20, 1152), (128, 12 << 10, 256), (1, 20 << 10, 103)),
    ],
)
def test_auto_by_example(block_tokens: int, token_bytes: int, tokens: int) -> None:
    assert chunk_tokens_for("auto", block_tokens, token_bytes) == tokens
