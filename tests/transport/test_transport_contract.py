"""What every transport promises, over memory, unix and tcp alike."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from lmcache_trio import _transport
from lmcache_trio._transport import MAX_MESSAGE, Connection, Rendezvous
from lmcache_trio.errors import ConfigError, Gone, Misuse, Unavailable

pytestmark = pytest.mark.usefixtures("bounded")


@attrs.frozen
class Ends:
    """Two connected ends."""

    server: Connection
    client: Connection


ADDRESSES = {"memory": "memory://server", "unix": "unix://{}/s", "tcp": "tcp://127.0.0.1:0"}


@pytest.fixture(params=list(ADDRESSES))
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a rendezvous can be opened; a TCP one takes any free port."""
    return ADDRESSES[request.param].format(tmp_path)


@pytest.fixture
async def ends(address: str) -> AsyncIterator[Ends]:
    listener = _transport.listen_pair(address)
    with trio.fail_after(60):
        client = await _transport.dial_pair(listener.address)
        server = await listener.accept()
    yield Ends(server, client)
    server.close()
    client.close()


@pytest.fixture
async def bounded() -> AsyncIterator[None]:
    with trio.fail_after(60):
        yield


async def fill(connection: Connection) -> int:
    """Send until there is no room, and cancel the send that waits; returns how many messages were accepted."""
    sent = 0
    while True:
        with trio.move_on_after(0.2) as scope:  # longer than any buffer behind ours takes to move
            await connection.send(sent.to_bytes(4, "little") + bytes(20_000))
            sent += 1
        if scope.cancelled_caught:
            return sent


async def test_messages_arrive_whole_and_in_order_both_ways(ends: Ends) -> None:
    for sender, receiver in [(ends.client, ends.server), (ends.server, ends.client)]:
        sent = [b"", b"x", b"\0" * 256, os.urandom(70_000)]
        for message in sent:
            await sender.send(message)
        assert [await receiver.receive() for _ in sent] == sent


async def test_a_message_of_the_largest_size_arrives_and_a_larger_one_is_refused_where_it_is_sent(ends: Ends) -> None:
    largest = os.urandom(MAX_MESSAGE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.client.send, largest)
        assert await ends.server.receive() == largest
    with pytest.raises(Misuse, match="split it"):
        ends.client.send_nowait(largest + b"x")
    await ends.client.send(b"still there")
    assert await ends.server.receive() == b"still there"


async def test_what_would_wait_says_so(ends: Ends) -> None:
    with pytest.raises(trio.WouldBlock):
        ends.server.receive_nowait()
    await fill(ends.client)
    with pytest.raises(trio.WouldBlock):
        for _ in range(1000):
            ends.client.send_nowait(bytes(20_000))


async def test_backpressure_holds_the_sender_and_loses_nothing(ends: Ends) -> None:
    total = 600
    most = 0

    async def send_all() -> None:
        nonlocal most
        for i in range(total):
            await ends.client.send(i.to_bytes(4, "little") + bytes(60_000))  # 36 MB: more than TCP's buffers take
            most = i

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all)
        with trio.move_on_after(0.3):
            await trio.sleep_forever()
        assert most < total - 1
        for i in range(total):
            assert (await ends.server.receive())[:4] == i.to_bytes(4, "little")


async def test_senders_in_many_tasks_do_not_disturb_each_other(ends: Ends) -> None:
    async def send_some(first: int) -> None:
        for i in range(first, first + 100):
            await ends.client.send(i.to_bytes(4, "little") + bytes(20_000))

    async with trio.open_nursery() as nursery:
        for first in range(0, 500, 100):
            nursery.start_soon(send_some, first)
        await wait_all_tasks_blocked()
        seen = [int.from_bytes((await ends.server.receive())[:4], "little") for _ in range(500)]
    assert sorted(seen) == list(range(500))
    for first in range(0, 500, 100):
        own = [i for i in seen if first <= i < first + 100]
        assert own == sorted(own)


