"""The one door to threads: waits that may be given up, calls that may not, and the bounds of a host's waits."""

import subprocess
import sys
import threading  # noqa: TID251 - what is tested here
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.threads import DedicatedThread, Handoff, Lock, Portal, offload, offload_owned


async def until(event: threading.Event) -> None:
    with trio.fail_after(60):
        assert await trio.to_thread.run_sync(event.wait, 5)


async def idle(*, task_status: "trio.TaskStatus[str]") -> None:
    task_status.started("ready")
    await trio.sleep_forever()


@pytest.fixture
def portal() -> Iterator[Portal]:
    made = Portal("loop under test")
    yield made
    assert made.stop(5)


# --- offload ---------------------------------------------------------------------------------------------------------


async def test_an_offloaded_call_returns_or_raises_as_it_does() -> None:
    assert await offload(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await offload(divmod, 1, 0)


async def test_an_offloaded_call_is_never_left_while_it_runs() -> None:
    begun, release, ended = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        release.wait(60)
        ended.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(offload, work)
        await until(begun)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), trio.move_on_after(0.05):
            await trio.sleep_forever()
        assert not ended
        release.set()
    assert ended


async def test_the_wait_for_an_owned_call_may_be_left_and_its_buffers_come_back_when_it_returns() -> None:
    begun, release = threading.Event(), threading.Event()
    returned = trio.Event()
    limiter = trio.CapacityLimiter(1)

    def work() -> None:
        begun.set()
        release.wait(60)

    async with trio.open_nursery() as nursery:

        async def owner() -> None:
            await offload_owned(work, limiter=limiter, on_return=returned.set)

        nursery.start_soon(owner)
        await until(begun)
        nursery.cancel_scope.cancel()
    assert not returned.is_set()
    assert limiter.borrowed_tokens == 1, "a call that hangs must count"
    release.set()
    with trio.fail_after(60):
        await returned.wait()
    assert limiter.borrowed_tokens == 0


