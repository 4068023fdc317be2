"""Reading an engine's layout from its tensors, and moving blocks: every byte of the named ones, and no other."""

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio.adapters.worker.paged import PagedKV
from lmcache_trio.errors import Misuse

BLOCKS, LAYERS = 11, 4
Caches = dict[str, torch.Tensor]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(1, 100, shape).to(dtype)


def apart_second() -> Caches:
    return {f"l{i}": random(2, BLOCKS, 4, 2, 8, dtype=torch.bfloat16) for i in range(LAYERS)}


def apart_first() -> Caches:
    return {f"l{i}": random(BLOCKS, 4, 8, dtype=torch.float16) for i in range(LAYERS)}


def one_storage_layers_outside() -> Caches:
    whole = random(LAYERS, 2, BLOCKS, 4, 8)
    return {f"l{i}": whole[i] for i in range(LAYERS)}


def one_storage_blocks_outside() -> Caches:
    whole = random(BLOCKS, LAYERS, 4, 8)
    return {f"l{i}": whole[:, i] for i in range(LAYERS)}


def heads_before_tokens() -> Caches:
    return {f"l{i}": random(2, BLOCKS, 2, 4, 8).permute(0, 1, 3, 2, 4) for i in range(LAYERS)}


def of_unequal_sizes() -> Caches:
    return {"a": random(BLOCKS, 4, 8), "b": random(2, BLOCKS, 4, 2), "c": random(BLOCKS, 4, dtype=torch.uint8)}


layouts = pytest.mark.parametrize(
    "make",
    [
        apart_second,
        apart_first,
        one_storage_layers_outside,
        one_storage_blocks_outside,
        heads_before_tokens,
        of_unequal_sizes,
    ],
)


def block(tensor: torch.Tensor, number: int) -> torch.Tensor:
    return tensor[number] if tensor.shape[0] == BLOCKS else tensor[:, number]


@layouts
@pytest.mark.parametrize("chosen", [[3, 9, 1, 7], [4, 5, 6, 7], [10]])
@pytest.mark.parametrize("skip", [0, 2])
def test_blocks_come_back_byte_for_byte_and_no_other_is_touched(
    make: Callable[[], Caches], chosen: list[int], skip: int
) -> None:
    caches = make()
    kept = {name: tensor.clone() for name, tensor in caches.items()}
    kv = PagedKV(caches, num_blocks=BLOCKS)
    slot = np.zeros(kv.groups[0].block_bytes * len(chosen), dtype=np.uint8)
    kv.groups[0].gather(kv.check(chosen), slot)
    for tensor in caches.values():
        tensor.zero_()
    into = [2, 0, 8, 6][: len(chosen)][skip:]
    kv.groups[0].scatter(slot, len(chosen), slice(skip, skip + len(into)), kv.check(into))
    for name, tensor in caches.items():
        for number in range(BLOCKS):
            found = block(tensor, number)
            if number in into:
                assert torch.equal(found, block(kept[name], chosen[into.index(number) + skip]))
            else:
                assert not found.any()


@layouts
def test_the_number_of_blocks_is_read_from_the_shapes(make: Callable[[], Caches]) -> None:
    assert PagedKV(make()).num_blocks == BLOCKS


def test_a_slot_holds_layers_then_pieces_then_blocks() -> None:
    caches = apart_second()
    kv = PagedKV(caches)
    slot = np.zeros(kv.groups[0].block_bytes * 2, dtype=np.uint8)
    kv.groups[0].gather(kv.check([7, 3]), slot)
    pieces = [tensor[piece, [7, 3]].contiguous() for tensor in caches.values() for piece in range(2)]
    assert slot.tobytes() == b"".join(piece.view(torch.uint8).numpy().tobytes() for piece in pieces)


def test_layers_of_one_storage_are_moved_by_one_call() -> None:
    assert len(PagedKV(one_storage_layers_outside()).groups[0].runs) == 1
    assert len(PagedKV(one_storage_blocks_outside()).groups[0].runs) == 1
    assert len(PagedKV(apart_second()).groups[0].runs) == LAYERS


