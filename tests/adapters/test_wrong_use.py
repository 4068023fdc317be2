"""An adapter in a forked child, and arguments that are none."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lmcache_trio.adapters import SchedulerAdapter, WorkerAdapter
from lmcache_trio.adapters.worker.cuda_kv import make_paged_kv
from lmcache_trio.errors import Misuse
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv

MakeSide = Callable[..., Side]
TOKENS = list(range(2 * CHUNK))
AT = list(range(8))


def test_an_adapter_has_no_server_in_a_forked_child_and_says_so(live_server: ServerProcess, sides: MakeSide) -> None:
    one = sides(live_server.address, make_kv(1))
    one.store("r", TOKENS, AT)
    pid = os.fork()
    if not pid:
        status = 9
        try:
            found = one.lookup("q", TOKENS)
            status = one.scheduler.is_healthy() + 2 * one.worker.is_healthy() + 4 * bool(found)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert one.scheduler.is_healthy()
    assert one.worker.is_healthy()
    assert one.lookup("q", TOKENS) == 2 * CHUNK


@pytest.mark.parametrize("address", [None, 5, b"unix:///run/s"])
def test_an_address_that_is_no_str_is_refused(address: object) -> None:
    with pytest.raises(Misuse, match="address is"):
        SchedulerAdapter(address, engine_id="e", identity=["m"], block_tokens=16)  # type: ignore[arg-type]
    with pytest.raises(Misuse, match="address is"):
        WorkerAdapter(address, engine_id="e", block_tokens=16)  # type: ignore[arg-type]


@pytest.mark.parametrize("extra", [None, "an extra", [""], [None], [7], {"an": "extra"}])
def test_a_fingerprint_extra_that_is_none_is_refused_by_its_name(extra: object) -> None:
    with pytest.raises(Misuse, match=r"^fingerprint_extra is"):
        WorkerAdapter("unix:///nowhere", engine_id="e", block_tokens=16, fingerprint_extra=extra)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kv", "blocks", "why"),
    [
        ([torch.zeros(9, 16, 4)], 9, "kv_caches is a list"),
        ({"one": None}, 9, "layer 'one' is a NoneType"),
        ({"one": np.zeros((9, 16, 4))}, 9, "layer 'one' is a ndarray"),
        ({"one": torch.zeros(9, 16, 4)}, 9.0, "num_blocks is 9.0"),
        ({"one": torch.zeros(9, 16, 4)}, 0, "num_blocks is 0"),
    ],
)
def test_kv_caches_that_are_none_are_refused_by_their_name(kv: Any, blocks: Any, why: str) -> None:
    with pytest.raises(Misuse, match=why):
        make_paged_kv(kv, num_blocks=blocks)


def test_a_spec_that_is_none_is_refused(live_server: ServerProcess, sides: MakeSide) -> None:
    """As `update_after_alloc` gives where nothing is to be loaded."""
    one = sides(live_server.address, make_kv())
    nothing: Any = one.scheduler.update_after_alloc("r", 0)
    for use, kind in ((one.worker.retrieve_now, "LoadSpec"), (one.worker.store_now, "StoreSpec")):
        with pytest.raises(Misuse, match=f"None is not a {kind}"):
            use([nothing])
