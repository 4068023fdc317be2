"""What the connector counts for vLLM's metrics, without vLLM. `tests/e2e` sees the same in vLLM's own."""

from lmcache_trio.adapters.vllm.figures import Found, LookupTimes, WorkerFigures, added


class Moves:
    """As much of a worker's adapter as is counted."""

    def __init__(self) -> None:
        self.bytes_stored = self.bytes_loaded = 0
        self.counted: dict[str, int] = {}

    def statistics(self) -> dict[str, int]:
        return {"running": 3, **self.counted}


def test_a_lookup_counts_once_from_its_first_question_to_its_first_answer() -> None:
    now = [1.0]
    times = LookupTimes(lambda: now[0])
    times.ask("a")
    times.ask("ends unanswered")
    now[0] = 3.5
    times.answer("a")
    now[0] = 9.0
    times.answer("a")
    times.forget("ends unanswered")
    times.answer("ends unanswered")
    assert times.take() == {"lookup_seconds": [2.5]}
    assert times.take() == {}


def test_a_worker_tells_what_it_moved_since_it_was_asked_last() -> None:
    moves = Moves()
    figures = WorkerFigures(moves)
    assert figures.take() == {}
    moves.counted, moves.bytes_stored = {"stored_chunks": 2, "dropped_present": 1}, 2048
    assert figures.take() == {"stored_chunks": 2, "dropped_present": 1, "stored_bytes": 2048}
    assert figures.take() == {}
    moves.counted, moves.bytes_loaded = {"stored_chunks": 3, "dropped_present": 1, "retrieved_chunks": 4}, 4096
    assert figures.take() == {"stored_chunks": 1, "retrieved_chunks": 4, "retrieved_bytes": 4096}


def test_figures_of_several_processes_add_up() -> None:
    one: Found = {"stored_chunks": 2, "lookup_seconds": [0.5]}
    other: Found = {"stored_chunks": 3, "dropped_share": 1}
    assert added(one, other) == {"stored_chunks": 5, "lookup_seconds": [0.5], "dropped_share": 1}
    assert added(one, one) == {"stored_chunks": 4, "lookup_seconds": [0.5, 0.5]}
    assert added({}, other) == other
    assert one == {"stored_chunks": 2, "lookup_seconds": [0.5]}, "what was added has changed"
