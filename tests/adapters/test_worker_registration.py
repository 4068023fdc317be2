"""A worker's layout counts once the worker can move KV by it, and both sides say so when nothing will fit."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache_trio.adapters import WorkerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv, wait_until

TOKENS = list(range(3 * CHUNK))
FROM = list(range(12))

KV = dict[str, torch.Tensor]
MakeSide = Callable[..., Side]


def shared(seed: int | None = None) -> KV:
    made = make_kv(seed)
    for name, tensor in made.items():
        made[name] = shared_tensor(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return made


class OnDevice(WorkerAdapter):
    """The server moves its KV, or nobody does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, path="device")


def test_a_worker_whose_memory_the_server_cannot_open_is_offered_nothing(
    live_server: ServerProcess, sides: MakeSide, caplog: pytest.LogCaptureFixture
) -> None:
    """It asked for the path "device" alone: each of its loads would fail."""
    sides(live_server.address, make_kv(1)).store("r", TOKENS, FROM)
    one = sides(live_server.address, make_kv(), worker=OnDevice)
    assert "the path 'device' was asked for, but layer 'layer 0' lies in private cpu memory" in caplog.text
    assert [one.lookup(f"q{i}", TOKENS) for i in range(3)] == [0, 0, 0]
    assert not one.scheduler.is_healthy()
    one.worker.register_kv_caches(shared())
    assert one.worker.path == "device"
    wait_until(one.scheduler.is_healthy)
    assert one.lookup("after", TOKENS) == 3 * CHUNK
    assert one.load("after", 3 * CHUNK, FROM) == set()
    one.worker.register_kv_caches(make_kv())
    wait_until(lambda: not one.scheduler.is_healthy())
    assert one.lookup("private again", TOKENS) == 0


def test_a_server_without_a_device_offers_nothing_to_a_worker_that_needs_one(tmp_path: Path, sides: MakeSide) -> None:
    server = ServerProcess(f"unix://{tmp_path}/s.sock", "device.backend=none")
    server.start()
    try:
        sides(server.address, make_kv(1)).store("r", TOKENS, FROM)
        one = sides(server.address, shared(), worker=OnDevice)
        assert "no device" in one.worker.path_reason
        assert one.lookup("q", TOKENS) == 0
        assert one.worker.statistics() == {"running": 0}
    finally:
        server.kill()


@pytest.mark.parametrize("kv", [make_kv, shared], ids=["shm", "device"])
def test_a_chunk_that_is_larger_than_the_arena_is_told_once_on_both_sides(
    tmp_path: Path, sides: MakeSide, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], kv: Any
) -> None:
    server = ServerProcess(f"unix://{tmp_path}/s.sock", "chunk_tokens=16384")
    server.start()
    try:
        one = sides(server.address, kv(1))
        takes = "a chunk of 16384 tokens takes 6 MiB"
        said = [record for record in caplog.records if takes in record.getMessage()]
        assert [record.levelno for record in said] == [logging.WARNING]
        assert "raise the server's memory.size" in said[0].getMessage()
        one.worker.register_kv_caches(one.kv)
        assert sum(takes in record.getMessage() for record in caplog.records) == 1
        assert server.statistics()["counted"]["layouts_too_large"] == 1
    finally:
        server.end()
    logged = capfd.readouterr().err
    assert logged.count(takes) == 1
    assert "WARNING" in next(line for line in logged.splitlines() if takes in line)


def test_a_chunk_that_just_fits_is_not_warned_of(
    live_server: ServerProcess, sides: MakeSide, caplog: pytest.LogCaptureFixture
) -> None:
    sides(live_server.address, make_kv(1)).store("r", TOKENS, FROM)
    assert "nothing can be cached" not in caplog.text
    assert live_server.statistics()["counted"]["layouts_too_large"] == 0
