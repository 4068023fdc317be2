"""A fake of the driver in the place of `cuda-bindings`."""

import sys
from types import ModuleType
from typing import Any

import pytest
from support.cuda_fake import FakeDriver


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    package: Any = ModuleType("cuda.bindings")
    package.driver = made
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    return made
