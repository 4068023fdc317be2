"""The testing engine by itself, with no cache: what the tests that compare its ids rely on."""

from collections.abc import Iterator

import attrs
import pytest
import torch

from lmcache_trio.demo.engine import EngineConfig, SmallEngine
from lmcache_trio.demo.model import Model, ModelConfig
from lmcache_trio.demo.model_kv import BlockPool, KVLayout, ModelKV, ModelKVShape
from lmcache_trio.errors import Misuse

SMALL = ModelConfig(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocabulary=512)
CONFIG = EngineConfig(model=SMALL, num_blocks=64, block_tokens=16, prefill_tokens=64)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """torch's threads spin while they wait for each other: on a busy machine two are ten times slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, SMALL.vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(config: EngineConfig, tokens: list[int], count: int = 12) -> tuple[int, ...]:
    engine = SmallEngine(config)
    engine.submit("r", tokens, count)
    return engine.run()["r"].output_ids


def test_two_engines_of_one_seed_give_the_same_ids() -> None:
    assert generate(CONFIG, prompt(300)) == generate(CONFIG, prompt(300))


def test_the_ids_do_not_collapse_to_one() -> None:
    assert len(set(generate(CONFIG, prompt(300)))) > 6


@pytest.mark.parametrize("pieces", [16, 48, 1024])
def test_the_ids_do_not_depend_on_how_prefill_is_cut(pieces: int) -> None:
    assert generate(EngineConfig(model=SMALL, num_blocks=64, prefill_tokens=pieces), prompt(300)) == generate(
        CONFIG, prompt(300)
    )


@pytest.mark.parametrize("layout", KVLayout)
@pytest.mark.parametrize("block_tokens", [4, 16, 32])
def test_the_ids_do_not_depend_on_the_layout_or_the_block_size(layout: KVLayout, block_tokens: int) -> None:
    config = EngineConfig(model=SMALL, num_blocks=128, block_tokens=block_tokens, prefill_tokens=64, layout=layout)
    assert generate(config, prompt(300)) == generate(CONFIG, prompt(300))


@pytest.mark.parametrize("window", [2, 16, 40])
def test_the_ids_with_a_window_do_not_depend_on_how_prefill_is_cut_and_are_others(window: int) -> None:
    config = attrs.evolve(CONFIG, model=attrs.evolve(SMALL, window=window))
    made = generate(config, prompt(300))
    assert made == generate(attrs.evolve(config, prefill_tokens=48), prompt(300))
    assert made != generate(CONFIG, prompt(300))
    assert generate(attrs.evolve(CONFIG, model=attrs.evolve(SMALL, window=1000)), prompt(300)) == generate(
        CONFIG, prompt(300)
    )


def test_paged_attention_gives_the_ids_of_a_contiguous_forward_pass() -> None:
    tokens = prompt(200)
    model = Model(SMALL)
    expected: list[int] = []
    for _ in range(6):  # one pass over everything each time: no cache, one block as long as the request
        kv = ModelKV(SMALL.kv_shape(num_blocks=1, block_tokens=256))
        logits = model.forward(torch.tensor(tokens + expected), 0, kv, torch.tensor([0]))
        expected.append(int(logits.argmax()))
    assert generate(CONFIG, tokens, 6) == tuple(expected)


def test_bfloat16_runs_and_repeats_itself() -> None:
    config = EngineConfig(model=ModelConfig(layers=2, dtype="bfloat16"), num_blocks=64)
    assert generate(config, prompt(300)) == generate(config, prompt(300))


@pytest.mark.parametrize("position", [0, 100, 199])
def test_wrong_kv_of_any_block_changes_the_logits(position: int) -> None:
    tokens = torch.tensor(prompt(200))
    model = Model(SMALL)
    kv = ModelKV(SMALL.kv_shape(num_blocks=16, block_tokens=16))
    table = torch.arange(16)
    model.forward(tokens, 0, kv, table)
    right = model.forward(tokens[-1:], 200, kv, table)
    block = position // 16
    for layer in kv.layers.values():
        layer[0, block] = layer[0, block].roll(
            1, dims=0
        )  # keys only: moving K and V together is no change to attention
    wrong = model.forward(tokens[-1:], 200, kv, table)
    assert (right - wrong).abs().max() > 1e-3


def test_requests_that_run_together_get_the_ids_they_get_alone() -> None:
    engine = SmallEngine(CONFIG)
    for i in range(4):
        engine.submit(f"r{i}", prompt(100 + 50 * i, seed=i), 8)
    together = engine.run()
    for i in range(4):
        assert together[f"r{i}"].output_ids == generate(CONFIG, prompt(100 + 50 * i, seed=i), 8)


def test_a_request_waits_until_blocks_are_free_and_all_come_back() -> None:
    engine = SmallEngine(EngineConfig(model=SMALL, num_blocks=8, block_tokens=16, prefill_tokens=64))
    for i in range(5):
        engine.submit(f"r{i}", prompt(100, seed=i), 8)
    assert len(engine.run()) == 5
    assert engine.pool.free_blocks == 8


def test_an_aborted_request_gives_its_blocks_back() -> None:
    engine = SmallEngine(CONFIG)
    engine.submit("r", prompt(300), 8)
    engine.step()
    assert engine.pool.free_blocks < CONFIG.num_blocks
    engine.abort("r")
    assert engine.pool.free_blocks == CONFIG.num_blocks
    assert engine.run() == {}


def test_a_request_that_can_never_fit_is_refused_by_name() -> None:
    with pytest.raises(Misuse, match="num_blocks=64"):
        SmallEngine(CONFIG).submit("r", prompt(1020), 8)


def test_an_id_in_use_is_refused_by_name() -> None:
    engine = SmallEngine(CONFIG)
    engine.submit("r", prompt(10), 1)
    with pytest.raises(Misuse, match="request_id 'r'"):
        engine.submit("r", prompt(10), 1)


def test_a_block_is_handed_out_once_and_taken_back_once() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert blocks is not None
    assert pool.allocate(2) is None
    assert pool.free_blocks == 1
    pool.free(blocks[:1])
    with pytest.raises(Misuse):
        pool.free(blocks)  # the first is free already, so none is taken
    assert pool.free_blocks == 2
    with pytest.raises(Misuse):
        pool.free([blocks[1], blocks[1]])


@pytest.mark.parametrize("layout", KVLayout)
def test_all_layers_are_views_of_one_storage_in_the_layout_asked_for(layout: KVLayout) -> None:
    shape = ModelKVShape(layers=3, num_blocks=5, block_tokens=4, kv_heads=2, head_dim=8)
    storage = torch.zeros(shape.numel + 7)
    kv = ModelKV(shape, layout=layout, storage=storage)
    expected = (2, 5, 4, 2, 8) if layout is KVLayout.KV_FIRST else (5, 2, 4, 2, 8)
    assert [tuple(t.shape) for t in kv.layers.values()] == [expected] * 3
    for tensor in kv.layers.values():
        tensor += 1
    assert int(storage.sum()) == shape.numel


@pytest.mark.parametrize("layout", KVLayout)
def test_what_is_written_through_a_table_is_read_back_through_it(layout: KVLayout) -> None:
    kv = ModelKV(ModelKVShape(layers=1, num_blocks=6, block_tokens=4, kv_heads=2, head_dim=8), layout=layout)
    table = torch.tensor([5, 0, 3])
    keys, values = torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    kv.write(0, table, 0, keys[:7], values[:7])
    kv.write(0, table, 7, keys[7:], values[7:])
    read_keys, read_values = kv.read(0, table, 10)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)