def test_layouts_that_differ_have_different_fingerprints() -> None:
    makers = [apart_second, apart_first, one_storage_blocks_outside, heads_before_tokens, of_unequal_sizes]
    assert len({PagedKV(make()).layout for make in makers}) == len(makers)
    assert PagedKV(apart_second()).layout == PagedKV(apart_second()).layout


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(3, 5, 4), "fits neither"),
        (torch.zeros(2, BLOCKS, 4, 16)[..., ::2], "not contiguous"),
        (torch.zeros(2, BLOCKS, 4, 16)[..., :8], "not contiguous"),
        (torch.zeros(BLOCKS, 1).expand(BLOCKS, 8), "not contiguous"),
        (torch.zeros(1, 8).expand(BLOCKS, 8), "overlap"),
        (torch.zeros(BLOCKS, 4, device="meta"), "must lie in CPU memory"),
    ],
)
def test_what_cannot_be_moved_is_refused_by_layer_shape_and_strides(tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(Misuse, match=says) as caught:
        PagedKV({"good": torch.zeros(BLOCKS, 4), "bad one": tensor}, num_blocks=BLOCKS)
    assert "'bad one'" in str(caught.value)
    assert str(tuple(tensor.shape)) in str(caught.value)
    assert str(tensor.stride()) in str(caught.value)


def test_two_blocks_after_two_pieces_are_ambiguous_and_refused() -> None:
    with pytest.raises(Misuse, match="fits both"):
        PagedKV({"l": torch.zeros(2, 2, 4, 8)}, num_blocks=2)
    with pytest.raises(Misuse, match="num_blocks"):
        PagedKV({"l": torch.zeros(2, 2, 4, 8)})


def test_a_block_that_is_not_there_is_refused() -> None:
    kv = PagedKV(apart_first())
    for wrong in (-1, BLOCKS):
        with pytest.raises(Misuse, match="block_ids"):
            kv.check([0, wrong])


def test_nothing_as_large_as_a_chunk_is_made_on_the_way() -> None:
    kv = PagedKV({f"l{i}": torch.zeros(2, BLOCKS, 16, 8, 64) for i in range(8)})
    chosen = kv.check([7, 3, 9, 1])
    slot = np.zeros(kv.groups[0].block_bytes * 4, dtype=np.uint8)
    kv.groups[0].gather(chosen, slot)
    profile: Any = torch.autograd.profiler.profile(profile_memory=True)
    with profile:
        tracemalloc.start()
        kv.groups[0].gather(chosen, slot)
        kv.groups[0].scatter(slot, 4, slice(4), chosen)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < slot.nbytes / 8
    assert max((event.cpu_memory_usage for event in profile.key_averages()), default=0) < slot.nbytes / 8


@given(st.permutations(range(BLOCKS)), st.integers(1, BLOCKS))
def test_any_choice_of_blocks_makes_the_round_trip(order: list[int], count: int) -> None:
    caches = one_storage_blocks_outside()
    kept = {name: tensor.clone() for name, tensor in caches.items()}
    kv = PagedKV(caches)
    slot = np.zeros(kv.groups[0].block_bytes * count, dtype=np.uint8)
    chosen = kv.check(order[:count])
    kv.groups[0].gather(chosen, slot)
    for tensor in caches.values():
        tensor[order[:count]] = 0
    kv.groups[0].scatter(slot, count, slice(count), chosen)
    assert all(torch.equal(caches[name], kept[name]) for name in caches)


@layouts
def test_a_slot_of_another_length_than_the_chunk_is_neither_written_nor_read(make: Callable[[], Caches]) -> None:
    """One block less would be written over a neighbour, one more be published half empty."""
    caches = make()
    kv = PagedKV(caches, num_blocks=BLOCKS)
    before = {name: tensor.clone() for name, tensor in caches.items()}
    blocks, length = np.arange(4), kv.groups[0].block_bytes
    for size in (0, 3 * length, 4 * length - 1, 4 * length + 1, 5 * length):
        slot = np.zeros(size, dtype=np.uint8)
        moves: list[Callable[[], None]] = [
            partial(kv.groups[0].gather, blocks, slot),
            partial(kv.groups[0].scatter, slot, 4, slice(1, 3), blocks[:2]),
        ]
        for move in moves:
            with pytest.raises(Misuse, match=f"slot has {size} bytes"):
                move()
        assert not slot.any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in caches.items())


