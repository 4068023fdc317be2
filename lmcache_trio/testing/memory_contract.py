"""The suite that every `Memory` passes. Subclass it, say how one is made, and run it with pytest and pytest-trio.

    class TestMine(MemoryContract):
        def make(self, size: int) -> Memory:
            return MyMemory(MyConfig(size=size))

It refuses to look behind the interface: what a memory keeps its bytes in is its own affair, as long as whoever is given
`descriptor` can map it and sees there what the server's `view` says.
"""

import fcntl
import mmap
import os
from abc import ABC, abstractmethod

import pytest

from lmcache_trio.abc import Memory
from lmcache_trio.errors import Misuse

__all__ = ["MemoryContract"]

MIB = 1 << 20
SIZE = 48 * MIB
_SEAL_FUTURE_WRITE = 0x10  # of <linux/fcntl.h>


class MemoryContract(ABC):
    """What any memory promises. *SIZE* bytes, 48 MiB, are asked for and must be there."""

    @abstractmethod
    def make(self, size: int) -> Memory:
        """A memory of *size* bytes, not yet open."""

    async def _whole(self, memory: Memory) -> int:
        taken = await memory.grow()
        while (more := await memory.grow()) != taken:
            taken = more
        return taken

    async def test_it_grows_to_its_size_and_then_says_the_same_number_again(self) -> None:
        memory = self.make(SIZE)
        assert memory.size == SIZE
        async with memory.open():
            first = await memory.grow()
            assert 0 < first <= SIZE
            assert await self._whole(memory) == SIZE
            assert await memory.grow() == SIZE

    async def test_no_client_can_change_the_length_of_the_file_nor_seal_it_for_others(self) -> None:
        memory = self.make(SIZE)
        async with memory.open():
            await memory.grow()
            for length in (0, SIZE // 2, SIZE + 4096):
                with pytest.raises(PermissionError):
                    os.ftruncate(memory.descriptor, length)
            with pytest.raises(PermissionError):
                os.posix_fallocate(memory.descriptor, SIZE, 4096)
            with pytest.raises(PermissionError):
                fcntl.fcntl(memory.descriptor, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE)
            assert os.fstat(memory.descriptor).st_size == SIZE
            assert await self._whole(memory) == SIZE

    async def test_the_file_has_no_name_and_its_descriptor_goes_with_the_memory(self) -> None:
        memory = self.make(SIZE)
        with pytest.raises(LookupError):
            async with memory.open():
                fd = memory.descriptor
                assert os.fstat(fd).st_nlink == 0
                raise LookupError
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)

    async def test_a_client_that_maps_the_file_sees_what_a_view_says_and_the_other_way_round(self) -> None:
        memory = self.make(SIZE)
        async with memory.open():
            taken = await self._whole(memory)
            with mmap.mmap(memory.descriptor, memory.size) as mapped:
                last = taken - 4096
                view = memory.view(last, 4096)
                view[:5] = b"there"
                assert mapped[last : last + 5] == b"there"
                mapped[:4] = b"back"
                assert bytes(memory.view(0, 4)) == b"back"
                view.release()

    async def test_a_view_outside_of_the_slots_is_refused(self) -> None:
        memory = self.make(SIZE)
        async with memory.open():
            taken = await memory.grow()
            for offset, length in ((-16, 16), (taken - 8, 16), (taken, 1), (4096, -1), (-4096, 4096)):
                with pytest.raises(Misuse):
                    memory.view(offset, length)

    async def test_it_can_be_opened_again_after_it_was_closed(self) -> None:
        memory = self.make(SIZE)
        for _ in range(2):
            async with memory.open():
                assert await self._whole(memory) == SIZE

    async def test_statistics_say_what_was_taken_of_what_size(self) -> None:
        memory = self.make(SIZE)
        async with memory.open():
            taken = await memory.grow()
            found = memory.statistics()
            assert (found["bytes_taken"], found["bytes_size"]) == (taken, SIZE)

    async def test_two_at_once_have_a_file_each_and_neither_touches_the_other(self) -> None:
        one, other = self.make(SIZE), self.make(SIZE)
        async with one.open():
            await one.grow()
            async with other.open():
                await other.grow()
                other.view(0, 5)[:] = b"other"
                assert bytes(one.view(0, 5)) == bytes(5)
            assert bytes(one.view(0, 5)) == bytes(5)
