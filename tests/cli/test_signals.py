"""SIGINT and SIGTERM cancel a command's work; what it does on its way out is done whatever else comes."""

import os
import signal

import pytest
import trio
import trio.testing

from lmcache_trio.signals import run_until_signal


async def test_what_the_work_returns_is_returned_and_the_handlers_are_as_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    async def work() -> int:
        await trio.lowlevel.checkpoint()
        return 7

    assert await run_until_signal(work) == 7
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_cancels_the_work_and_its_repeats_do_not_disturb_what_it_does_on_its_way_out(
    number: signal.Signals,
) -> None:
    steps: list[str] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for repeat in (signal.SIGTERM, signal.SIGINT):
                    os.kill(os.getpid(), repeat)
                    await trio.testing.wait_all_tasks_blocked()
                steps.append("removed")

    with trio.fail_after(5), pytest.raises(SystemExit) as ended:
        await run_until_signal(work)
    assert ended.value.code == 128 + number
    assert steps == ["removed"]


async def test_a_sigint_that_was_ignored_stays_ignored() -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def work() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        await trio.testing.wait_all_tasks_blocked()
        return "done"

    try:
        assert await run_until_signal(work) == "done"
    finally:
        signal.signal(signal.SIGINT, former)


async def test_what_the_work_raises_is_raised_and_does_not_wait_for_a_signal() -> None:
    async def work() -> None:
        raise ValueError("the server ended")

    with trio.fail_after(5), pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="the server ended")):
        await run_until_signal(work)
