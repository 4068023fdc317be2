"""Whose turn it is: a client that asks little waits neither for those that ask much nor for those that leave."""

from typing import Any

import pytest
import trio
from support.server import Rig, digests

from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import Ping, Pong, Statistics


class HandClock(trio.abc.Clock):
    """Time passes when the test says so: by *step* with each look at it, and where something takes its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        self.now += self.step
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return deadline - self.now


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


async def test_a_ping_does_not_wait_for_clients_that_ask_statistics_without_end(rig: Rig, clock: HandClock) -> None:
    _let_statistics_take(0.001, rig, clock)
    flooding, healthy = [await rig.observer() for _ in range(30)], await rig.observer()
    for number in range(1, 101):
        for client in flooding:
            client.connection.send_nowait(encode(Statistics(number)))
    await healthy.get(Pong, Ping)
    first = _replies(flooding)
    await healthy.get(Pong, Ping)
    assert first <= len(flooding) + 8  # the first turn of each
    assert _replies(flooding) <= 8  # one in a pass of the loop, and a ping takes a few
    for client in flooding:
        await client.reply(100)


async def test_a_client_that_is_alone_in_the_lane_does_not_wait(rig: Rig, clock: HandClock) -> None:
    _let_statistics_take(0.001, rig, clock)
    busy = await rig.observer()
    for number in range(1, 101):
        busy.connection.send_nowait(encode(Statistics(number)))
    await busy.reply(100)


async def test_clients_that_leave_at_once_do_so_one_after_the_other(rig: Rig, clock: HandClock) -> None:
    leaving, healthy = [await rig.observer() for _ in range(200)], await rig.observer()
    for client in leaving:
        client.connection.close()
    await healthy.get(Pong, Ping)
    assert rig.held("connections")["connections"] > 150
    await rig.until(connections=1)


async def test_the_sessions_of_a_lost_scheduler_end_in_pieces(rig: Rig, clock: HandClock) -> None:
    (scheduler, worker), healthy = await rig.engine(), await rig.observer()
    await rig.stored(scheduler, worker, 0, digests(2))
    for session in range(1, 101):
        assert (await scheduler.lookup(session, digests(2))).chunks == 2
    clock.step = 0.0006
    scheduler.connection.close()
    await healthy.get(Pong, Ping)
    assert rig.held("leases")["leases"] > 50
    await rig.until(sessions=0, leases=0, connections=2)


async def test_a_scheduler_is_replaced_while_its_sessions_are_still_let_go_of(rig: Rig, clock: HandClock) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 0, digests(2))
    for session in range(1, 101):
        await scheduler.lookup(session, digests(2))
    clock.step = 0.0006
    scheduler.connection.close()
    scheduler = await rig.scheduler(token=scheduler.token)
    assert (await scheduler.lookup(1, digests(2))).chunks == 2
    await scheduler.get(Pong, Ping)
    assert rig.held("sessions", "leases") == {"sessions": 1, "leases": 1}


def _let_statistics_take(seconds: float, rig: Rig, clock: HandClock) -> None:
    statistics = rig.memory.statistics

    def slow() -> dict[str, int | str]:
        clock.now += seconds
        found: dict[str, int | str] = statistics()
        return found

    rig.memory.statistics = slow


def _replies(clients: list[Any]) -> int:
    """How many replies came that were not counted yet."""
    count = 0
    for client in clients:
        try:
            while True:
                client.pushes.append(client.connection.receive_nowait())
                count += 1
        except trio.WouldBlock:
            continue
    return count
