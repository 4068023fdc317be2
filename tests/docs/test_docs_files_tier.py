"""The tier of docs/howto passes the suite that every tier passes."""

from pathlib import Path
from typing import Any

import pytest
import trio
from support.programs import DOCS, load_program

from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.faulty_tier import Fault, FaultyTier
from lmcache_trio.testing.tier_contract import MakeTier, TierContract, key_of, load_of, record_of


@pytest.fixture(scope="module")
def page() -> Any:
    """docs/howto/files_tier.py, which is in no package."""
    return load_program("howto/files_tier.py")


# --8<-- contract
class TestFilesTier(TierContract):
    @pytest.fixture
    def make_tier(self, page: Any, tmp_path: Path) -> MakeTier:
        return lambda size: page.FilesTier(page.FilesConfig(path=str(tmp_path / "kv"), size=size))


# --8<-- end


# --8<-- break
async def test_a_medium_that_fails_is_unavailable_and_the_next_call_works(page: Any, tmp_path: Path) -> None:
    mine = page.FilesTier(page.FilesConfig(path=str(tmp_path / "kv"), size=1 << 20))
    tier = FaultyTier.around(mine, [Fault("error", on="load", at=(1,)), Fault("hang_thread", on="load", at=(3,))])
    async with tier.open():
        await tier.store([record_of(key_of(1))])
        with pytest.raises(Unavailable):
            await tier.load([load_of(key_of(1))])
        assert list(await tier.load([load_of(key_of(1))])) == [True]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.load, [load_of(key_of(1))])
            await tier.wait_hanging(1)
            assert list(await tier.contains([key_of(1)])) == [True]  # the others go on
            tier.release()


# --8<-- end of break


def test_all_of_it_is_under_60_lines() -> None:
    assert len((DOCS / "howto" / "files_tier.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("offset", [0, 20, -1])
async def test_a_flipped_bit_is_a_miss(page: Any, tmp_path: Path, offset: int) -> None:
    tier = page.FilesTier(page.FilesConfig(path=str(tmp_path), size=1 << 20))
    async with tier.open():
        assert list(await tier.store([record_of(key_of(1))])) == [True]
        (file,) = tmp_path.glob("*/*")
        raw = bytearray(file.read_bytes())
        raw[offset] ^= 1
        file.write_bytes(raw)
        assert list(await tier.load([load_of(key_of(1))])) == [False]
