"""`LMCacheTrioConnector`: what vLLM 0.32 and 0.33 call, handed on to the two sides that decide.

vLLM makes one instance in its scheduler and one in each worker, by default in processes of their own. A wrong
configuration is refused here, at start and by name. Later the connector never ends an engine: without a server every
lookup is a miss.

Refused: a `kv_load_failure_policy` other than recompute, a `load` mode that the engine cannot take back, and what
`groups` names.
"""

# vLLM is not installed where this is type-checked: pyright: reportMissingImports=false

import logging
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs
import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmcache_trio.adapters import PollingSchedulerAdapter, SchedulerAdapter, WorkerAdapter
from lmcache_trio.adapters.vllm.figures import WorkerFigures
from lmcache_trio.adapters.vllm.groups import find_groups, token_bytes_of
from lmcache_trio.adapters.vllm.identity import LoraIdentities, encode_keys, model_identity
from lmcache_trio.adapters.vllm.kv_events import KVEvents, are_on
from lmcache_trio.adapters.vllm.layout import layout_extras
from lmcache_trio.adapters.vllm.metadata import StepPlan
from lmcache_trio.adapters.vllm.replicas import are_replicated, replicas_of
from lmcache_trio.adapters.vllm.scheduler_side import BlockLists, Extras, SchedulerSide, StepOutput
from lmcache_trio.adapters.vllm.settings import LoadMode, check_failure_policy, check_load_mode, parse_settings
from lmcache_trio.adapters.vllm.stats import Metrics, Stats
from lmcache_trio.adapters.vllm.weights import WeightsWatch, find_models
from lmcache_trio.adapters.vllm.worker_side import WorkerSide
from lmcache_trio.errors import Misuse, Unavailable

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["LMCacheTrioConnector"]

logger = logging.getLogger(__name__)


