"""What a reset dropped comes back to the arena while the server goes on, without a reserve that wants it."""

import trio
import trio.testing
from support.server import Rig, digests

from lmcache_trio._server.clock import PIECE, Clock
from lmcache_trio._wire.messages import Ack, Reset


async def test_stale_chunks_go_back_to_the_arena_even_if_no_reserve_needs_room(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    empty = rig.held("bytes_free")
    await rig.stored(scheduler, worker, 1, digests(5))
    await scheduler.get(Ack, Reset)
    await rig.until(chunks_stale=0, **empty)


async def test_a_sweep_goes_piece_by_piece_and_lets_others_have_their_turns(
    autojump_clock: trio.testing.MockClock,
) -> None:
    turns: list[str] = []
    left = 3

    def sweep(limit: int) -> bool:
        nonlocal left
        assert limit == PIECE
        turns.append("sweep")
        left = max(0, left - 1)
        return left > 0

    clock = Clock(lambda now: now + 1000.0, sweep)

    async def other() -> None:
        for _ in range(3):
            turns.append("other")
            await trio.lowlevel.checkpoint()

    with trio.move_on_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clock.run, lambda: None)
            await trio.testing.wait_all_tasks_blocked()
            assert turns.count("sweep") == 3
            turns.clear()
            left = 3
            clock.not_later_than(trio.current_time())
            nursery.start_soon(other)
            await trio.testing.wait_all_tasks_blocked()
            assert turns.count("sweep") == 3
            assert "sweep sweep sweep" not in " ".join(turns)
            nursery.cancel_scope.cancel()
