"""Latent KV (MLA), which all tensor-parallel ranks hold alike: the server keeps it once, and every rank loads it.

A cold prefill of latent KV takes another path through vLLM's CPU kernels than one behind a hit, and gives other ids. So
a hit through us is compared with a hit of the same length in vLLM's own prefix cache. vLLM's CPU platform switches that
cache off for latent KV; for the engines without a connector it is switched on again (`Kind.environment`).

One rank and two use a server each: their latent KV is the same, and one would get the other's.
"""

from collections.abc import Callable

import pytest
from support.e2e import rows
from support.e2e.bench import CHUNK, KINDS, Bench
from support.e2e.expected import Expected

pytestmark = pytest.mark.e2e

TOKEN_BYTES = 4 * (512 + 64) * 4
"""Of one rank: of each of 4 layers the latent values and the rotary ones, in float32."""


@pytest.mark.parametrize("ranks", ["dsv2, two ranks", "dsv2"])
def test_a_hit_of_latent_kv_says_what_one_in_vllms_own_cache_says(
    ranks: str, bench: Bench, latent: Callable[[str], Expected]
) -> None:
    cold, hit = latent(ranks)["cold"], latent(ranks)["hit"]
    server, engine = bench.servers[KINDS[ranks].server], bench.engine(ranks)
    before = server.status()["held"]
    rows.check(engine, cold, cached=0)
    engine.forget()
    rows.check(engine, hit, cached=rows.stored(hit))
    held, chunks = server.status()["held"], rows.stored(hit) // CHUNK
    more = {name: held[name] - before[name] for name in ("chunks_ready", "slots_ready", "bytes_ready")}
    assert more == {"chunks_ready": chunks, "slots_ready": chunks, "bytes_ready": chunks * CHUNK * TOKEN_BYTES}
    rows.check(bench.engine(ranks, fresh=True), hit, cached=rows.stored(hit))


def test_latent_kv_of_two_ranks_comes_from_disk_after_a_restart(
    bench: Bench, latent: Callable[[str], Expected]
) -> None:
    cold, hit = latent("dsv2, two ranks")["cold"], latent("dsv2, two ranks")["hit"]
    rows.put_on_disk(bench, "dsv2, two ranks, disk", cold)
    bench.servers["disk"].start()
    rows.check(bench.engine("dsv2, two ranks, disk", fresh=True), hit, cached=rows.stored(hit))
    (tier,) = bench.servers["disk"].status()["tiers"]
    assert tier["loads"] == rows.stored(hit) // CHUNK
    assert tier["backend"]["corrupt"] == 0
    bench.stop_engine()
