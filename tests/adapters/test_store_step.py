"""What a server that copies is told of a step's layers, and when."""

from lmcache_trio._wire.codec import pack_offsets
from lmcache_trio._wire.messages import LayersWritten, Message, Withdraw
from lmcache_trio.adapters.worker.store_step import StoreStep

LAYERS = 3


class Fence:
    def __init__(self, number: int) -> None:
        self.number = number

    def ipc_handle(self) -> bytes:
        return bytes([self.number]) * 64


def step(layers: int = LAYERS) -> tuple[StoreStep, list[Message]]:
    return StoreStep(layers), []


def written(requests: list[int], layers: int, fence: int = 0) -> LayersWritten:
    return LayersWritten(pack_offsets(requests), layers, bytes([fence]) * 64 if fence else b"")


async def test_each_layer_is_said_once_for_all_requests_and_the_last_when_the_step_is_known_to_be_right() -> None:
    stores, said = step()
    for request in (7, 8):
        stores.begun(request, said.append)
    assert said == []
    for layer in range(LAYERS):
        stores.layer_written(layer, None)
    assert said == [written([7, 8], 1), written([7, 8], 2)]
    stores.finish(drop=False)
    assert said[2:] == [written([7, 8], 3)]


async def test_who_comes_later_is_told_what_was_written_before() -> None:
    stores, said = step()
    stores.begun(7, said.append)
    stores.layer_written(0, None)
    stores.begun(8, said.append)
    stores.layer_written(1, None)
    stores.finish(drop=False)
    stores.begun(9, said.append)
    assert said == [
        written([7], 1),
        written([8], 1),
        written([7, 8], 2),
        written([7, 8], 3),
        written([9], 3),
    ]


async def test_who_was_answered_is_told_nothing_more() -> None:
    stores, said = step()
    for request in (7, 8):
        stores.begun(request, said.append)
    stores.over(7)
    stores.layer_written(0, None)
    stores.over(8)
    stores.finish(drop=False)
    assert said == [written([8], 1)]


async def test_layers_that_are_named_out_of_order_are_said_in_order() -> None:
    stores, said = step()
    stores.begun(7, said.append)
    stores.layer_written(1, None)
    assert said == []
    stores.layer_written(0, None)
    assert said == [written([7], 2)]


async def test_layers_out_of_order_go_with_the_event_behind_all_of_them() -> None:
    stores, said = step()
    stores.begun(7, said.append)
    stores.layer_written(1, Fence(1))
    stores.layer_written(0, Fence(2))
    stores.layer_written(2, Fence(3))
    stores.begun(8, said.append)
    stores.finish(Fence(9), drop=False)
    assert said == [written([7], 2, fence=2), written([8], 2, fence=2), written([7, 8], 3, fence=3)]


async def test_a_layer_that_nobody_named_is_followed_though_others_behind_it_were() -> None:
    stores, said = step()
    stores.begun(7, said.append)
    stores.layer_written(0, Fence(1))
    stores.layer_written(2, Fence(2))
    stores.finish(Fence(9), drop=False)
    assert said == [written([7], 1, fence=1), written([7], 3, fence=9)]


async def test_an_event_that_cannot_be_named_drops_the_step_and_not_the_loop() -> None:
    class Broken(Fence):
        def ipc_handle(self) -> bytes:
            raise RuntimeError("the GPU has fallen off the bus")

    stores, said = step()
    stores.begun(7, said.append)
    stores.layer_written(0, Broken(1))
    stores.begun(8, said.append)
    stores.finish(Fence(9), drop=False)
    assert said == [Withdraw(7), Withdraw(8)]
    assert stores.dropped


async def test_a_layer_that_nobody_named_is_written_with_the_end() -> None:
    stores, said = step()
    stores.begun(7, said.append)
    stores.layer_written(0, Fence(1))
    stores.finish(Fence(9), drop=False)
    assert said == [written([7], 1, fence=1), written([7], 3, fence=9)]
    assert all(event.is_set() for event in stores.written)


async def test_each_layer_goes_with_the_event_behind_what_wrote_it() -> None:
    stores, said = step()
    stores.begun(7, said.append)
    for layer in range(LAYERS):
        stores.layer_written(layer, Fence(1 + layer))
    stores.finish(Fence(9), drop=False)
    assert said == [written([7], 1 + layer, fence=1 + layer) for layer in range(LAYERS)]


async def test_a_step_that_is_dropped_withdraws_what_was_asked_and_says_nothing_more() -> None:
    stores, said = step()
    for request in (7, 8):
        stores.begun(request, said.append)
    stores.layer_written(0, None)
    said.clear()
    stores.finish(drop=True)
    assert said == [Withdraw(7), Withdraw(8)]
    assert stores.finished.is_set()


async def test_with_one_layer_all_is_said_at_the_end() -> None:
    stores, said = step(1)
    stores.begun(7, said.append)
    stores.layer_written(0, None)
    assert said == []
    stores.finish(drop=False)
    assert said == [written([7], 1)]
