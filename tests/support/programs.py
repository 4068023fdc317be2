"""Programs of the documentation as modules: they are in no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["DOCS", "load_program"]

DOCS = Path(__file__).parents[2] / "docs"


def load_program(place: str) -> ModuleType:
    """The program at *place* in docs, anew each time."""
    path = DOCS / place
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # attrs looks a class's module up
    spec.loader.exec_module(module)
    return module