@attrs.frozen
class Metadata(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler to the workers, in each step."""

    plan: StepPlan


@attrs.frozen
class WorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From the workers to the scheduler, after *step*. *closed*: by request, how many workers copy no more of it."""

    step: int
    failed_step: int
    closed: dict[str, int]
    changed: bool = False

    def aggregate(self, other: "WorkerMetadata") -> "WorkerMetadata":
        closed = {
            each: self.closed.get(each, 0) + other.closed.get(each, 0) for each in {**self.closed, **other.closed}
        }
        return WorkerMetadata(
            max(self.step, other.step),
            max(self.failed_step, other.failed_step),
            closed,
            self.changed or other.changed,
        )


class LMCacheTrioConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One engine's KV, stored in and loaded from a lmcache-trio server."""

    worker_adapter_class: type[WorkerAdapter] = WorkerAdapter
    """The class of the worker's adapter, which moves the bytes. Tests put a subclass here."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        _register(cls)

    def __new__(
        cls, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> Any:  # not always one of this class
        if not kv_cache_config.kv_cache_groups:
            return NothingToCache(vllm_config, role, kv_cache_config)
        return super().__new__(cls)

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        self._settings = parse_settings(transfer.kv_connector_extra_config or {})
        if role is KVConnectorRole.WORKER:
            # Within a MultiConnector *vllm_config* holds our part of the configuration, and vLLM obeys the whole one.
            whole = get_current_vllm_config_or_none() or vllm_config
            check_failure_policy(whole.kv_transfer_config.kv_load_failure_policy)
        self._replicas = replicas_of(vllm_config, kv_cache_config)
        self._groups = find_groups(vllm_config, kv_cache_config)
        check_load_mode(
            self._settings.load, vllm_config.max_concurrent_batches, self._replicas, whole=self._groups.alone
        )
        self._chunk_tokens = self._groups.chunk_tokens_for(self._settings.chunk_tokens)
        self._token_bytes = token_bytes_of(vllm_config, kv_cache_config, self._groups)
        self._asynchronous = self._settings.load is LoadMode.ASYNC
        self._loras = LoraIdentities()
        self._warned: set[str] = set()
        self._kv_caches: dict[str, torch.Tensor] = {}
        self._scheduler: SchedulerSide | None = None
        self._scheduler_adapter: SchedulerAdapter | None = None
        self._kv_events: KVEvents | None = None
        self._worker: WorkerSide | None = None
        self._worker_adapter: WorkerAdapter | None = None
        self._worker_figures: WorkerFigures | None = None
        self._closed: set[str] = set()
        if role is KVConnectorRole.SCHEDULER:
            self._start_scheduler(vllm_config)

    def _start_scheduler(self, vllm_config: "VllmConfig") -> None:
        transfer = self._kv_transfer_config
        ranks = vllm_config.parallel_config.tensor_parallel_size * vllm_config.parallel_config.pipeline_parallel_size
        adapter_class = PollingSchedulerAdapter if self._settings.sync_lookup else SchedulerAdapter
        self._scheduler_adapter = adapter_class(
            self._settings.address,
            engine_id=transfer.engine_id,
            identity=model_identity(vllm_config, self._settings.namespace),
            block_tokens=self._groups.block_tokens,
            shards=ranks // self._replicas,
            replicas=self._replicas,
            groups=self._groups.named,
            chunk_tokens=self._chunk_tokens,
            token_bytes=self._token_bytes,
            weights_version=self._settings.weights_version,
            lookup_timeout=self._settings.lookup_timeout,
            poll_interval=self._settings.poll_interval,
            server_uids=self._settings.server_uids,
            watch=are_on(vllm_config),
            model=vllm_config.model_config.model[-512:],  # a name on the wire has no more
        )
        if are_on(vllm_config):
            self._kv_events = KVEvents(self._scheduler_adapter, self._groups, self._kv_cache_config)
        self._scheduler = SchedulerSide(
            self._scheduler_adapter,
            groups=self._groups.groups,
            asynchronous=self._asynchronous,
            identify=self._identify,
            loads=transfer.is_kv_consumer,
            stores=transfer.is_kv_producer,
            workers=ranks,
            events=None if self._kv_events is None else self._kv_events.blocks,
        )

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a store that is dropped is a later miss, and nothing else

    # --- the scheduler's side ---------------------------------------------------------------------------------------

    def on_new_request(self, request: "Request") -> None:
        """A request may name the weights that its engine has: `kv_transfer_params = {"weights_version": …}`."""
        version = (request.kv_transfer_params or {}).get("weights_version")
        if version is None or self._scheduler_adapter is None:
            return
        try:
            self._scheduler_adapter.set_weights_version(version)
        except Misuse as exc:
            self._warn_once(f"a request's kv_transfer_params.weights_version goes unheeded: {exc}")

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._on_scheduler().offer(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        block_lists = self._groups.block_lists(blocks.get_block_ids())
        self._on_scheduler().allocated(request, block_lists, num_external_tokens)

    def get_external_cache_hit_sources(self, request: "Request", num_external_tokens: int) -> dict[CacheHitSource, int]:
        disk = self._on_scheduler().from_tiers(request.request_id, num_external_tokens)
        sources = {CacheHitSource.HOST: num_external_tokens - disk, CacheHitSource.DISK: disk}
        return {source: tokens for source, tokens in sources.items() if tokens}

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> Metadata:
        state = scheduler_output.kv_connector_block_state

        def blocks_of(request_id: str) -> BlockLists:
            return self._groups.block_lists(state.resolve_block_ids(request_id))

        grown = scheduler_output.scheduled_cached_reqs.new_block_ids
        written = [block for by_group in grown if by_group for ids in by_group for block in ids]
        written += scheduler_output.new_block_ids_to_zero or ()
        written += [copy.dst_block_id for copy in scheduler_output.kv_cache_block_copies or ()]
        plan = self._on_scheduler().plan(
            scheduler_output.num_scheduled_tokens,
            sorted(scheduler_output.preempted_req_ids or ()),
            blocks_of,
            written,
            self._groups.states(state.boundary_state_offloads),
        )
        return Metadata(plan)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        meta = connector_output.kv_connector_worker_meta
        said = meta if isinstance(meta, WorkerMetadata) else WorkerMetadata(0, 0, {})
        self._on_scheduler().output(
            StepOutput(
                step=said.step,
                loaded=frozenset(connector_output.finished_recving or ()),
                closed=said.closed,
                failed_blocks=frozenset(connector_output.invalid_block_ids),
                failed=frozenset(connector_output.failed_recving),
                failed_step=said.failed_step,
                changed=said.changed,
            )
        )

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))  # beside connectors of one group

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._on_scheduler().finished(request, self._groups.block_lists(block_ids))
        return False, None  # its blocks are free: their next owner waits for our copies (`WorkerSide.let_go`)

    def take_events(self) -> Iterable["KVCacheEvent"]:
        return () if self._kv_events is None else self._kv_events.take()

    def reset_cache(self) -> bool | None:
        """Forget every chunk of this engine's namespace. True only when the server confirmed it."""
        if self._scheduler_adapter is None:
            return None
        self._on_scheduler().reset()
        return self._scheduler_adapter.reset_cache()

    def _identify(self, request: "Request") -> Extras | None:
        """The extras of *request*: vLLM's own extra keys, with a LoRA's files in place of its path."""
        if request.resumable:
            raise Unavailable("a streaming-input session may take back tokens")
        lora = request.lora_request
        identity = b""
        if lora is not None:
            found = self._loras.identity(lora.lora_path, reloaded=lora.load_inplace)
            if found is None:
                self._warn_once(
                    f"requests of LoRA {lora.lora_name!r} are not cached: the files of {lora.lora_path!r} cannot be "
                    "read, or have changed since they were first used; load the adapter with load_inplace"
                )
                raise Unavailable(f"the files of LoRA {lora.lora_name!r} are not known")
            identity = found
        elif not request.mm_features and not request.cache_salt and request.prompt_embeds is None:
            return None

        def extras(first: int, end: int) -> bytes:
            keys, _ = generate_block_hash_extra_keys(request, first, end, 0)
            return encode_keys((key[0], key[1], identity) if key[0] == "lora" else key for key in keys or ())

        return extras

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _on_scheduler(self) -> SchedulerSide:
        if self._scheduler is None:
            raise Misuse("this connector was made for a worker, and vLLM called it in the scheduler")
        return self._scheduler

    # --- a worker's side --------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        tensor_ranks, pipeline_ranks = get_tp_group(), get_pp_group()
        distinct = tensor_ranks.world_size // self._replicas  # consecutive ranks hold the same bytes
        extras = layout_extras(self._vllm_config, self._kv_cache_config)
        extras += [f"groups={self._groups.named}"] if self._groups.named else []
        models = find_models(self._vllm_config.compilation_config.static_forward_context)
        if self._replicas > self._kv_cache_config.kv_tp_replicas and not are_replicated(
            models, kv_caches, self._replicas
        ):
            logger.warning(
                "no cache: by this model's configuration %d ranks hold the same KV heads, and its layers do not say so",
                self._replicas,
            )
            extras.append(f"rank {tensor_ranks.rank_in_group}")  # replicas of several layouts have no namespace
        self._worker_adapter = self.worker_adapter_class(
            self._settings.address,
            engine_id=self._kv_transfer_config.engine_id,
            shard=pipeline_ranks.rank_in_group * distinct + tensor_ranks.rank_in_group // self._replicas,
            shards=pipeline_ranks.world_size * distinct,
            replica=tensor_ranks.rank_in_group % self._replicas,
            replicas=self._replicas,
            block_tokens=self._groups.block_tokens,
            groups=self._groups.named,
            chunk_tokens=self._chunk_tokens,
            token_bytes=self._token_bytes,
            fingerprint_extra=extras,
            path=self._settings.path,
            server_uids=self._settings.server_uids,
        )
        self._worker_adapter.register_kv_caches(
            self._groups.kept(kv_caches),
            num_blocks=self._kv_cache_config.num_blocks,
            groups=self._groups.layers if self._groups.named else None,
        )
        self._kv_caches = kv_caches
        self._worker_figures = WorkerFigures(self._worker_adapter)
        if self._worker is not None:  # behind `restore_kv_caches`: the weights may be unmapped yet
            self._worker.replace_mover(self._worker_adapter)
            return
        self._worker = WorkerSide(
            self._worker_adapter,
            asynchronous=self._asynchronous,
            by_request=not self._groups.alone,
            weights=self._watch_weights(models),
        )

    def _watch_weights(self, models: "list[torch.nn.Module]") -> WeightsWatch | None:
        model = self._vllm_config.model_config
        if not models:
            logger.info(
                "the model of this worker was not found: a change of its weights without a reset is not noticed"
            )
            return None
        return WeightsWatch(models, lambda: (model.model, model.revision))

    @classmethod
    def supports_sleep_mode(cls, *_: object) -> bool:
        """vLLM 0.33: may the KV memory be unmapped and mapped again? Yes, between these two calls."""
        return True

    def unregister_kv_caches(self) -> None:
        """vLLM takes the KV memory away: when this returns, no copy here or in the server touches it any more."""
        if self._worker_adapter is not None:
            self._worker_adapter.wait_stores()
            self._worker_adapter.shutdown()
            self._worker_adapter = None

    def restore_kv_caches(self) -> None:
        """The KV memory is back, at the same place and with other bytes."""
        if self._worker_adapter is None and self._kv_caches:
            self.register_kv_caches(self._kv_caches)

    release_kv_caches = unregister_kv_caches  # its name in vLLM after 0.33

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self._on_worker().let_go(kv_connector_metadata.plan)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._on_worker().begin(connector_metadata.plan)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        self._on_worker().load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        return  # all of a load is there before the pass begins

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        return  # stores begin once the step is computed

    def wait_for_save(self) -> None:
        self._on_worker().store()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        report = self._on_worker().report()
        self._closed |= report.closed
        return KVConnectorTransferResults(finished_recving=report.loaded, failed_recving=report.failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._on_worker().take_failed_blocks()

    def build_connector_worker_meta(self) -> WorkerMetadata:
        worker, closed = self._on_worker(), self._closed
        self._closed = set()
        return WorkerMetadata(worker.step, worker.failed_step, dict.fromkeys(closed, 1), worker.changed)

    def _on_worker(self) -> WorkerSide:
        if self._worker is None:
            raise Misuse("vLLM registered no KV caches with this connector before it ran a step")
        return self._worker

    # --- both -------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> Stats | None:
        counting = self._scheduler.lookup_times if self._scheduler is not None else self._worker_figures
        found = counting.take() if counting is not None else {}
        return Stats(found) if found else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data or {})

    @classmethod
    def build_prom_metrics(cls, *given: Any) -> Metrics:
        return Metrics(*given)

    def shutdown(self) -> None:
        for adapter in (self._worker_adapter, self._scheduler_adapter):
            if adapter is not None:
                adapter.shutdown()
        self._worker_adapter = self._scheduler_adapter = None


def _register(cls: type[LMCacheTrioConnector]) -> None:
    """Let vLLM find *cls* by its name alone, as a MultiConnector looks for the class of figures that came to it.

    Without that an engine ends at the first figures. Each process of vLLM imports this module for its configuration.
    """
    with suppress(ValueError):  # there is one of that name
        KVConnectorFactory.register_connector(cls.__name__, cls.__module__, cls.__name__)


_register(LMCacheTrioConnector)


class NothingToCache(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Takes the connector's place for a model without a KV cache, such as an encoder, so that the engine goes on."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            logger.warning("this model keeps no KV cache: there is nothing to cache, and the server is not used")

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        return

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> Metadata:
        return Metadata(StepPlan(step=0))

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        return

    def wait_for_save(self) -> None:
        return
