"""What must hold between any two steps of the scheduler: who owns which slots, what they hold."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req

from sglang_tri.engine import Engine
from sglang_tri.history import SYNTHETIC
from sglang_tri.patches.server import KEY
from sglang_tri.patches.versions import scheduling
from tests.histories.book import Book, Request, Store
from tests.histories.loop import ROWS, Loop
from tests.histories.memory import Memory
from tests.histories.plain import in_order
from tests.histories.tree import Held, Tree


class Audit:
    """Checks of one server."""

    def __init__(
        self, loop: Loop, engine: Engine, book: Book, memory: Memory, tree: Tree, store: Store
    ) -> None:
        self._loop, self._engine, self._book = loop, engine, book
        self._memory, self._tree, self._store = memory, tree, store
        slots = len(memory.rows)
        # Slots that somebody outside the scheduler has.
        self.taken = torch.empty(0, dtype=torch.int64)
        self._owner = np.zeros(slots, np.int64)
        self._content = np.zeros_like(memory.rows)

    def __call__(self) -> None:
        held = self._tree.read()
        self.requests()
        self.ownership(held)
        self.contents(held)
        self.aliases(held)

    @property
    def holders(self) -> list[Request]:
        """The requests that have slots."""
        return [r for r in self._book.requests.values() if r.req.req_pool_idx is not None]

    def requests(self) -> None:
        """Lengths agree, and outside SGLang's tree everyone sees the tokens that were sent."""
        for request in self._book.requests.values():
            req, plain = request.req, request.plain
            text = (*req.origin_input_ids, *req.output_ids)
            assert max(text) < SYNTHETIC
            assert tuple(req.origin_input_ids) == plain.prompt
            if req.req_pool_idx is None or not plain.wanted:
                continue
            assert text == (*plain.wanted, *plain.text[len(plain.wanted) :])[: len(text)]
            assert len(text) <= max(len(plain.wanted), len(plain.text))
            assert plain.length == req.kv_committed_len == req.kv.kv_allocated_len
            state = scheduling.state_of(req)
            if state is not None:
                assert plain.delta == state.delta
                assert (plain.rounds, plain.evicted) == (state.rounds, state.evicted_tokens)
            if not req.retracted_stain:
                assert req.cached_tokens == req.cached_tokens_device == request.cached

    def ownership(self, tree: Held) -> None:
        """Every page is free, or the tree's, or one request's; nodes are locked by holders."""
        page, allocator = self._loop.page_size, self._loop.token_to_kv_pool_allocator
        free = np.concatenate([allocator.free_pages.numpy(), allocator.release_pages.numpy()])
        private = [self._pages(self._private(request.req), page) for request in self.holders]
        others = [self._pages(tree.slots, page), self._pages(self.taken.numpy(), page)]
        owned = np.concatenate([free, *others, *private])
        whole = np.arange(1, allocator.size // page + 1)
        assert np.array_equal(np.sort(owned), whole), "a slot is owned twice, or by nobody"
        locks = self._locks()
        assert all(node.lock_ref == locks[node.id] for node in tree.nodes)
        evictable = sum(len(node.value) for node in tree.nodes if not node.lock_ref)
        assert self._loop.tree_cache.evictable_size() == evictable
        assert self._loop.tree_cache.protected_size() == len(tree.slots) - evictable
        assert allocator.available_size() == len(free) * page
        pool = self._loop.req_to_token_pool
        rows = [*pool.free_slots, *(request.req.req_pool_idx for request in self.holders)]
        assert sorted(rows) == list(range(1, ROWS + 1))

    def _private(self, req: Req) -> np.ndarray:
        """The slots of a request that are not the tree's."""
        row = self._loop.req_to_token_pool.req_to_token[req.req_pool_idx].numpy()
        return row[req.cache_protected_len : req.kv.kv_allocated_len]

    @staticmethod
    def _pages(slots: np.ndarray, page: int) -> np.ndarray:
        """Their pages; the slots of a page lie together and in order."""
        first, place = slots[::page], np.arange(len(slots)) % page
        assert not (first % page).any()
        assert np.array_equal(slots, first.repeat(page)[: len(slots)] + place)
        return first // page

    def _locks(self) -> Counter[int]:
        """How many requests hold each node."""
        locks: Counter[int] = Counter()
        for request in self.holders:
            node = request.req.last_node
            while node is not None and node is not self._loop.tree_cache.root_node:
                locks[node.id] += 1
                node = node.parent
        return locks

    def contents(self, tree: Held) -> None:
        """A slot of the tree holds what the book says, always."""
        assert not self._engine._planned, "a round was planned, and no forward pass ran it"
        rows = self._memory.rows[tree.slots]
        new = (self._owner[tree.slots] != tree.paths) | (self._content[tree.slots] != rows).any(
            (1, 2, 3)
        )
        self._check_plain(tree, np.flatnonzero(new & (tree.ids < SYNTHETIC)))
        self._owner[:] = 0
        self._owner[tree.slots], self._content[tree.slots] = tree.paths, rows
        for number, slots in tree.spans.items():
            self._check_span(number, slots)

    def _check_plain(self, tree: Held, places: np.ndarray) -> None:
        entries = self._memory.read(tree.slots[places])
        for path, entry in zip(tree.paths[places].tolist(), entries, strict=True):
            found = self._book.known.get(path, ())
            assert entry.tobytes() in found, "the tree holds what nobody left under these tokens"

    def _check_span(self, number: int, slots: np.ndarray) -> None:
        written = self._book.spans[number].entries
        assert len(slots) == len(written), "a part of a span is gone"
        held = in_order(self._memory.read(slots), [(0, len(slots))])
        assert np.array_equal(held, written), "the tree holds another span"

    def aliases(self, tree: Held) -> None:
        """What can be found is in the tree, and what is in the tree can be found."""
        store, numbers = self._store, self._store.numbers
        assert len(store) == len(numbers) <= store.limit
        assert sum(len(bucket) for bucket in store._buckets.values()) == len(numbers)
        current = {number for number in tree.spans if not self._book.spans[number].replaced}
        if not store.deaf:
            assert store.stale == 0
            assert numbers <= current
        if not store.deaf and store.limit > len(self._book.spans):
            assert numbers == current

    def closed(self, request: Request) -> None:
        """Its slots were released, and nothing of its history is left with it."""
        state = scheduling.state_of(request.req)
        assert state is None or not (state.history or state.regions)

    def report(self, request: Request) -> None:
        """What the user of a request that ended is told about it."""
        req, plain = request.req, request.plain
        if scheduling.state_of(req) is not None and req.output_ids:
            *before, told = (req.customized_info or {})[KEY]
            assert before == [None] * (len(req.output_ids_through_stop) - 1)
            assert told == {
                "history": request.first_history,
                "rounds": plain.rounds,
                "evicted_tokens": plain.evicted,
                "resident_slots": plain.length,
            }

    def released(self) -> None:
        """Nothing runs: all slots are free or can be evicted."""
        assert not self.holders
        assert self._loop.tree_cache.protected_size() == 0
        assert not self._engine.shifts_positions

    def totals(self) -> None:
        """The server counted what happened."""
        done, report = self._book.done, self._store.report()
        assert report["alias_lookups"] == done["lookups"]
        assert report["alias_hits"] == done["hits"]
        assert self._engine.counters.rounds == done["rounds"]
        done["stale"] = report["alias_stale"]
