"""One request id, and then another prompt under it: nothing of the former is offered, named or kept for the new one."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lmcache_trio._core.keys import chain_digests
from lmcache_trio.adapters import PollingSchedulerAdapter, SchedulerAdapter, StoreSpec
from lmcache_trio.adapters.scheduler import prompts
from lmcache_trio.adapters.scheduler.lookup_machine import LookupStage
from lmcache_trio.errors import Misuse
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, same_blocks, wait_until
from lmcache_trio.threads import Lock

MakeSide = Callable[..., Side]
A = list(range(4 * CHUNK))
B = [90_000 + token for token in A]
BLOCKS = list(range(16))
OTHER_BLOCKS = list(range(16, 32))


@pytest.fixture
def one(live_server: ServerProcess, sides: MakeSide) -> Side:
    return sides(live_server.address, make_kv(1))


@pytest.fixture
def stored(one: Side) -> Side:
    """An engine whose server has A's chunks."""
    one.store("stored", A, BLOCKS)
    one.scheduler.end_session("stored")
    return one


def digests_of(side: Side, tokens: Sequence[int]) -> bytes:
    fresh = b"".join(side.scheduler.extend("a request of its own", tokens))
    side.scheduler.end_session("a request of its own")
    return fresh


def spec_of(side: Side, request: str, tokens: Sequence[int], blocks: list[int]) -> StoreSpec:
    side.scheduler.extend(request, tokens)
    return side.scheduler.store_spec(request, 0, blocks)


def held_sessions(server: ServerProcess) -> dict[str, object]:
    held = server.held
    return {key: held[key] for key in ("sessions", "leases", "pins", "reservations")}


def test_a_prompt_that_is_extended_and_stored_under_a_used_id_is_stored_under_its_own_names(
    live_server: ServerProcess, sides: MakeSide, one: Side
) -> None:
    first = spec_of(one, "r", A, BLOCKS)
    one.worker.store_now([first])
    second = spec_of(one, "r", B, OTHER_BLOCKS)
    one.worker.store_now([second])
    assert (first.digests, second.digests) == (digests_of(one, A), digests_of(one, B))
    assert first.session != second.session
    other = sides(live_server.address, make_kv())
    for prompt, blocks in ((A, BLOCKS), (B, OTHER_BLOCKS)):
        assert other.lookup(f"{prompt[0]}", prompt) == 4 * CHUNK
        assert other.load(f"{prompt[0]}", 4 * CHUNK, BLOCKS) == set()
        assert same_blocks(other.kv, BLOCKS, one.kv, blocks)


@pytest.mark.parametrize("adapter", [SchedulerAdapter, PollingSchedulerAdapter])
def test_a_prompt_that_was_not_found_is_not_found_for_another_that_is_looked_up_then(
    live_server: ServerProcess, sides: MakeSide, stored: Side, adapter: type[SchedulerAdapter]
) -> None:
    other = sides(live_server.address, make_kv(), scheduler=adapter)
    assert other.lookup("r", B) == 0
    assert other.lookup("r", A) == 4 * CHUNK
    assert other.scheduler.store_spec("r", 0, BLOCKS).digests == digests_of(other, A)


@pytest.mark.parametrize("adapter", [SchedulerAdapter, PollingSchedulerAdapter])
def test_an_answer_is_not_given_for_another_prompt(
    live_server: ServerProcess, sides: MakeSide, stored: Side, adapter: type[SchedulerAdapter]
) -> None:
    other = sides(live_server.address, make_kv(), scheduler=adapter)
    assert other.lookup("r", A) == 4 * CHUNK
    assert other.lookup("r", B) == 0
    spec = other.scheduler.update_after_alloc("r", CHUNK, block_ids=BLOCKS[:4])
    assert spec is not None
    assert spec.lease == b""
    wait_until(lambda: held_sessions(live_server) == {"sessions": 1, "leases": 0, "pins": 0, "reservations": 0})


