"""The torch allocator against SGLang's own one, whose Triton kernels run in the interpreter.

Triton must be told to interpret before it is imported, so the stock allocator lives in a process
of its own: this file run as a script, one JSON call and one JSON reply a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

PAGES = 12
SLACK = 8192


class Driver:
    """One allocator and the requests on it, driven by JSON-able calls."""

    def __init__(self, allocator: PagedTokenToKVPoolAllocator) -> None:
        self.allocator = allocator
        self.slots: dict[int, list[int]] = {}

    def extend(self, adds: dict[int, int]) -> list[int] | None:
        """Grow each request (key) by so many tokens in one `alloc_extend`."""
        before = [len(self.slots.get(r, [])) for r in adds]
        after = [n + add for n, add in zip(before, adds.values(), strict=True)]
        last = [self.slots[r][-1] if self.slots.get(r) else -1 for r in adds]
        prefix, seq = torch.tensor(before), torch.tensor(after)
        total = sum(adds.values())
        out = self.allocator.alloc_extend(prefix, prefix, seq, seq, torch.tensor(last), total)
        return self._book(out, adds)

    def decode(self, requests: list[int]) -> list[int] | None:
        """One more token for each request in one `alloc_decode`."""
        seq = torch.tensor([len(self.slots[r]) + 1 for r in requests])
        last = torch.tensor([self.slots[r][-1] for r in requests])
        return self._book(self.allocator.alloc_decode(seq, seq, last), dict.fromkeys(requests, 1))

    def free(self, requests: list[int]) -> None:
        """Finish requests, as one free group."""
        self.allocator.free_group_begin()
        for request in requests:
            self.allocator.free(torch.tensor(self.slots.pop(request), dtype=torch.int64))
        self.allocator.free_group_end()

    def state(self) -> list[list[int]]:
        return [self.allocator.free_pages.tolist(), self.allocator.release_pages.tolist()]

    def _book(self, out: torch.Tensor | None, adds: dict[int, int]) -> list[int] | None:
        if out is None:
            return None
        assert out.dtype == torch.int64
        for request, part in zip(adds, out.split(list(adds.values())), strict=True):
            self.slots.setdefault(request, []).extend(part.tolist())
        return out.tolist()


class PaddedAllocator(PagedTokenToKVPoolAllocator):
    """The stock allocator, made safe to run out of memory on a CPU.

    Its kernels read past the free list before it notices that pages are missing: the list is a
    view of a longer tensor here, and no kernel sees an empty one, whose address is null.
    """

    @property
    def free_pages(self) -> torch.Tensor:
        return self._free_pages

    @free_pages.setter
    def free_pages(self, pages: torch.Tensor | None) -> None:
        if pages is not None:
            padded = torch.cat((pages, torch.zeros(SLACK, dtype=torch.int64)))
            self._free_pages = padded[: len(pages)]

    def alloc_extend(
        self, prefix: torch.Tensor, _p: torch.Tensor, seq: torch.Tensor, *rest: Any
    ) -> torch.Tensor | None:
        if not self.available_size() and get_num_new_pages(seq, self.page_size, prefix):
            return None
        return super().alloc_extend(prefix, prefix, seq, *rest)

    def alloc_decode(self, seq: torch.Tensor, *rest: Any) -> torch.Tensor | None:
        if not self.available_size() and get_num_new_pages(seq, self.page_size, decode=True):
            return None
        return super().alloc_decode(seq, *rest)


class Reference:
    """The stock allocator in its own process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )

    def call(self, name: str, argument: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, argument]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def serve() -> None:
    """Answer calls on the stock allocator until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    driver = None
    for line in sys.stdin:
        name, argument = json.loads(line)
        if name == "new":
            driver, result = Driver(_new(PaddedAllocator, *argument)), None
        elif driver is None:
            raise RuntimeError("the first call must be 'new'")
        else:
            result = _apply(driver, name, argument)
        print(json.dumps([result, driver.state()]), file=replies, flush=True)


def _new(cls: type, page_size: int, need_sort: bool) -> PagedTokenToKVPoolAllocator:
    return cls(PAGES * page_size, page_size, torch.float32, "cpu", None, need_sort)


def _apply(driver: Driver, name: str, argument: list[Any]) -> list[int] | None:
    if name == "extend":
        return driver.extend(dict(argument))
    if name == "decode":
        return driver.decode(argument)
    return driver.free(argument)


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    server = Reference()
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(timeout=60) == 0


REQUESTS = st.integers(0, 4)
CALLS = st.one_of(
    st.tuples(
        st.just("extend"),
        st.dictionaries(REQUESTS, st.integers(0, 70), min_size=1).map(lambda d: list(d.items())),
    ),
    st.tuples(
        st.sampled_from(["decode", "decode", "free"]), st.sets(REQUESTS, min_size=1).map(list)
    ),
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    page_size=st.sampled_from([2, 4, 16]),
    need_sort=st.booleans(),
    calls=st.lists(CALLS, min_size=1, max_size=12),
)
def test_same_slots_and_free_pages_as_the_stock_allocator(
    reference: Reference, page_size: int, need_sort: bool, calls: list[tuple[str, list[Any]]]
) -> None:
    ours = Driver(_new(_torch_allocator(), page_size, need_sort))
    assert reference.call("new", [page_size, need_sort]) == [None, ours.state()]
    for name, argument in calls:
        if name != "extend":
            argument = [r for r in argument if ours.slots.get(r)]
        if argument:
            expected = reference.call(name, argument)
            assert [_apply(ours, name, argument), ours.state()] == expected
            held = [slot for slots in ours.slots.values() for slot in slots]
            assert len(set(held)) == len(held)
            assert page_size <= min(held, default=page_size)  # page 0 is padding


def test_out_of_memory_takes_nothing() -> None:
    driver = Driver(_new(_torch_allocator(), 4, False))
    assert driver.extend({0: 4 * (PAGES - 1)}) is not None
    before = driver.state()
    assert driver.extend({1: 5}) is None
    assert driver.state() == before
    assert driver.extend({1: 4}) is not None
    assert driver.decode([0]) is None


def test_rows_of_int32_slots_give_int64_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DEBUG_MEMORY_POOL", "1")
    allocator = _new(_torch_allocator(), 4, False)
    lens, last = torch.tensor([2]), torch.tensor([5], dtype=torch.int32)
    out = allocator.alloc_extend(lens, lens, lens + 4, lens + 4, last, 4)
    assert out.dtype == torch.int64
    assert out.tolist() == [6, 7, 4, 5]
    out = allocator.alloc_decode(lens + 1, lens + 1, last)
    assert out.dtype == torch.int64
    assert out.tolist() == [6]


def test_debug_mode_refuses_a_last_slot_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DEBUG_MEMORY_POOL", "1")
    allocator = _new(_torch_allocator(), 4, False)
    lens = torch.tensor([6])
    with pytest.raises(ValueError, match="last_loc"):
        allocator.alloc_extend(lens, lens, lens + 4, lens + 4, torch.tensor([4]), 4)
    with pytest.raises(ValueError, match="last_loc"):
        allocator.alloc_decode(lens, lens, torch.tensor([7]))


def test_debug_mode_refuses_a_slot_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DEBUG_MEMORY_POOL", "1")
    allocator = _new(_torch_allocator(), 4, False)
    allocator.free_pages = torch.tensor([3, 3])
    lens = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="twice"):
        allocator.alloc_extend(lens, lens, lens + 4, lens + 4, lens - 1, 8)
    allocator.free_pages = torch.tensor([3, 3])
    with pytest.raises(ValueError, match="twice"):
        allocator.alloc_decode(lens + 1, lens + 1, lens - 1)


def test_single_slots_come_from_the_stock_allocator() -> None:
    from sglang_tri.patches.cpu.allocator import TorchPagedAllocator, make_allocator

    options = {"dtype": torch.float32, "device": "cpu", "kvcache": None, "need_sort": False}
    assert type(make_allocator(8, page_size=1, **options)) is TokenToKVPoolAllocator
    assert type(make_allocator(8, page_size=2, **options)) is TorchPagedAllocator


def _torch_allocator() -> type:
    from sglang_tri.patches.cpu.allocator import TorchPagedAllocator

    return TorchPagedAllocator


if __name__ == "__main__":
    serve()