async def test_a_cancelled_receive_loses_no_message(ends: Ends) -> None:
    got: list[bytes] = []
    token = trio.lowlevel.current_trio_token()
    for i in range(100):
        with trio.CancelScope() as scope:
            token.run_sync_soon(scope.cancel)  # while it waits
            ends.client.send_nowait(b"%d" % i)
            got.append(await ends.server.receive())
        with trio.CancelScope() as scope:
            scope.cancel()  # before it looks
            got.append(await ends.server.receive())
        assert scope.cancelled_caught
    while len(got) < 100:
        got.append(await ends.server.receive())
    assert got == [b"%d" % i for i in range(100)]


async def test_a_cancelled_send_was_not_sent(ends: Ends) -> None:
    accepted = await fill(ends.client)
    for i in range(accepted):
        assert (await ends.server.receive())[:4] == i.to_bytes(4, "little")
    await ends.client.send(b"next")
    assert await ends.server.receive() == b"next"


async def test_what_arrived_before_the_end_is_read_in_order_and_then_it_is_gone(ends: Ends) -> None:
    for i in range(3):
        await ends.client.send(b"%d" % i)
    assert await ends.server.receive() == b"0"
    ends.client.close()
    await ends.server.wait_closed()
    arrived = []
    with pytest.raises(Gone):
        while True:
            arrived.append(await ends.server.receive())
    assert arrived == [b"1", b"2"][: len(arrived)]  # the rest was still on its way, and the sender did not wait for it
    for _ in range(2):
        with pytest.raises(Gone):
            await ends.server.receive()
        with pytest.raises(Gone):
            ends.server.receive_nowait()
        with pytest.raises(Gone):
            ends.server.send_nowait(b"x")
        with pytest.raises(Gone):
            await ends.server.send(b"x")


async def test_an_end_wakes_everyone_who_waits_on_either_side(ends: Ends) -> None:
    woken: list[str] = []

    async def waits(name: str, fn: Callable[..., Awaitable[object]], *args: object) -> None:
        with pytest.raises(Gone):
            while True:
                await fn(*args)
        woken.append(name)

    async def waits_closed(name: str, connection: Connection) -> None:
        await connection.wait_closed()
        woken.append(name)

    await fill(ends.client)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits, "sender", ends.client.send, bytes(20_000))
        nursery.start_soon(waits, "second sender", ends.client.send, bytes(20_000))
        nursery.start_soon(waits, "receiver", ends.client.receive)
        nursery.start_soon(waits_closed, "client", ends.client)
        nursery.start_soon(waits_closed, "server", ends.server)
        await wait_all_tasks_blocked()
        ends.server.close()
    assert sorted(woken) == ["client", "receiver", "second sender", "sender", "server"]


async def test_closing_wakes_our_own_waiters_and_may_be_repeated(ends: Ends) -> None:
    async with trio.open_nursery() as nursery:

        async def waits() -> None:
            with pytest.raises(Gone):
                await ends.client.receive()

        nursery.start_soon(waits)
        nursery.start_soon(ends.client.wait_closed)
        await wait_all_tasks_blocked()
        ends.client.close()
        ends.client.close()
    with pytest.raises(Gone):
        await ends.client.receive()
    with pytest.raises(Gone):
        ends.client.send_nowait(b"x")


async def test_a_pair_address_is_for_one_client_and_withdrawn_once_it_came(address: str) -> None:
    listener = _transport.listen_pair(address)
    first = await _transport.dial_pair(listener.address)
    server = await listener.accept()
    await first.send(b"hello")
    assert await server.receive() == b"hello"
    with trio.move_on_after(0.3):
        try:
            second = await _transport.dial_pair(listener.address)
        except Unavailable:
            pass
        else:
            with pytest.raises(Gone):  # over TCP the port stays open, and turns everyone else away
                await second.receive()
            second.close()
    await first.send(b"undisturbed")
    assert await server.receive() == b"undisturbed"
    first.close()
    server.close()


async def test_a_pair_that_nobody_takes_up_is_withdrawn_at_the_deadline(address: str) -> None:
    listener = _transport.listen_pair(address)
    with pytest.raises(Unavailable, match="nobody came"):
        await listener.accept(trio.current_time() + 0.05)
    with pytest.raises(Unavailable):
        await _transport.dial_pair(listener.address)