# --- groups ----------------------------------------------------------------------------------------------------------

GROUPED = [["a", "c"], ["b"], ["state"]]


def groups_in_one_pool() -> Caches:
    """Pages of 512 bytes: each is 16 float32 tokens of two layers, or of one layer of another kind, or one state."""
    pages = torch.randint(1, 100, (BLOCKS, 512), dtype=torch.uint8)
    state = torch.as_strided(pages, (BLOCKS, 100), (512, 1))
    return {
        "a": pages.view(BLOCKS, 2, 256).view(torch.float32)[:, 0].view(BLOCKS, 16, 4),
        "b": pages.view(torch.float32).view(BLOCKS, 32, 4),
        "c": pages.view(BLOCKS, 2, 256).view(torch.float32)[:, 1].view(BLOCKS, 16, 4),
        "state": state,
    }


@pytest.mark.parametrize("group", range(3))
def test_a_group_moves_blocks_of_its_own_layers_alone_also_in_one_storage(group: int) -> None:
    caches = groups_in_one_pool()
    kept = {name: tensor.clone() for name, tensor in caches.items()}
    kv = PagedKV(caches, groups=GROUPED)
    names = GROUPED[group]
    chosen, into = [3, 9, 1], [0, 7]
    assert kv.groups[group].block_bytes == sum(caches[name][0].nbytes for name in names)
    slot = np.zeros(kv.groups[group].block_bytes * 3, dtype=np.uint8)
    kv.groups[group].gather(kv.check(chosen), slot)
    pieces = [caches[name][chosen].contiguous() for name in names]
    assert slot.tobytes() == b"".join(piece.view(torch.uint8).numpy().tobytes() for piece in pieces)
    kv.groups[group].scatter(slot, 3, slice(1, 3), kv.check(into))
    for name in names:
        assert torch.equal(caches[name][into], kept[name][[9, 1]])
    others = [block for block in range(BLOCKS) if block not in into]
    assert all(torch.equal(tensor[others], kept[name][others]) for name, tensor in caches.items())
    if group == 2:  # the rest of its pages
        assert torch.equal(caches["c"][into], kept["c"][into])


def test_the_fingerprint_tells_which_layer_is_in_which_group() -> None:
    caches = groups_in_one_pool()
    ways: list[Any] = [GROUPED, [["b", "c"], ["a"], ["state"]], [["a", "b", "c"], ["state"]], [[*caches]], None]
    assert len({PagedKV(caches, groups=way).layout for way in ways}) == len(ways)
    assert PagedKV(caches, groups=[["c", "a"], ["b"], ["state"]]).layout == PagedKV(caches, groups=GROUPED).layout


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([["a", "c"], ["b"], []], r"groups\[2\] is \[\]"),
        ([["a", "c"], ["b"], "state"], r"groups\[2\] is 'state'"),
        ([["a", "c"], ["b", "a"], ["state"]], r"groups\[1\] has layer 'a', which is in group 0 already"),
        ([["a", "c"], ["b", "d"], ["state"]], r"groups\[1\] has layer 'd', which is not among kv_caches"),
        ([["a"], ["b"], ["state"]], "layer 'c' is in no group"),
    ],
)
def test_a_layer_that_is_not_in_just_one_group_is_named(groups: Any, says: str) -> None:
    with pytest.raises(Misuse, match=says):
        PagedKV(groups_in_one_pool(), groups=groups)