async def test_an_owned_call_that_ends_hands_back_once_before_its_owner_goes_on() -> None:
    returns: list[str] = []
    assert await offload_owned(lambda: 7, on_return=lambda: returns.append("value")) == 7
    with pytest.raises(ZeroDivisionError):
        await offload_owned(lambda: 1 // 0, on_return=lambda: returns.append("error"))
    assert returns == ["value", "error"]


async def test_an_owned_call_cancelled_before_it_began_hands_back_and_never_runs() -> None:
    ran: list[int] = []
    returns: list[int] = []
    limiter = trio.CapacityLimiter(1)
    async with limiter:
        with trio.move_on_after(0.05) as scope:
            await offload_owned(ran.append, 1, limiter=limiter, on_return=lambda: returns.append(1))
    assert scope.cancelled_caught
    assert (ran, returns, limiter.borrowed_tokens) == ([], [1], 0)


# --- a thread of one's own -------------------------------------------------------------------------------------------


async def test_a_dedicated_thread_works_in_order_in_one_named_daemon_thread() -> None:
    thread = DedicatedThread("copies")
    order: list[int] = []
    async with trio.open_nursery() as nursery:
        for i in range(20):
            nursery.start_soon(thread.run, order.append, i)
            await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
    assert order == list(range(20))
    current = await thread.run(threading.current_thread)
    assert (current.name, current.daemon) == ("copies", True)
    assert await thread.run(threading.current_thread) is current
    with pytest.raises(ZeroDivisionError):
        await thread.run(divmod, 1, 0)
    thread.close()
    thread.close()


async def test_a_call_that_waits_in_the_queue_can_be_withdrawn_and_one_that_runs_cannot() -> None:
    thread = DedicatedThread("copies")
    begun, release, ran = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        release.wait(60)
        ran.append("running")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(thread.run, work)
        await until(begun)
        with trio.move_on_after(0.05) as scope:
            await thread.run(ran.append, "queued")
        assert scope.cancelled_caught
        nursery.cancel_scope.cancel()
        release.set()
    assert ran == ["running"]
    await thread.run(ran.append, "later")
    assert ran == ["running", "later"]
    thread.close()


async def test_an_owned_call_in_a_dedicated_thread_hands_back_when_it_truly_ended() -> None:
    thread = DedicatedThread("copies")
    begun, release, returned = threading.Event(), threading.Event(), trio.Event()

    def work() -> None:
        begun.set()
        release.wait(60)

    async with trio.open_nursery() as nursery:

        async def owner() -> None:
            await thread.run_owned(work, on_return=returned.set)

        nursery.start_soon(owner)
        await until(begun)
        nursery.cancel_scope.cancel()
    assert not returned.is_set()
    release.set()
    with trio.fail_after(60):
        await returned.wait()
    thread.close()


async def test_a_closed_thread_finishes_its_queue_and_takes_no_more() -> None:
    thread = DedicatedThread("copies")
    done: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(thread.run, done.append, 1)
        await trio.testing.wait_all_tasks_blocked()
        thread.close()
    assert done == [1]
    returns: list[int] = []
    with pytest.raises(Unavailable, match="copies is closed"):
        await thread.run_owned(done.append, 2, on_return=lambda: returns.append(1))
    assert (done, returns) == ([1], [1])


# --- handing one value to a host ------------------------------------------------------------------------------------


def test_a_handoff_gives_its_one_value_to_everyone_as_often_as_they_ask() -> None:
    handoff: Handoff[int] = Handoff()
    assert handoff.wait(0) is None
    assert handoff.wait(0.01) is None
    assert not handoff.done
    seen: list[int | None] = []
    waiters = [threading.Thread(target=lambda: seen.append(handoff.wait(60))) for _ in range(5)]
    for waiter in waiters:
        waiter.start()
    assert handoff.set(7)
    assert not handoff.set(8)
    for waiter in waiters:
        waiter.join(5)
    assert seen == [7] * 5
    assert handoff.wait(0) == handoff.wait(float("inf")) == handoff.wait(-1) == 7


def test_a_lock_lets_one_thread_in_at_a_time() -> None:
    lock, inside, most = Lock(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(200):
            with lock:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert (inside, most) == (0, 1)


# --- a loop for a synchronous host -----------------------------------------------------------------------------------


def test_a_portal_returns_what_main_was_started_with_and_ends_on_stop(portal: Portal) -> None:
    assert not portal.alive
    assert portal.start(idle, timeout=60) == "ready"
    assert portal.alive
    assert portal.stop(5)
    assert not portal.alive
    assert portal.stop(5)
    assert not portal.post(print)
    with pytest.raises(Unavailable, match="has ended"):
        portal.call(trio.sleep, 0, timeout=60)


def test_an_error_of_main_before_it_is_ready_is_raised_by_start(portal: Portal) -> None:
    async def main(*, task_status: object) -> None:
        raise ValueError("no such server")

    with pytest.raises(ValueError, match="no such server"):
        portal.start(main, timeout=60)
    assert not portal.alive


def test_a_main_that_ends_before_it_is_ready_is_unavailable(portal: Portal) -> None:
    async def main(*, task_status: object) -> None:
        pass

    with pytest.raises(Unavailable, match="ended before it was ready"):
        portal.start(main, timeout=60)


def test_a_main_that_is_late_is_cancelled(portal: Portal) -> None:
    cancelled = threading.Event()

    async def main(*, task_status: object) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    with pytest.raises(Unavailable, match=r"not ready after 0\.05 s"):
        portal.start(main, timeout=0.05)
    assert cancelled.wait(60)


def test_a_portal_starts_once(portal: Portal) -> None:
    portal.start(idle, timeout=60)
    with pytest.raises(Misuse, match="started already"):
        portal.start(idle, timeout=60)


def test_posts_run_in_order_in_the_loop(portal: Portal) -> None:
    portal.start(idle, timeout=60)
    seen: list[int] = []
    for i in range(100):
        assert portal.post(seen.append, i)
    portal.call(trio.sleep, 0, timeout=60)
    assert seen == list(range(100))


def test_a_call_returns_or_raises_as_it_does(portal: Portal) -> None:
    portal.start(idle, timeout=60)

    async def divide(a: int, b: int) -> int:
        await trio.lowlevel.checkpoint()
        return a // b

    assert portal.call(divide, 7, 2, timeout=60) == 3
    with pytest.raises(ZeroDivisionError):
        portal.call(divide, 1, 0, timeout=60)
    assert portal.alive


def test_a_call_that_is_late_is_cancelled_and_the_loop_goes_on(portal: Portal) -> None:
    portal.start(idle, timeout=60)
    cancelled = threading.Event()

    async def late() -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    with pytest.raises(Unavailable, match=r"did not answer within 0\.05 s"):
        portal.call(late, timeout=0.05)
    assert cancelled.wait(60)
    assert portal.call(trio.sleep, 0, timeout=60) is None


def test_a_loop_that_ends_fails_the_calls_in_flight_at_once(portal: Portal) -> None:
    end = trio.Event()

    async def main(*, task_status: "trio.TaskStatus[None]") -> None:
        task_status.started()
        await end.wait()

    async def never() -> None:
        end.set()
        await trio.sleep_forever()

    portal.start(main, timeout=60)
    with pytest.raises(Unavailable, match="has ended"):
        portal.call(never, timeout=30)


def test_calls_from_many_host_threads_do_not_wait_for_each_other(portal: Portal) -> None:
    portal.start(idle, timeout=60)
    meeting: list[trio.Event] = []
    portal.call(_make_event, meeting, timeout=60)
    results: list[object] = []
    waiting = threading.Thread(target=lambda: results.append(portal.call(meeting[0].wait, timeout=60)))
    waiting.start()
    assert portal.call(trio.sleep, 0, timeout=60) is None
    portal.post(meeting[0].set)
    waiting.join(5)
    assert results == [None]


async def _make_event(into: list[trio.Event]) -> None:
    into.append(trio.Event())


def test_waiting_for_the_loop_in_the_loop_is_misuse(portal: Portal) -> None:
    portal.start(idle, timeout=60)

    async def inside() -> None:
        with pytest.raises(Misuse, match="wait for itself"):
            portal.call(trio.sleep, 0, timeout=1)
        with pytest.raises(Misuse, match="wait for itself"):
            portal.stop(1)

    portal.call(inside, timeout=60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_later_error_of_main_ends_the_portal_and_is_not_swallowed(
    portal: Portal, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[BaseException | None] = []
    told = threading.Event()

    def hook(args: threading.ExceptHookArgs) -> None:
        heard.append(args.exc_value)
        told.set()

    monkeypatch.setattr(threading, "excepthook", hook)

    async def main(*, task_status: "trio.TaskStatus[None]") -> None:
        task_status.started()
        raise ValueError("a bug")

    portal.start(main, timeout=60)
    assert told.wait(60)
    assert str(heard[0]) == "a bug"
    assert not portal.alive


FORGETFUL = """
import sys, trio
from lmcache_trio.threads import Portal
async def main(*, task_status):
    task_status.started()
    try:
        await trio.sleep_forever()
    finally:
        print("cleaned up", flush=True)
Portal("forgotten").start(main, timeout=60)
"""
HUNG = """
import threading, trio
from lmcache_trio.threads import DedicatedThread, Portal
thread = DedicatedThread("hung")
begun = threading.Event()
def hang():
    begun.set()
    threading.Event().wait()
async def main(*, task_status):
    task_status.started()
    await thread.run(hang)
Portal("hung").start(main, timeout=60)
assert begun.wait(60)
"""
INTERRUPTED = """
import os, signal, threading, trio
from lmcache_trio.threads import Portal
async def main(*, task_status):
    task_status.started()
    await trio.sleep_forever()
portal = Portal("loop")
portal.start(main, timeout=60)
async def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    await trio.sleep_forever()
for _ in range(3):
    try:
        portal.call(interrupt, timeout=60)
    except KeyboardInterrupt:
        pass
    else:
        raise SystemExit("not interrupted")
async def fine():
    return 7
assert portal.call(fine, timeout=60) == 7
assert portal.stop(10)
"""
FORKED = """
import os, trio
from lmcache_trio.errors import Unavailable
from lmcache_trio.threads import DedicatedThread, Portal
async def main(*, task_status):
    task_status.started()
    await trio.sleep_forever()
portal = Portal("loop")
portal.start(main, timeout=60)
async def fine():
    return 7
pid = os.fork()
if pid == 0:
    ok = not portal.alive and not portal.post(print) and portal.stop(1)
    try:
        portal.call(fine, timeout=1)
    except Unavailable:
        raise SystemExit(0 if ok else 3)
    raise SystemExit(4)
assert os.waitpid(pid, 0)[1] == 0
assert portal.alive and portal.call(fine, timeout=60) == 7
assert portal.stop(10)
"""


def output_of(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_host_that_forgot_to_stop_ends_and_its_loop_cleans_up() -> None:
    assert output_of(FORGETFUL) == "cleaned up\n"


def test_a_hung_call_does_not_keep_the_process_from_ending() -> None:
    output_of(HUNG)


def test_a_keyboard_interrupt_in_the_host_cancels_its_call_and_nothing_else() -> None:
    output_of(INTERRUPTED)


def test_a_forked_child_finds_an_inherited_portal_not_alive() -> None:
    output_of(FORKED)
