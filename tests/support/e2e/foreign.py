"""A connector of somebody else's, to stand beside ours in a MultiConnector: what it brings, it fails to bring.

It offers the first `BROUGHT` tokens of every prompt that is long enough, to be loaded before the step that computes
with them, writes garbage into their blocks instead, and says so when the step is over, as its interface has it.
"""

from typing import Any

import attrs
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from support.e2e.bench import BROUGHT

__all__ = ["FailingConnector"]


@attrs.frozen
class Blocks(KVConnectorMetadata):  # type: ignore[misc]
    """Blocks that the step must load."""

    ids: tuple[int, ...]


class FailingConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Fails the first synchronous load of each request; vLLM recomputes and does not ask it again for that request."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_tokens = vllm_config.cache_config.block_size
        self._offered: set[str] = set()
        self._planned: list[int] = []
        self._failed: set[int] = set()
        self._caches: dict[str, torch.Tensor] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if request.request_id in self._offered or num_computed_tokens or request.num_tokens <= BROUGHT:
            return 0, False
        return BROUGHT, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self._offered.add(request.request_id)
            self._planned += blocks.get_block_ids()[0][: num_external_tokens // self._block_tokens]

    def build_connector_meta(self, scheduler_output: Any) -> Blocks:
        planned, self._planned = self._planned, []
        return Blocks(tuple(planned))

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        return False, None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        ids = self._get_connector_metadata().ids
        for cache in self._caches.values():
            cache[list(ids)] = 0.25
        self._failed = set(ids)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed
