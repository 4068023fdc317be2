"""Exports as bytes: what was said comes back, and whatever else comes is a `ProtocolError`."""

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.transfer.exports import CudaMemory, DType, Export, SharedMemory, TensorView
from lmcache_trio._wire.handles import decode_export, descriptors_of, encode_export
from lmcache_trio.errors import Misuse, ProtocolError

HOST = SharedMemory(1 << 20, 7)
CUDA = CudaMemory(1 << 20, bytes(range(64)), b"uuid of a device")
KV_FIRST = TensorView(0, 4096, DType.bfloat16, (2, 5, 16, 2, 8), (1280, 256, 16, 8, 1))
BLOCK_FIRST = TensorView(0, 0, DType.float32, (5, 2, 16, 2, 8), (512, 256, 16, 8, 1))
GOOD = Export((HOST,), (KV_FIRST, BLOCK_FIRST), 5)


GROUPS = Export((HOST,), (KV_FIRST, attrs.evolve(BLOCK_FIRST, group=1), BLOCK_FIRST), 5)
"""Two groups, which lie in the same bytes."""


@pytest.mark.parametrize(
    "export", [GOOD, attrs.evolve(GOOD, memory=(CUDA, CUDA)), GROUPS], ids=["host", "cuda", "groups"]
)
def test_an_export_comes_back_as_it_was_said(export: Export) -> None:
    assert decode_export(encode_export(export), descriptors_of(export)) == export


def test_it_says_where_blocks_lie() -> None:
    assert [[(p.offset, p.stride, p.length) for p in pieces] for pieces in GROUPS.pieces] == [
        [(4096, 512, 512), (4096 + 2560, 512, 512), (0, 2048, 2048)],
        [(0, 2048, 2048)],
    ]
    assert GROUPS.group_block_bytes == (512 + 512 + 2048, 2048)
    assert GROUPS.block_bytes == sum(GROUPS.group_block_bytes)
    assert GOOD.group_block_bytes == (GOOD.block_bytes,)


@pytest.mark.parametrize("groups", [(1,), (0, 2), (1, 2), tuple(range(17))])
def test_the_groups_of_layers_are_numbered_from_0_on(groups: tuple[int, ...]) -> None:
    with pytest.raises(Misuse, match="number up to 16 groups from 0 on"):
        attrs.evolve(GOOD, layers=tuple(attrs.evolve(KV_FIRST, group=group) for group in groups))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (attrs.evolve(KV_FIRST, offset=(1 << 20) - 5119), "ends at byte"),
        (attrs.evolve(KV_FIRST, offset=-1), "ends at byte"),
        (attrs.evolve(KV_FIRST, allocation=1), "there are 1"),
        (attrs.evolve(KV_FIRST, allocation=-1), "there are 1"),
        (attrs.evolve(KV_FIRST, shape=(2, 6, 16, 2, 8)), "fits neither"),
        (attrs.evolve(KV_FIRST, strides=(1280, 128, 16, 8, 1)), "overlap"),
        (attrs.evolve(KV_FIRST, strides=(1280, 256, 16, 1, 8)), "not contiguous"),
        (attrs.evolve(KV_FIRST, strides=(1280, 256, 16, 8)), "a stride for each"),
        (attrs.evolve(KV_FIRST, strides=(1 << 50, 256, 16, 8, 1)), "0 or more"),
        (attrs.evolve(KV_FIRST, shape=(2, 5, 0, 2, 8)), "above 0"),
        (TensorView(0, 0, DType.uint8, (5,), (1,)), "2 to 8 dimensions"),
        (TensorView(0, 0, DType.uint8, (5,) * 9, (1,) * 9), "2 to 8 dimensions"),
    ],
)
def test_a_tensor_that_is_out_of_bounds_is_no_export(layer: TensorView, why: str) -> None:
    with pytest.raises(Misuse, match=why):
        attrs.evolve(GOOD, layers=(layer,))


def test_memory_that_is_none_is_no_export() -> None:
    for memory in (
        (),
        (HOST, CUDA),
        (attrs.evolve(HOST, size=0),),
        (attrs.evolve(HOST, size=1 << 60),),
        (attrs.evolve(HOST, descriptor=-1),),
        (attrs.evolve(CUDA, handle=b"short"),),
    ):
        with pytest.raises(Misuse):
            attrs.evolve(GOOD, memory=memory)


@pytest.mark.parametrize("descriptors", [[], [7, 8]])
def test_an_export_that_came_with_fewer_or_more_descriptors_is_refused(descriptors: list[int]) -> None:
    with pytest.raises(ProtocolError, match=f"{len(descriptors)} descriptors came with 1 allocations"):
        decode_export(encode_export(GOOD), descriptors)


def test_an_export_of_a_gpus_memory_brings_no_descriptor() -> None:
    with pytest.raises(ProtocolError, match="1 descriptors came with 0 allocations"):
        decode_export(encode_export(attrs.evolve(GOOD, memory=(CUDA, CUDA))), [7])


@given(st.binary(max_size=400))
def test_any_bytes_are_an_export_or_a_protocol_error(raw: bytes) -> None:
    try:
        decode_export(raw, [])
    except ProtocolError:
        return


@given(st.integers(0, len(encode_export(GROUPS)) - 1), st.integers(0, 255), st.integers(-8, 8))
def test_an_export_with_one_byte_changed_is_in_bounds_or_a_protocol_error(at: int, byte: int, more: int) -> None:
    raw = bytearray(encode_export(GROUPS))
    raw[at] = byte
    raw = raw + bytes(more) if more >= 0 else raw[:more]
    try:
        found = decode_export(bytes(raw), [7])
    except ProtocolError:
        return
    for pieces in found.pieces:
        for piece in pieces:
            assert piece.offset >= 0
            assert piece.offset + (found.num_blocks - 1) * piece.stride + piece.length <= found.memory[0].size


def test_another_version_is_refused_by_name() -> None:
    raw = bytearray(encode_export(GOOD))
    raw[4] = 9
    with pytest.raises(ProtocolError, match="version 9; this side reads version 3"):
        decode_export(bytes(raw), [7])