async def test_a_cancelled_accept_of_a_pair_withdraws_the_address(address: str) -> None:
    listener = _transport.listen_pair(address)
    with trio.move_on_after(0.05):
        await listener.accept()
    with pytest.raises(Unavailable):
        await _transport.dial_pair(listener.address)


async def test_closing_a_pair_listener_ends_the_accept(address: str) -> None:
    listener = _transport.listen_pair(address)
    async with trio.open_nursery() as nursery:

        async def waits() -> None:
            with pytest.raises(Gone):
                await listener.accept()

        nursery.start_soon(waits)
        await wait_all_tasks_blocked()
        listener.close()
        listener.close()


async def answer_all(rendezvous: Rendezvous) -> None:
    while True:
        introduction = await rendezvous.accept()
        introduction.reply(b"re: " + introduction.hello)


async def test_an_introduction_is_answered(address: str) -> None:
    rendezvous = _transport.listen(address)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, rendezvous)
        for i in range(3):
            assert await _transport.introduce(rendezvous.address, b"%d" % i) == b"re: %d" % i
        nursery.cancel_scope.cancel()
    rendezvous.close()
    rendezvous.close()


async def test_an_introduction_to_nobody_is_unavailable_at_once(address: str) -> None:
    rendezvous = _transport.listen(address)
    rendezvous.close()
    with trio.fail_after(60), pytest.raises(Unavailable, match="no server listens"):
        await _transport.introduce(rendezvous.address, b"hello")
    with trio.fail_after(60), pytest.raises(Unavailable, match="no server listens"):
        await _transport.dial_pair(rendezvous.address)


async def test_a_cancelled_introduction_leaves_nothing_behind(address: str) -> None:
    rendezvous = _transport.listen(address)
    for _ in range(3):
        with trio.move_on_after(0.05) as scope:
            await _transport.introduce(rendezvous.address, b"nobody answers")
        assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, rendezvous)
        assert await _transport.introduce(rendezvous.address, b"me") == b"re: me"
        nursery.cancel_scope.cancel()
    rendezvous.close()


async def test_a_server_that_goes_before_it_answers_is_unavailable_by_notification(address: str) -> None:
    rendezvous = _transport.listen(address)
    async with trio.open_nursery() as nursery:

        async def introduce() -> None:
            with pytest.raises(Unavailable, match="ended before it answered"):
                await _transport.introduce(rendezvous.address, b"hello")

        nursery.start_soon(introduce)
        await rendezvous.accept()
        rendezvous.close()
    with pytest.raises(Gone):
        await rendezvous.accept()


async def test_an_answer_goes_to_the_client_that_was_accepted_last_or_to_nobody(address: str) -> None:
    rendezvous = _transport.listen(address)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_transport.introduce, rendezvous.address, b"once")
        introduction = await rendezvous.accept()
        introduction.reply(b"yes")
        with pytest.raises(Misuse):
            introduction.reply(b"again")
    rendezvous.close()


async def test_a_cancelled_accept_loses_no_introduction(address: str) -> None:
    rendezvous = _transport.listen(address)
    for _ in range(3):
        with trio.move_on_after(0.02):
            await rendezvous.accept()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, rendezvous)
        assert await _transport.introduce(rendezvous.address, b"me") == b"re: me"
        nursery.cancel_scope.cancel()
    rendezvous.close()


async def test_an_address_in_use_is_named(address: str) -> None:
    rendezvous = _transport.listen(address)
    with pytest.raises(ConfigError, match=r"^address: .* in use: ") as caught:
        _transport.listen(rendezvous.address)
    assert caught.value.key == "address"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, rendezvous)
        assert await _transport.introduce(rendezvous.address, b"me") == b"re: me"
        nursery.cancel_scope.cancel()
    rendezvous.close()


async def test_waiting_for_a_server_ends_when_one_listens(address: str) -> None:
    first = _transport.listen(address)
    await _transport.wait_listening(first.address)
    first.close()
    with trio.move_on_after(0.1) as scope:
        await _transport.wait_listening(first.address)
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_transport.wait_listening, first.address)
        await wait_all_tasks_blocked()
        again = _transport.listen(first.address)
    again.close()
