"""What the connector refuses at start and by name, and what it adds to token ids: vLLM's own classes, but no engine."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_trio import ConfigError, Misuse, Unavailable
from lmcache_trio.adapters import Need
from lmcache_trio.adapters.vllm.identity import _model_files_identity

with warnings.catch_warnings():  # vLLM's and torch's own, while they are imported
    warnings.simplefilter("ignore")
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, supports_hma
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MambaSpec,
        SlidingWindowSpec,
    )
    from vllm.v1.request import Request

    from lmcache_trio.adapters.vllm import LMCacheTrioConnector
    from lmcache_trio.adapters.vllm import connector as connector_module

pytestmark = pytest.mark.e2e

FULL = FullAttentionSpec(block_size=32, num_kv_heads=4, head_size=32, dtype=torch.bfloat16)
WINDOW = SlidingWindowSpec(block_size=32, num_kv_heads=4, head_size=32, dtype=torch.bfloat16, sliding_window=64)
LOCAL = ChunkedLocalAttentionSpec(
    block_size=32, num_kv_heads=4, head_size=32, dtype=torch.bfloat16, attention_chunk_size=96
)
STATE = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,), mamba_cache_mode="align")


def connector(
    *specs: Any, extra: dict[str, Any] | None = None, policy: str = "recompute", batches: int = 1, **parallel: Any
) -> LMCacheTrioConnector:
    """One as a worker makes it: it reaches for no server before it has tensors to register."""
    config: Any = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config=extra or {}, kv_load_failure_policy=policy, engine_id="e", is_kv_producer=True
        ),
        max_concurrent_batches=batches,
        parallel_config=SimpleNamespace(
            **dict.fromkeys(("decode_context_parallel_size", "prefill_context_parallel_size"), 1),
            **dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size"), 1),
        ),
    )
    vars(config.parallel_config).update(parallel)
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs or (FULL,))]
    caches = KVCacheConfig(8, [], groups, hash_block_size=32, cache_hit_alignment_tokens=32)
    return LMCacheTrioConnector(config, KVConnectorRole.WORKER, caches)


def request(**more: Any) -> Request:
    return Request("r", list(range(64)), SamplingParams(max_tokens=1), None, **more)


def extras(of: Request, first: int = 0, end: int = 32) -> bytes:
    found = connector()._identify(of)
    return b"" if found is None else found(first, end)


def test_a_cache_hands_nothing_over_that_must_be_delivered() -> None:
    assert not connector().requires_kv_delivery


def test_a_load_failure_policy_other_than_recompute_is_refused_with_the_line_to_paste() -> None:
    with pytest.raises(ConfigError, match='"kv_load_failure_policy": "recompute"'):
        connector(policy="fail")


def test_a_model_named_by_its_repository_is_its_revision_in_the_hubs_cache(tmp_path: Path) -> None:
    """Since transformers 5 a model's config does not tell the revision that was loaded."""
    revision, repository = "0" * 39 + "1", tmp_path / "models--org--model"
    for name in ("blobs", "refs", f"snapshots/{revision}"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for name in ("config.json", "model.safetensors"):
        (repository / "blobs" / name).write_bytes(b"{}")
        (repository / "snapshots" / revision / name).symlink_to(repository / "blobs" / name)
    model = SimpleNamespace(model="org/model", revision=None, hf_config=SimpleNamespace())
    load = SimpleNamespace(load_format="auto", download_dir=str(tmp_path))
    assert _model_files_identity(model, load, "") == b"revision:" + revision.encode()
    model.model = str(repository / "snapshots" / revision)
    assert _model_files_identity(model, load, "") == b"revision:" + revision.encode()
    model.model = "org/absent"
    with pytest.raises(ConfigError, match="namespace"):
        _model_files_identity(model, load, "")


def test_within_a_multi_connector_the_outer_load_failure_policy_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes each of its connectors with a part of the configuration, and obeys the whole."""
    for outer, inner in (("fail", "recompute"), ("recompute", "fail")):
        whole = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_load_failure_policy=outer))
        monkeypatch.setattr(connector_module, "get_current_vllm_config_or_none", lambda whole=whole: whole)
        if outer == "fail":
            with pytest.raises(ConfigError, match="of a MultiConnector outside of its connectors"):
                connector(policy=inner)
        else:
            assert connector(policy=inner)


def test_a_model_without_a_kv_cache_goes_on_uncached() -> None:
    config: Any = SimpleNamespace(kv_transfer_config=SimpleNamespace(is_kv_producer=True))
    made: Any = LMCacheTrioConnector(config, KVConnectorRole.SCHEDULER, SimpleNamespace(kv_cache_groups=[]))
    assert made.get_num_new_matched_tokens(request(), 0) == (0, False)
    assert made.request_finished_all_groups(request(), ()) == (False, None)
    assert made.get_finished(set()) == (None, None)
    assert not made.requires_kv_delivery


class Versions:
    """As much of a scheduler's adapter as takes a version."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def set_weights_version(self, version: object) -> None:
        if not isinstance(version, str):
            raise Misuse("give a str")
        self.said.append(version)


def test_a_request_names_the_weights_of_its_engine_and_a_bad_name_costs_no_engine() -> None:
    made, adapter = connector(), Versions()
    made._scheduler_adapter = adapter  # type: ignore[assignment]
    for params in (None, {}, {"weights_version": "step 1"}, {"weights_version": 7}):
        asked = request()
        asked.kv_transfer_params = params
        made.on_new_request(asked)
    assert adapter.said == ["step 1"]


class Gone:
    """As much of a worker's adapter as sleeping and waking need."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def wait_stores(self) -> None:
        self.said.append("stored")

    def shutdown(self) -> None:
        self.said.append("gone")


def test_kv_memory_is_let_go_of_before_it_is_unmapped_and_taken_again_after(monkeypatch: pytest.MonkeyPatch) -> None:
    made, adapter = connector(), Gone()
    taken: list[object] = []
    monkeypatch.setattr(made, "register_kv_caches", taken.append)
    caches = {"layer": torch.zeros(1)}
    made._worker_adapter, made._kv_caches = adapter, caches  # type: ignore[assignment]
    assert made.supports_sleep_mode(None)
    made.unregister_kv_caches()
    made.unregister_kv_caches()
    assert adapter.said == ["stored", "gone"]
    made.restore_kv_caches()
    assert taken == [caches]


def test_an_unknown_extra_key_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"kv_connector_extra_config\.chunk_token: is not a setting"):
        connector(extra={"chunk_token": 256})


def test_vllm_keeps_its_hybrid_cache_manager_on_for_the_connector() -> None:
    assert supports_hma(LMCacheTrioConnector)


def test_vllms_own_groups_are_known() -> None:
    assert connector()._groups.named == ()
    assert [group.need for group in connector(WINDOW, LOCAL, STATE, FULL)._groups.named] == [
        *(Need.WINDOW, Need.LOCAL, Need.STATE, Need.EVERY)
    ]


@pytest.mark.parametrize("specs", [(WINDOW,), (FULL, STATE)], ids=["a window alone", "two groups"])
def test_what_does_not_keep_all_tokens_is_not_loaded_synchronously(specs: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="several KV groups"):
        connector(*specs, extra={"load": "sync"})


def test_states_that_are_not_at_block_boundaries_are_refused_by_name() -> None:
    with pytest.raises(Misuse, match="mamba_cache_mode 'none'"):
        connector(replace(STATE, mamba_cache_mode="none"), FULL)


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_blocks_without_consecutive_tokens_are_refused_by_name(name: str) -> None:
    parallel: dict[str, Any] = {name: 2}
    with pytest.raises(Misuse, match=f"{name} is 2"):
        connector(**parallel)


def test_synchronous_loads_are_refused_where_steps_overlap() -> None:
    with pytest.raises(ConfigError, match="overlaps 2 steps"):
        connector(extra={"load": "sync"}, batches=2)


def test_token_ids_alone_say_who_a_plain_request_is() -> None:
    assert connector()._identify(request()) is None


def test_a_cache_salt_counts_in_the_first_chunk_and_so_in_all() -> None:
    assert extras(request(cache_salt="a")) != extras(request(cache_salt="b"))
    assert extras(request(cache_salt="a")) == extras(request(cache_salt="a"))


def test_an_image_counts_where_it_stands() -> None:
    def image(identifier: str, offset: int) -> Request:
        where = PlaceholderRange(offset=offset, length=8)
        feature = MultiModalFeatureSpec(data=None, modality="image", identifier=identifier, mm_position=where)
        return request(mm_features=[feature])

    seen = {extras(image("cat", 4)), extras(image("dog", 4)), extras(image("cat", 5))}
    assert len(seen) == 3
    assert extras(image("cat", 4), 32, 64) == b"", "no part of it stands in that chunk"


def test_prompt_embeddings_count_where_there_are_no_ids() -> None:
    def embedded(value: float) -> bytes:
        made = Request("r", None, SamplingParams(max_tokens=1), None, prompt_embeds=torch.full((64, 4), value))
        return extras(made)

    assert embedded(1.0) != embedded(2.0)
    assert embedded(1.0) == embedded(1.0)


def test_a_lora_adapter_is_known_by_its_files_and_not_by_its_path(tmp_path: Any) -> None:
    for name, content in (("one", b"a"), ("copy", b"a"), ("other", b"b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(content)
        (tmp_path / name / "adapter_config.json").write_text("{}")

    def adapted(path: str) -> bytes:
        return extras(request(lora_request=LoRARequest("mine", 1, str(tmp_path / path))))

    assert adapted("one") == adapted("copy")
    assert adapted("one") != adapted("other")
    assert adapted("one") != extras(request())


def test_a_lora_adapter_without_files_and_a_streaming_session_go_uncached(tmp_path: Any) -> None:
    with pytest.raises(Unavailable):
        extras(request(lora_request=LoRARequest("mine", 1, str(tmp_path / "absent"))))
    with pytest.raises(Unavailable):
        extras(request(resumable=True))
