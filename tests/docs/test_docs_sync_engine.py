"""docs/howto/sync_engine.py does what its page says, against a real server."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.programs import load_program

from lmcache_trio.testing.sides import ServerProcess

BLOCKS, TOKENS = 16, list(range(200))


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load_program("howto/sync_engine.py")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    server = ServerProcess(f"unix://{tmp_path}/server.sock")  # chunks of 64 tokens
    server.start()
    yield server.address
    server.end()


class Model:
    """Writes each token's id as its KV, and counts what it computed."""

    def __init__(self) -> None:
        self.kv = {f"layer {i}": torch.zeros(2, BLOCKS, 16, 2, 8) for i in range(2)}
        self.computed = 0

    def compute(self, tokens: Sequence[int], first: int, blocks: Sequence[int]) -> None:
        for position in range(first, len(tokens)):
            block, offset = blocks[position // 16], position % 16
            for layer in self.kv.values():
                layer[:, block, offset] = float(tokens[position])
        self.computed += len(tokens) - first

    def holds(self, tokens: Sequence[int], blocks: Sequence[int]) -> bool:
        return all(
            bool((layer[:, blocks[position // 16], position % 16] == float(token)).all())
            for layer in self.kv.values()
            for position, token in enumerate(tokens)
        )


def test_the_engine_of_the_page_serves_a_prompt_of_another_engine_from_the_cache(
    program: ModuleType, address: str
) -> None:
    reused = []
    for number in range(2):
        model, blocks = Model(), list(range(number, number + 13))  # other blocks in the second engine
        engine = program.CachedEngine(address, f"engine {number}", model.kv, model.compute)
        reused.append(engine.serve("a request", TOKENS, blocks))
        engine.close()
        assert model.holds(TOKENS, blocks)
        assert model.computed == len(TOKENS) - reused[-1]
    assert reused == [0, 192]


def test_the_engine_of_the_page_works_without_a_server(program: ModuleType, tmp_path: Path) -> None:
    model, blocks = Model(), list(range(13))
    engine = program.CachedEngine(f"unix://{tmp_path}/nobody.sock", "alone", model.kv, model.compute)
    assert engine.serve("a request", TOKENS, blocks) == 0
    engine.close()
    assert model.holds(TOKENS, blocks)