def test_a_lookup_that_is_awaited_is_let_go_for_another_prompt(one: Side, live_server: ServerProcess) -> None:
    live_server.pause()
    one.scheduler.maybe_submit_lookup_request("r", A)
    first = one.scheduler._lookups.requests["r"]
    assert not first.lookup.may_ask(4)
    one.scheduler.maybe_submit_lookup_request("r", B)
    second = one.scheduler._lookups.requests["r"]
    assert second is not first
    assert second.lookup.state is LookupStage.PENDING
    assert first.lookup.state is LookupStage.IDLE
    live_server.go_on()
    wait_until(lambda: one.scheduler.check_lookup_result("r") == 0)
    wait_until(lambda: held_sessions(live_server)["sessions"] == 1)


def test_a_lease_that_a_load_took_is_given_back_for_another_prompt(stored: Side, live_server: ServerProcess) -> None:
    assert stored.lookup("r", A) == 4 * CHUNK
    assert stored.load("r", 4 * CHUNK, OTHER_BLOCKS) == set()
    assert live_server.held["leases"] == 1
    assert stored.lookup("r", B) == 0
    wait_until(lambda: live_server.held["leases"] == 0)


def test_a_list_that_was_changed_in_place_is_another_prompt(stored: Side) -> None:
    tokens = list(A)
    assert stored.lookup("r", tokens) == 4 * CHUNK
    tokens[CHUNK + 3] = 7
    assert stored.lookup("r", tokens) == CHUNK
    assert stored.scheduler.store_spec("r", 0, BLOCKS).digests == digests_of(stored, tokens)
    tokens[:] = B
    assert spec_of(stored, "r", tokens, BLOCKS).digests == digests_of(stored, B)


def test_an_array_that_is_used_again_with_other_content_is_another_prompt(stored: Side) -> None:
    tokens = np.array(A)
    assert stored.lookup("r", tokens) == 4 * CHUNK  # type: ignore[arg-type]
    session = stored.scheduler.session_spec("r")
    assert stored.lookup("r", tokens) == 4 * CHUNK  # type: ignore[arg-type]
    assert stored.scheduler.session_spec("r") == session
    tokens += 1
    assert stored.lookup("r", tokens) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.Tensor, list, tuple])
def test_a_tensor_that_is_used_again_with_other_content_is_another_prompt(stored: Side, kind: type) -> None:
    tokens = torch.tensor(A)
    given: Any = tokens if kind is torch.Tensor else kind(tokens)
    assert stored.lookup("r", given) == 4 * CHUNK
    session = stored.scheduler.session_spec("r")
    assert stored.lookup("r", given) == 4 * CHUNK
    assert stored.scheduler.session_spec("r") == session
    tokens.copy_(torch.tensor(B))  # what the items are views of
    assert stored.lookup("r", given) == 0
    assert b"".join(stored.scheduler.extend("r", given)) == digests_of(stored, B)


def test_token_ids_of_more_than_one_dimension_are_refused(stored: Side) -> None:
    with pytest.raises(Misuse, match="token_ids"):
        stored.scheduler.maybe_submit_lookup_request("r", torch.tensor([A]))  # type: ignore[arg-type]


def test_blocks_that_were_named_by_a_tensor_stay_named_when_it_is_used_again(
    live_server: ServerProcess, sides: MakeSide, one: Side
) -> None:
    blocks = torch.tensor(BLOCKS)
    one.scheduler.extend("r", A)
    spec = one.scheduler.store_spec("r", 0, blocks)  # type: ignore[arg-type]
    blocks += 16
    one.worker.store_now([spec])
    other = sides(live_server.address, make_kv())
    assert other.lookup("r", A) == 4 * CHUNK
    blocks.copy_(torch.tensor(OTHER_BLOCKS))
    load = other.scheduler.update_after_alloc("r", 4 * CHUNK, block_ids=blocks)  # type: ignore[arg-type]
    assert load is not None
    blocks.zero_()
    other.worker.retrieve_now([load])
    assert other.worker.take_failed_blocks() == set()
    assert same_blocks(other.kv, OTHER_BLOCKS, one.kv, BLOCKS)


