"""The KV groups of a model, as vLLM tells them, and what the connector's two sides do with more than one."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from support.vllm_model import BLOCK, CHUNK, Cache, Memory, Mover, Request

from lmcache_trio import ConfigError, Misuse
from lmcache_trio.adapters import Group, LoadSpec, Need, StoreSpec
from lmcache_trio.adapters.vllm.groups import KVGroups, find_groups, token_bytes_of
from lmcache_trio.adapters.vllm.metadata import StepPlan
from lmcache_trio.adapters.vllm.scheduler_side import SchedulerSide, StepOutput
from lmcache_trio.adapters.vllm.settings import LoadMode, check_load_mode
from lmcache_trio.adapters.vllm.worker_side import WorkerSide

EVERY, WINDOW, STATE = Group(Need.EVERY, 0, BLOCK), Group(Need.WINDOW, 5, BLOCK), Group(Need.STATE, 0, CHUNK)
TOKENS = list(range(3 * CHUNK + 1))


# --- what vLLM tells ------------------------------------------------------------------------------------------------


@attrs.frozen
class FullAttentionSpec:
    block_size: int = 16


@attrs.frozen
class MLAAttentionSpec(FullAttentionSpec):
    pass


@attrs.frozen
class RSWASpec(FullAttentionSpec):
    pass


@attrs.frozen
class SlidingWindowSpec:
    sliding_window: int = 128
    block_size: int = 16
    extra_retained_tokens: int = 0
    prefix_replay_tokens: int = 0


@attrs.frozen
class ChunkedLocalAttentionSpec:
    attention_chunk_size: int = 1024
    block_size: int = 16


@attrs.frozen
class MambaSpec:
    block_size: int = 400
    mamba_cache_mode: str = "align"
    num_speculative_blocks: int = 0


@attrs.frozen
class UniformTypeKVCacheSpecs:
    kv_cache_specs: dict[str, Any]
    block_size: int = 16


@attrs.frozen
class CrossAttentionSpec:
    block_size: int = 16


def config(**parallel: int) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, **parallel),
        cache_config=SimpleNamespace(block_size=16),
    )


def kv_config(
    *specs: Any, scratch: Sequence[int] = (), eagle: Sequence[int] = (), host: Sequence[int] = (), alignment: int = 16
) -> Any:
    groups = [
        SimpleNamespace(
            kv_cache_spec=spec, layer_names=[f"layer {i}"], is_eagle_group=i in eagle, host_resident=i in host
        )
        for i, spec in enumerate(specs)
    ]
    ids = tuple(i for i in range(len(specs)) if i not in scratch)
    return SimpleNamespace(kv_cache_groups=groups, prefix_cacheable_group_ids=ids, cache_hit_alignment_tokens=alignment)


def test_one_group_of_full_attention_needs_no_name() -> None:
    for spec in (FullAttentionSpec(), MLAAttentionSpec(), UniformTypeKVCacheSpecs({"a": FullAttentionSpec()})):
        found = find_groups(config(), kv_config(spec, alignment=64))
        assert found.alone
        assert (found.named, found.block_tokens, found.chunk_tokens_for("auto")) == ((), 16, None)


def test_groups_are_those_of_vllm_in_its_order() -> None:
    found = find_groups(
        config(), kv_config(SlidingWindowSpec(), ChunkedLocalAttentionSpec(), FullAttentionSpec(32), alignment=32)
    )
    assert found.named == (Group(Need.WINDOW, 128, 16), Group(Need.LOCAL, 1024, 16), Group(Need.EVERY, 0, 32))
    assert found.layers == (("layer 0",), ("layer 1",), ("layer 2",))
    assert (found.block_tokens, found.chunk_tokens_for("auto")) == (32, None)


def test_one_group_of_a_window_has_a_name_too() -> None:
    found = find_groups(config(), kv_config(SlidingWindowSpec(extra_retained_tokens=2)))
    assert not found.alone
    assert found.named == (Group(Need.WINDOW, 130, 16),)


def test_chunks_of_a_model_with_states_end_where_vllm_keeps_one() -> None:
    found = find_groups(config(), kv_config(MambaSpec(), FullAttentionSpec(400), alignment=400))
    assert found.named == (Group(Need.STATE, 0, 400), Group(Need.EVERY, 0, 400))
    assert found.block_tokens == found.chunk_tokens_for("auto") == 400
    found = find_groups(config(), kv_config(MambaSpec(), FullAttentionSpec(16), alignment=48))
    assert found.chunk_tokens_for("auto") == 48, "the least that is a multiple of blocks and of the alignment"


@pytest.mark.parametrize("block_tokens", [16, 48, 384, 528, 1152])
def test_a_number_is_a_wish_that_whole_blocks_reach(block_tokens: int) -> None:
    for spec in (FullAttentionSpec(block_tokens), MambaSpec(block_tokens)):
        found = find_groups(config(), kv_config(spec, alignment=block_tokens))
        tokens = found.chunk_tokens_for(256)
        assert tokens is not None
        assert tokens % block_tokens == 0
        assert tokens - block_tokens < 256 <= tokens


# A scheduler sees the first stage's layers, and one spec of a group whose layers have several. A rank sees its own.

PAGE = 4096


def paged(spec: Any, layers: int, pages: Sequence[int]) -> Any:
    """The KV cache of one group and 100 blocks. *pages*: the bytes of a block by layer."""
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=[f"layer {i}" for i in range(layers)])
    tensor = SimpleNamespace(size=100 * sum(pages))
    return SimpleNamespace(kv_cache_groups=[group], kv_cache_tensors=[tensor], num_blocks=100)


@attrs.frozen
class PagedSpec(FullAttentionSpec):
    page_size_bytes: int = PAGE


def bytes_by_vllm(kv: Any, *groups: Group, stages: int = 1, layers: int = 0) -> int:
    found = KVGroups(tuple(range(len(groups))), groups, (), 16)
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: layers),
    )
    return token_bytes_of(vllm_config, kv, found)


def test_the_bytes_of_a_token_are_those_of_a_block_in_all_groups_but_states() -> None:
    kv = paged(PagedSpec(), 4, [PAGE] * 4)
    every, window, coarse = Group(Need.EVERY, 0, 16), Group(Need.WINDOW, 128, 16), Group(Need.EVERY, 0, 64)
    assert bytes_by_vllm(kv, every) == 4 * PAGE // 16
    assert bytes_by_vllm(kv, every, window) == 2 * (4 * PAGE // 16)
    assert bytes_by_vllm(kv, coarse, window, Group(Need.STATE, 0, 400)) == 4 * PAGE // 16 + 4 * PAGE // 64


def test_layers_of_several_sizes_have_one_sum_in_the_scheduler_and_in_a_rank() -> None:
    pages, every = [PAGE, PAGE // 4] * 3, Group(Need.EVERY, 0, 16)
    rank = UniformTypeKVCacheSpecs({f"{i}": PagedSpec(page_size_bytes=page) for i, page in enumerate(pages)})
    sums = {bytes_by_vllm(paged(spec, 6, pages), every) for spec in (rank, PagedSpec())}
    assert sums == {sum(pages) // 16}
    of_stages = {bytes_by_vllm(paged(spec, 6, pages), every, stages=2, layers=12) for spec in (rank, PagedSpec())}
    assert of_stages == {0}, "a stage may have more of the large ones than another"


def test_all_pipeline_stages_say_the_bytes_of_the_one_with_the_most_layers() -> None:
    said = {
        bytes_by_vllm(paged(PagedSpec(), n, [PAGE] * n), Group(Need.EVERY, 0, 16), stages=4, layers=30) for n in (7, 8)
    }
    assert said == {8 * PAGE // 16}


def test_a_model_without_tensors_says_nothing() -> None:
    kv = SimpleNamespace(kv_cache_groups=[], kv_cache_tensors=[], num_blocks=1)
    assert bytes_by_vllm(kv, Group(Need.EVERY, 0, 16)) == 0


def test_scratch_groups_are_left_out() -> None:
    found = find_groups(
        config(), kv_config(CrossAttentionSpec(), SlidingWindowSpec(), FullAttentionSpec(), scratch=[0])
    )
    assert found.ids == (1, 2)
    assert found.block_lists(([9], [0, 3], [4, 5])) == ([-1, 3], [4, 5])
    assert found.states({"r": [(1, 3, 32), (0, 9, 32)]}) == {"r": [(0, 3, 32)]}


REFUSED = {
    "FullAttentionSpec, SlidingWindowSpec": kv_config(SlidingWindowSpec(), FullAttentionSpec(), scratch=[0]),
    "CrossAttentionSpec": kv_config(CrossAttentionSpec()),
    "RSWASpec": kv_config(RSWASpec()),
    "no KV cache group": kv_config(SlidingWindowSpec(), scratch=[0]),
    "mamba_cache_mode 'none'": kv_config(MambaSpec(mamba_cache_mode="none")),
    "1 speculative blocks": kv_config(MambaSpec(num_speculative_blocks=1)),
    "group 1 has layers of a drafter": kv_config(FullAttentionSpec(), SlidingWindowSpec(), eagle=[1]),
    "the last window": kv_config(FullAttentionSpec(), SlidingWindowSpec(prefix_replay_tokens=8)),
    "chunked local attention alone": kv_config(ChunkedLocalAttentionSpec()),
    "HiSparse": kv_config(FullAttentionSpec(), SlidingWindowSpec(), host=[0]),
    "keep different tokens": kv_config(UniformTypeKVCacheSpecs({"a": FullAttentionSpec(), "b": SlidingWindowSpec()})),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_would_be_wrong_is_refused_by_name(why: str) -> None:
    with pytest.raises(Misuse, match=why):
        find_groups(config(), REFUSED[why])


def test_ranks_whose_blocks_hold_no_consecutive_tokens_are_refused_and_pipelines_of_groups() -> None:
    with pytest.raises(Misuse, match="decode_context_parallel_size is 2"):
        find_groups(config(decode_context_parallel_size=2), kv_config(FullAttentionSpec()))
    pipeline = config()
    pipeline.parallel_config.pipeline_parallel_size = 2
    assert find_groups(pipeline, kv_config(FullAttentionSpec())).alone
    with pytest.raises(Misuse, match="pipeline_parallel_size"):
        find_groups(pipeline, kv_config(SlidingWindowSpec()))


def test_synchronous_loads_are_refused_where_a_failed_block_does_not_tell_what_is_valid() -> None:
    check_load_mode(LoadMode.SYNC, 1)
    check_load_mode(LoadMode.ASYNC, 1, whole=False)
    with pytest.raises(ConfigError, match="several KV groups"):
        check_load_mode(LoadMode.SYNC, 1, whole=False)


@attrs.frozen
class Tensor:
    address: int
    shape: tuple[int, ...] = (8, 4)

    def data_ptr(self) -> int:
        return self.address


def test_of_one_group_all_layers_are_registered_that_vllm_gives() -> None:
    found = find_groups(config(), kv_config(FullAttentionSpec()))
    assert found.kept({"layer 0": Tensor(0), "sharing": Tensor(0)}).keys() == {"layer 0", "sharing"}


def test_layers_that_share_anothers_kv_are_registered_once_and_strange_ones_refused() -> None:
    found = find_groups(config(), kv_config(SlidingWindowSpec(), FullAttentionSpec()))
    caches = {"layer 1": Tensor(1), "layer 0": Tensor(0), "sharing": Tensor(1)}
    assert list(found.kept(caches)) == ["layer 0", "layer 1"]
    with pytest.raises(Misuse, match="'strange'"):
        found.kept({**caches, "strange": Tensor(7)})


# --- the scheduler's side -------------------------------------------------------------------------------------------


class GroupCache(Cache):
    """A cache with all of TOKENS, which says what it was asked for, and gives one spec per group."""

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__(lambda: False)
        self.groups = groups
        self.seen: list[object] = []
        for digest in self.extend("seed", TOKENS):
            self.chunks[digest] = [[0] * BLOCK] * (CHUNK // BLOCK)
        self.digests.clear()

    def loads_after_alloc(
        self, request_id: str, external_tokens: int, *, local_tokens: int = 0, blocks: Sequence[Sequence[int]]
    ) -> tuple[LoadSpec, ...]:
        self.answers.pop(request_id)
        self.seen.append((local_tokens, external_tokens, blocks))
        return tuple(LoadSpec(request_id, 1, b"l", 0, 1, 0, tuple(ids[-1:]), group=i) for i, ids in enumerate(blocks))

    def store_specs(
        self, request_id: str, first_chunk: int, end_chunk: int, blocks: Sequence[Sequence[int]]
    ) -> tuple[StoreSpec, ...]:
        self.seen.append((first_chunk, end_chunk, blocks))
        return ()

    def state_spec(self, request_id: str, group: int, boundary_tokens: int, block_id: int) -> StoreSpec | None:
        self.seen.append((group, boundary_tokens, block_id))
        at, rest = divmod(boundary_tokens, CHUNK)
        return (
            None if rest else StoreSpec(request_id, 1, b"", self.digests[request_id][at - 1], (block_id,), group=group)
        )


def side(cache: Cache, *groups: Group) -> SchedulerSide:
    return SchedulerSide(cache, groups=groups, asynchronous=True, identify=lambda _: None)


def request() -> Request:
    return Request("r", list(TOKENS), len(TOKENS), 8)


BLOCKS = ([-1, -1, -1, 3, 4, 5], [10, 11, 12, 13, 14, 15])


def test_a_hit_is_loaded_in_every_group_and_its_blocks_are_waited_for() -> None:
    cache, asked = GroupCache((WINDOW, EVERY)), request()
    scheduler = side(cache, WINDOW, EVERY)
    assert scheduler.offer(asked, BLOCK) == (3 * CHUNK - BLOCK, True)
    scheduler.allocated(asked, BLOCKS, 3 * CHUNK - BLOCK)
    plan = scheduler.plan({}, [], lambda _: BLOCKS)
    assert cache.seen == [(BLOCK, 3 * CHUNK - BLOCK, BLOCKS)]
    assert [(spec.group, spec.block_ids) for spec in plan.loads] == [(0, (5,)), (1, (15,))]
    assert set(plan.written) - {-1} == {3, 4, 5, 11, 12, 13, 14, 15}, "what the engine has itself stays as it is"


def test_a_request_whose_load_failed_is_computed_from_its_first_token_and_offered_nothing() -> None:
    cache, asked = GroupCache((WINDOW, EVERY)), request()
    scheduler = side(cache, WINDOW, EVERY)
    scheduler.offer(asked, 0)
    scheduler.allocated(asked, BLOCKS, 3 * CHUNK)
    scheduler.plan({}, [], lambda _: BLOCKS)
    scheduler.output(StepOutput(1, loaded=frozenset({"r"}), failed=frozenset({"r", "of another connector"})))
    assert cache.failed == {"r": 0}
    assert scheduler.statistics()["loading"] == 0
    assert scheduler.offer(asked, 0) == (0, False)
    scheduler.allocated(asked, BLOCKS, 0)
    cache.seen.clear()
    scheduler.plan({"r": 2 * CHUNK}, [], lambda _: BLOCKS)
    assert cache.seen == [(0, 2, BLOCKS)], "what is computed instead is stored"


def test_states_are_stored_from_the_blocks_that_the_engine_names_and_no_others() -> None:
    cache, asked = GroupCache((STATE, EVERY)), request()
    scheduler = side(cache, STATE, EVERY)
    scheduler.allocated(asked, ([-1, 2], BLOCKS[1]), 0)
    cache.seen.clear()
    plan = scheduler.plan({"r": 2 * CHUNK}, [], lambda _: ([-1, 2], BLOCKS[1]), states={"r": [(0, 2, 2 * CHUNK)]})
    assert cache.seen == [(0, 2, ([-1, 2], BLOCKS[1])), (0, 2 * CHUNK, 2)]
    assert [(spec.group, spec.block_ids) for spec in plan.stores] == [(0, (2,))]
    scheduler.finished(asked, ([-1, 2], BLOCKS[1]))
    assert scheduler.plan({}, [], lambda _: ()).closing == ("r",), "its session stays until the state is stored"


def test_a_state_behind_tokens_that_nobody_knows_or_inside_a_chunk_is_not_stored() -> None:
    cache, asked = GroupCache((STATE, EVERY)), request()
    scheduler = side(cache, STATE, EVERY)
    scheduler.allocated(asked, BLOCKS, 0)
    beyond, inside = len(TOKENS) + CHUNK, CHUNK + 1
    offered = {"r": [(0, 2, beyond), (0, 3, inside)], "unknown": [(0, 4, CHUNK)]}
    assert scheduler.plan({"r": 1}, [], lambda _: BLOCKS, states=offered).stores == ()
    assert cache.seen == [(0, inside, 3)]


# --- a worker's side ------------------------------------------------------------------------------------------------


class Failing(Mover):
    """Loads whose request is named as failed before it is named as over."""

    def __init__(self) -> None:
        super().__init__(Cache(lambda: False), Memory(8, sharing=False), lambda: False)
        self.failed_requests: set[str] = set()

    def copy(self, spec: StoreSpec | LoadSpec) -> None: ...

    def take_failed_requests(self) -> set[str]:
        failed, self.failed_requests = self.failed_requests, set()
        return failed


def test_a_failed_load_is_named_by_its_request_when_all_its_loads_are_over_and_never_by_a_block() -> None:
    mover = Failing()
    worker = WorkerSide(mover, asynchronous=True, by_request=True)
    loads = [LoadSpec("r", 1, b"l", 0, 1, 0, (1, 2), group=group) for group in (0, 1)]
    worker.begin(StepPlan(1, loads=tuple(loads)))
    worker.load()
    mover.failed.update((1, 2))
    mover.failed_requests.add("r")
    report = worker.report()
    assert (report.loaded, report.failed) == (set(), set())
    assert worker.take_failed_blocks() == set()
    for spec in loads:
        mover.finish(spec)
    report = worker.report()
    assert (report.loaded, report.failed) == ({"r"}, {"r"})
    assert worker.report().failed == set(), "it was named twice"


def test_blocks_that_left_a_requests_window_are_waited_for_when_it_gets_them_again_and_once() -> None:
    waited: list[list[str]] = []
    mover = Failing()
    mover.wait_stores = lambda request_ids=None: waited.append(list(request_ids or ()))  # type: ignore[method-assign]
    worker = WorkerSide(mover, asynchronous=True, by_request=True)
    worker.begin(StepPlan(1, stores=(StoreSpec("r", 1, b"", b"d" * 32, (1, 2)),)))
    worker.store()
    worker.let_go(StepPlan(2, written=(2, 7)))
    worker.let_go(StepPlan(3, written=(1, 2)))
    assert waited == [["r"]]
