"""What every test shares: a Hypothesis that is as steady in CI as anywhere."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("support")

settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("few", settings.get_profile("project"), max_examples=20)
settings.load_profile("project")

# A shell that starts the tests in the background has them ignore SIGINT, and nohup SIGHUP, and every process that they
# start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _patient_openings() -> Iterator[None]:
    """What a test stores is not dropped because a busy machine took more than 0.1 s to open its session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmcache_trio.adapters.scheduler.lookup_table._OPENING", 10.0)
        yield