def test_the_same_tokens_with_other_extras_are_another_prompt(stored: Side) -> None:
    scheduler = stored.scheduler
    assert stored.lookup("r", A) == 4 * CHUNK
    scheduler.maybe_submit_lookup_request("r", A, extras=lambda first, end: b"a LoRA" if first == CHUNK else b"")
    assert scheduler.check_lookup_result("r") == CHUNK
    session = scheduler.session_spec("r")
    scheduler.maybe_submit_lookup_request("r", A, extras=lambda first, end: b"a LoRA" if first == CHUNK else b"")
    assert scheduler.session_spec("r") == session  # another function that says the same
    scheduler.extend("r", A, extras=lambda first, end: b"another" if first == CHUNK else b"")
    assert scheduler.session_spec("r") != session
    session = scheduler.session_spec("r")
    assert scheduler.extend("r", A) != scheduler.extend("q", A, extras=lambda first, end: b"a LoRA")
    assert scheduler.session_spec("r") != session


def test_a_shorter_prompt_is_offered_what_it_has_and_no_more(stored: Side) -> None:
    assert stored.lookup("r", A) == 4 * CHUNK
    assert stored.lookup("r", A[: 2 * CHUNK]) == 2 * CHUNK
    stored.scheduler.mark_failed("r", 0)
    stored.scheduler.free_lookup_locks("r")
    assert stored.lookup("r", A[:CHUNK]) == CHUNK  # what could not be loaded for the former says nothing of this one


def test_no_more_tokens_are_offered_than_the_latest_question_wants(stored: Side, live_server: ServerProcess) -> None:
    scheduler = stored.scheduler
    assert stored.lookup("r", [*A, 1]) == 4 * CHUNK
    session = scheduler.session_spec("r")
    for most, offered in ((4 * CHUNK - 1, 3 * CHUNK), (CHUNK, CHUNK), (4 * CHUNK, CHUNK)):
        scheduler.maybe_submit_lookup_request("r", A, max_tokens=most)
        assert scheduler.check_lookup_result("r") == offered  # the last one is answered already
    assert scheduler.session_spec("r") == session
    live_server.pause()
    scheduler.cleanup_lookup_result("r")
    scheduler.maybe_submit_lookup_request("r", A)
    scheduler.maybe_submit_lookup_request("r", A, max_tokens=2 * CHUNK)
    live_server.go_on()
    assert scheduler.check_lookup_result("r") == 2 * CHUNK


def test_a_load_that_failed_for_one_prompt_does_not_count_against_another(stored: Side) -> None:
    assert stored.lookup("r", B) == 0
    stored.scheduler.mark_failed("r", 0)
    assert stored.lookup("r", A) == 4 * CHUNK


def test_a_prompt_that_only_grows_is_one_request_and_is_hashed_once(
    stored: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    chain = chain_digests

    def counted(parent: bytes, tokens: Sequence[int], *args: object) -> list[bytes]:
        hashed.append(len(tokens))
        return chain(parent, tokens, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(prompts, "chain_digests", counted)
    tokens = list(A)
    assert stored.lookup("r", tokens) == 4 * CHUNK
    session = stored.scheduler.session_spec("r")
    for token in range(2 * CHUNK):
        tokens.append(token)
        stored.scheduler.extend("r", tokens)
        stored.scheduler.extend("r", tokens[: len(tokens) - 2 * CHUNK])  # so far it is computed
        assert stored.lookup("r", tuple(tokens)) == 4 * CHUNK  # type: ignore[arg-type]
    assert stored.scheduler.session_spec("r") == session
    assert hashed == [4 * CHUNK, CHUNK, CHUNK]


@pytest.mark.parametrize(
    "identity",
    [[], (), "a model", b"a model", "", [""], ["a model", b""], ["a model", 7], [["a model"]], None, {"a model"}],
)
def test_an_identity_that_names_no_model_is_refused(identity: object) -> None:
    with pytest.raises(Misuse, match="identity"):
        SchedulerAdapter("unix:///nowhere", engine_id="e", identity=identity, block_tokens=16)  # type: ignore[arg-type]


def test_an_identity_that_reads_like_weights_is_another_model() -> None:
    plain = prompts.Prompts(["a model", "weights version", "1"], 16, 64, 0, Lock())
    renamed = prompts.Prompts(["a model"], 16, 64, 0, Lock())
    renamed.rename(("weights version", "1"), ("weights version", "1"))
    assert plain.seed != renamed.seed
    assert plain.model != renamed.model
