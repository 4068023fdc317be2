"""A live server over tiers whose disks really fail."""

from functools import partial
from pathlib import Path

import pytest
from support.live import OpenLive, open_live


@pytest.fixture
def live(tmp_path: Path) -> OpenLive:
    """`async with live(tier, …) as server`: one after the other, each with an empty memory."""
    return partial(open_live, f"unix://{tmp_path}/live.ipc")
