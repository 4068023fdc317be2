"""What a router hears: vLLM's own KV events with the connector's among them, over vLLM's own publisher."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq
from support.e2e import rows
from support.e2e.bench import KV_EVENTS, Bench
from support.e2e.expected import Expected

with warnings.catch_warnings():  # vLLM's and torch's own, while they are imported
    warnings.simplefilter("ignore")
    from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

pytestmark = pytest.mark.e2e

PUBLISHED_SECONDS = 120.0
"""Within which what an engine does is published. One on a quiet machine takes a step."""


class Router:
    """The events of an engine, in order."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self.heard: list[Any] = []

    def listen_until(self, true: Callable[[], object], step: Callable[[], object]) -> None:
        """Have the engine take steps, in which it publishes, until *true*."""
        end = time.monotonic() + PUBLISHED_SECONDS
        while not true():
            assert time.monotonic() < end, f"heard {self.heard}"
            step()
            while self._socket.poll(200):
                self.heard += self._decoder.decode(self._socket.recv_multipart()[-1]).events

    def stored(self, medium: str) -> list[Any]:
        return [each for each in self.heard if isinstance(each, BlockStored) and each.medium == medium]

    def hashes(self, kind: type[Any], medium: str) -> list[Any]:
        """Of the blocks that events of *kind* name."""
        found = [each for each in self.heard if isinstance(each, kind) and each.medium == medium]
        return [block for each in found for block in each.block_hashes]


@contextmanager
def router() -> Iterator[Router]:
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(KV_EVENTS)
        yield Router(socket)


def test_a_router_hears_which_of_vllms_blocks_the_server_has(bench: Bench, tiny: Expected) -> None:
    prompt, other = tiny["long 0"], tiny["long 1"]
    with router() as heard:
        engine = bench.engine("kv events", fresh=True)

        def step() -> None:
            engine.generate([other.tokens[:200]], tokens=1)  # less than a chunk

        heard.listen_until(lambda: heard.stored("GPU"), step)
        rows.check(engine, prompt, cached=0)
        tokens = rows.stored(prompt)
        heard.listen_until(lambda: sum(len(each.token_ids) for each in heard.stored("CPU")) >= tokens, step)
        events, parent = heard.stored("CPU"), None
        assert [token for each in events for token in each.token_ids] == prompt.tokens[:tokens]
        for each in events:
            assert each.parent_block_hash == parent
            assert len(each.block_hashes) * each.block_size == len(each.token_ids)
            assert (each.group_idx, each.kv_cache_spec_kind) == (0, "full_attention")
            parent = each.block_hashes[-1]
        blocks = heard.hashes(BlockStored, "CPU")
        assert set(blocks) < set(heard.hashes(BlockStored, "GPU")), "they are not vLLM's own hashes"
        engine.forget()
        assert not heard.hashes(BlockRemoved, "CPU")
        rows.check(engine, prompt, cached=tokens)
        engine.forget(connector=True)
        heard.listen_until(lambda: len(heard.hashes(BlockRemoved, "CPU")) >= len(blocks), step)
        assert heard.hashes(BlockRemoved, "CPU") == blocks == heard.hashes(BlockStored, "CPU")
        assert any(isinstance(each, AllBlocksCleared) for each in heard.heard)  # vLLM's own


@pytest.mark.parametrize("cached", [False, True])
def test_a_router_hears_what_the_disk_has(bench: Bench, tiny: Expected, cached: bool) -> None:
    """*cached*: once more after engine and server were restarted, when a lookup finds it there."""
    prompt, other, server = tiny["long 0"], tiny["long 1"], bench.servers["disk"]
    tokens = rows.stored(prompt)
    bench.stop_engine()
    with router() as heard:
        engine = bench.engine("kv events, disk", fresh=True)

        def step() -> None:
            engine.generate([other.tokens[len(heard.heard) : len(heard.heard) + 200]], tokens=1)  # less than a chunk

        heard.listen_until(lambda: heard.stored("GPU"), step)
        rows.check(engine, prompt, cached=tokens if cached else 0)
        heard.listen_until(lambda: sum(len(each.token_ids) for each in heard.stored("STORAGE")) >= tokens, step)
        after = {each.parent_block_hash: each for each in heard.stored("STORAGE")}
        chain, parent = list[Any](), None
        while parent in after:
            chain.append(after[parent])
            parent = chain[-1].block_hashes[-1]
        assert [token for each in chain for token in each.token_ids] == prompt.tokens[:tokens]
        blocks = sorted(heard.hashes(BlockStored, "STORAGE"))
        assert blocks == sorted(heard.hashes(BlockStored, "CPU"))
        if cached:
            engine.forget(connector=True)
            heard.listen_until(lambda: len(heard.hashes(BlockRemoved, "STORAGE")) >= len(blocks), step)
            assert sorted(heard.hashes(BlockRemoved, "STORAGE")) == blocks
        else:
            bench.stop_engine()
            server.stop()  # by SIGTERM: what is queued for the disk is written within the grace
