"""One bench for all rows. Where vLLM is not installed nothing here is collected: `nox -s e2e` installs it."""

from collections.abc import Callable, Generator, Iterator
from functools import cache
from importlib.util import find_spec

import pytest

collect_ignore: list[str] = []
if find_spec("vllm") is None:
    collect_ignore += ["test_vllm_connector.py", "test_vllm_data_parallel.py", "test_vllm_table.py"]
    collect_ignore += [
        "test_vllm_events.py",
        "test_vllm_longest_hit.py",
        "test_vllm_times.py",
        "test_vllm_trust.py",
        "test_vllm_hybrid.py",
        "test_vllm_latent.py",
        "test_vllm_lengths.py",
        "test_vllm_replicas.py",
    ]
else:
    from support.e2e.bench import Bench
    from support.e2e.expected import Expected, ask_hybrid, ask_latent, ask_mid, ask_tiny, ask_two_ranks

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """What the engines and servers of a failed row said last comes with its failure."""
        report = yield
        made = getattr(item, "funcargs", {}).get("bench")
        if report.failed and isinstance(made, Bench):
            report.sections += [(f"the end of {name}", said) for name, said in made.logs()]
        return report

    @pytest.fixture(scope="session")
    def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
        made = Bench(tmp_path_factory.mktemp("e2e"))
        yield made
        made.close()

    @pytest.fixture(scope="session")
    def tiny(bench: Bench) -> Expected:
        return ask_tiny(bench.engine("no connector"))

    @pytest.fixture(scope="session")
    def two_ranks(bench: Bench) -> Expected:
        return ask_two_ranks(bench.engine("two ranks, no connector"))

    @pytest.fixture(scope="session")
    def hybrid(bench: Bench) -> Callable[[str], Expected]:
        @cache
        def ask(name: str) -> Expected:
            engine = bench.beside(f"{name}, no connector")
            # In bfloat16 sums differ more with the number of rows that are computed together.
            return ask_hybrid(engine, clear=0.05 if name == "qwen3next" else 0.005)

        return ask

    @pytest.fixture(scope="session")
    def latent(bench: Bench) -> Callable[[str], Expected]:
        @cache
        def ask(name: str) -> Expected:
            return ask_latent(bench.engine(f"{name}, own cache"))

        return ask

    @pytest.fixture(scope="session")
    def mid(bench: Bench) -> Expected:
        return ask_mid(bench.engine("mid, no connector"))
