"""Compares what the server's requests read with what the plain model says.

The book knows what every request left under which tokens. Nothing in it says what the server will
find again; but whatever it finds must be in the book, under the very tokens, `extra_key` and
settings that asked for it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_tri.history import SYNTHETIC, Alias, AliasStore, Chain, Lookup, Span
from sglang_tri.patches.versions import scheduling
from tests.histories.loop import Setup
from tests.histories.memory import Memory
from tests.histories.plain import POSITION, Plain, in_order
from tests.histories.tree import Tree, paths, salt


class Request:
    """One request: SGLang's and the plain one.

    Attributes:
        chain: the compressed history that it goes on from.
        path: that of its last token, while it has evicted nothing itself.
        slots: its slots at its last forward pass.
        cached: tokens that it found when it was first admitted.
        first_history: "compressed" if they were, or "exact"; nothing before.
        left: number of the last span that it has left.
        replays: whether it is prefilled with what it had generated before, as that was decoded.
    """

    def __init__(self, req: Req, plain: Plain) -> None:
        self.req, self.plain = req, plain
        self.chain = Chain()
        self.path = 0
        self.slots = np.empty(0, np.int64)
        self.cached: int | None = None
        self.first_history = ""
        self.left: int | None = None
        self.replays = False

    @property
    def scope(self) -> Hashable:
        """What two requests must share, beside tokens, to share compressed history."""
        state = scheduling.state_of(self.req)
        return None if state is None else (state.settings, self.req.extra_key)

    def paths(self, spans: Sequence[Span]) -> list[int]:
        """Those of its slots, if `spans` are all that is not plain."""
        ids: list[int] = []
        position = 0
        for span in spans:
            ids += [*self.plain.tokens[position : span.start], *span.ids]
            position = span.end
        return paths(salt(self.req.extra_key), ids + self.plain.tokens[position:])


@dataclass
class Written:
    """A span, and what was compressed into it.

    Attributes:
        scope: that of its request.
        spans: its history, itself the last one.
        tokens: what its history was made from.
        entries: what its slots hold, by position in every head.
        replaced: whether the same history was compressed again later.
    """

    scope: Hashable
    spans: tuple[Span, ...]
    tokens: tuple[int, ...]
    entries: np.ndarray
    replaced: bool = False

    def serves(self, request: Request, tokens: Sequence[int]) -> bool:
        """Whether `tokens` of `request` go on from this history."""
        size = len(self.tokens)
        return (
            self.scope == request.scope
            and size < len(tokens)
            and tuple(tokens[:size]) == self.tokens
        )


class Store(AliasStore):
    """The project's store, which tells the book what is registered.

    Args:
        deaf: it is not told what the tree evicts, and must find out when it is asked.
    """

    def __init__(self, limit: int, deaf: bool) -> None:
        super().__init__(limit)
        self.limit, self.deaf = limit, deaf
        self.book: Book

    @property
    def numbers(self) -> set[int]:
        return set(self._aliases)

    def add(self, lookup: Lookup, tokens: array[int], chain: Chain, parent: Alias | None) -> Alias:
        self.book.write(lookup, tokens, chain, parent)
        return super().add(lookup, tokens, chain, parent)

    def drop_ids(self, ids: array[int]) -> None:
        if not self.deaf:
            super().drop_ids(ids)


class Book:
    """All requests, and all that they left.

    Attributes:
        known: what slots hold, by path: one entry where nothing was evicted before.
        spans: compressed histories by number.
        done: how often what happened.
    """

    def __init__(
        self, setup: Setup, memory: Memory, rows: torch.Tensor, tree: Tree, store: Store
    ) -> None:
        self.known: dict[int, set[bytes]] = {}
        self.spans: dict[int, Written] = {}
        self.requests: dict[str, Request] = {}
        self.done: Counter[str] = Counter()
        self._setup = setup
        self._memory, self._rows, self._tree, self._store = memory, rows.numpy(), tree, store
        store.book = self

    def forward(self, batch: ForwardBatch) -> list[int]:
        """Compute a batch; returns its next tokens. Every request reads what it must."""
        lengths, rows = batch.seq_lens.tolist(), batch.req_pool_indices.tolist()
        new = [1] * len(lengths) if batch.forward_mode.is_decode() else batch.extend_seq_lens_cpu
        ids, positions = batch.input_ids.tolist(), batch.positions.tolist()
        written, done = batch.out_cache_loc.tolist(), 0
        assert len(ids) == len(positions) == len(written) == sum(new)
        for rid, row, length, count in zip(batch.rids, rows, lengths, new, strict=True):
            request, part = self.requests[rid], slice(done, done + count)
            slots = self._rows[row, :length].astype(np.int64)
            done += count
            assert slots[length - count :].tolist() == written[part]
            self._read(request, slots[: length - count])
            if request.chain and length + request.plain.delta < len(request.plain.wanted):
                self.done["chunks behind a span"] += 1
            self._compute(request, ids[part], positions[part], written[part])
            request.slots = slots
        return [self.requests[rid].plain.sampled or 0 for rid in batch.rids]

    def _read(self, request: Request, slots: np.ndarray) -> None:
        plain = request.plain
        if not plain.wanted:
            self._begin(request, slots)
            self._plan_prefill(request)
        else:
            self._plan_prefill(request)
            self._follow(request, slots)
        found = in_order(self._memory.read(slots), plain.unordered)
        assert np.array_equal(found, plain.entries), "it reads what its conversation never left"

    def _plan_prefill(self, request: Request) -> None:
        """What a request has generated itself is prefilled as it was decoded, with all rounds."""
        plain = request.plain
        if request.replays and len(plain.prompt) <= len(plain.tokens) < len(plain.wanted):
            rounds = plain.rounds
            self.plan(plain)
            self.done["rounds in a prefill"] += plain.rounds - rounds

    def plan(self, plain: Plain) -> None:
        """What is evicted before the next token of an answer is computed."""
        before = plain.rounds, plain.closed
        plain.plan()
        self.done["rounds"] += plain.rounds - before[0]
        self.done["closed by thinking"] += plain.closed - before[1]

    def _begin(self, request: Request, slots: np.ndarray) -> None:
        """A request is prefilled behind what was found of its tokens."""
        req, state = request.req, scheduling.state_of(request.req)
        wanted = (*req.origin_input_ids, *req.output_ids)
        resumed = state is not None and state.resumed
        found = len(slots) + (state.delta if state else 0)
        request.replays = resumed and found <= len(request.plain.prompt)
        if resumed and not request.replays:
            self._take_back(request, wanted, slots)
            return
        if resumed:
            request.plain.restart()
        else:
            request.plain.clear()
        request.chain = chain = state.chain if state else Chain()
        found = len(slots) + sum(span.evicted for span in chain.spans)
        assert found < len(wanted)
        self._justify(request, wanted, slots)
        parts = [(span.first_slot, span.last_slot) for span in chain.spans]
        entries = in_order(self._memory.read(slots), parts)
        request.plain.begin(wanted, found, entries, parts)
        steps = request.paths(chain.spans)
        request.path = steps[-1] if steps else salt(req.extra_key)
        for span in chain.spans:
            held = entries[span.first_slot : span.last_slot]
            assert np.array_equal(held, self.spans[span.number].entries)
        self._recognize(request, steps, range(len(slots)))
        if request.cached is None:
            request.cached = found
            request.first_history = "compressed" if chain else "exact"
        # A preemption comes after the queue was sorted, and registers histories.
        if self._setup.policy != "fcfs" and found and not self._setup.preempts:
            assert found <= req.num_matched_prefix_tokens < len(wanted)
            assert found == req.num_matched_prefix_tokens or not chain
        self._count_beginning(request, wanted)

    def _take_back(self, request: Request, wanted: tuple[int, ...], slots: np.ndarray) -> None:
        """A request goes on from all that it has left itself, and that is its own again."""
        plain, state = request.plain, scheduling.state_of(request.req)
        assert state is not None
        assert plain.compressed
        request.chain = state.chain
        plain.resume(wanted, len(slots))
        assert len(plain.tokens) == len(slots) + state.delta
        done = self.done
        done["prefills"] += 1
        done["lookups"] += 1
        done["hits"] += 1
        done["taken back"] += 1

    def _justify(self, request: Request, wanted: Sequence[int], slots: np.ndarray) -> None:
        """It goes on from its own history or from none, and from the longest that there is."""
        spans = request.chain.spans
        for index, span in enumerate(spans):
            written = self.spans[span.number]
            assert written.serves(request, wanted), "compressed history of another text"
            assert written.spans == spans[: index + 1]
            assert span.last_slot <= len(slots)
        if self._setup.forces_miss or not request.plain.reusable:
            assert not spans
            return
        # What it left itself comes first, also where others have come to share that since.
        if spans and spans[-1].number == request.left:
            return
        for number in self._store.numbers & set(self._tree.read().spans):
            written = self.spans[number]
            if written.serves(request, self._sought(request, wanted)):
                assert len(written.tokens) <= request.chain.end, "longer history was not found"

    @staticmethod
    def _sought(request: Request, wanted: Sequence[int]) -> Sequence[int]:
        """What a request looks for: if it was retracted, its prompt; the rest is private."""
        state = scheduling.state_of(request.req)
        return wanted[: len(request.plain.prompt)] if state and state.resumed else wanted

    def _recognize(self, request: Request, steps: list[int], places: Sequence[int]) -> None:
        """What lies plain in `places` of a request was left under the request's own tokens."""
        inside = {
            place
            for span in request.chain.spans
            for place in range(span.first_slot, span.last_slot)
        }
        for place in set(places) - inside:
            entry = request.plain.entries[place].tobytes()
            assert entry in self.known[steps[place]], "an entry of another text"

    def _follow(self, request: Request, slots: np.ndarray) -> None:
        """Where the tree had the same tokens already, SGLang uses its slots from then on."""
        plain, before = request.plain, request.slots[: len(slots)]
        assert len(before) == len(slots) == plain.length
        moved = np.flatnonzero(before != slots)
        if not moved.size:
            return
        assert not plain.regions or moved.max() < plain.regions[0].start
        entries = plain.entries.copy()
        entries[moved] = self._memory.read(slots[moved])
        plain.replace(0, entries)
        self._recognize(request, request.paths(request.chain.spans), moved.tolist())
        self.done["slots exchanged"] += 1

    def _compute(
        self, request: Request, ids: list[int], positions: list[int], slots: list[int]
    ) -> None:
        plain = request.plain
        first = len(plain.tokens)
        assert positions == list(range(first, first + len(ids))), "RoPE positions are not logical"
        assert max(ids) < SYNTHETIC, "a synthetic id is computed"
        assert ids == plain.expected(len(ids)), "other tokens are computed"
        for place, (token, slot) in enumerate(zip(ids, slots, strict=True)):
            if place:
                self._plan_prefill(request)
            entry = plain.feed(token)
            self._memory.write(slot, entry)
            if not plain.compressed:
                request.path = hash((request.path, token))
                self._learn(request.path, entry, exact=not request.chain)

    def _learn(self, path: int, entry: np.ndarray, exact: bool) -> None:
        variants = self.known.setdefault(path, set())
        variants.add(entry.tobytes())
        assert len(variants) == 1 or not exact, "what nobody compressed is not exact"

    def write(
        self, lookup: Lookup, tokens: Sequence[int], chain: Chain, parent: Alias | None
    ) -> None:
        """A history is registered: it is what a request has just left."""
        request = next(
            request
            for request in self.requests.values()
            if (state := scheduling.state_of(request.req)) and state.lookup is lookup
        )
        assert request.plain.reusable
        assert (parent.chain.spans if parent else ()) == chain.spans[:-1]
        history = tuple(tokens[: chain.end])
        assert history == tuple(request.plain.tokens[: chain.end])
        self._check_span(request, chain)
        span, entries = chain.spans[-1], request.plain.entries
        written = Written(
            request.scope, chain.spans, history, entries[span.first_slot : span.last_slot].copy()
        )
        for other in self.spans.values():
            if (other.scope, other.tokens) == (written.scope, history) and not other.replaced:
                other.replaced = True
                self.done["histories replaced"] += 1
        self.spans[span.number] = written
        request.left = span.number
        steps = request.paths(chain.spans)
        for place in range(span.last_slot, self._next_start(request, span)):
            self._learn(steps[place], entries[place], exact=False)

    @staticmethod
    def _next_start(request: Request, span: Span) -> int:
        """Where the next compressed part begins, or the end."""
        starts = [region.start for region in request.plain.compressed]
        return min((s for s in starts if s > span.first_slot), default=request.plain.length)

    def _check_span(self, request: Request, chain: Chain) -> None:
        """The span covers what was evicted from and leaves the tail plain; around it, all is."""
        plain, span = request.plain, chain.spans[-1]
        region = plain.compressed[len(chain.spans) - len(request.chain.spans) - 1]
        assert (span.first_slot, span.last_slot) == (region.start, plain.loose_end(region))
        positions = plain.entries[..., POSITION].astype(np.int64)
        inside = positions[span.first_slot : span.last_slot]
        assert inside.min() >= span.start
        assert inside.max() < span.end
        behind = chain.spans[-2] if len(chain.spans) > 1 else None
        first = behind.last_slot if behind else 0
        before = np.arange(first - span.first_slot, 0) + span.start
        end = self._next_start(request, span)
        after = np.arange(end - span.last_slot) + span.end
        for part, expected in (
            (positions[first : span.first_slot], before),
            (positions[span.last_slot : end], after),
        ):
            assert (part == expected[:, None, None]).all(), "not plain around the span"
        assert span.end == len(plain.tokens) or len(after)

    def outdate(self) -> None:
        """Nothing goes on from what was compressed up to now."""
        for written in self.spans.values():
            written.replaced = True
        self.done["new weights"] += 1

    def _count_beginning(self, request: Request, wanted: Sequence[int]) -> None:
        """What this prefill shows."""
        done, spans = self.done, request.chain.spans
        state = scheduling.state_of(request.req)
        done["prefills"] += 1
        done["lookups"] += request.plain.reusable
        if spans:
            done["hits"] += 1
            done["longer chains"] += len(spans) > 1
            done["resumed compressed"] += request.req.retracted_stain
            done["forks"] += any(
                other.plain.wanted and other.chain.spans[: len(spans)] == spans
                for other in self.requests.values()
                if other is not request
            )
        end = request.chain.end
        for written in self.spans.values():
            start, size = written.spans[-1].start, len(written.tokens)
            if written.serves(request, wanted):
                done["forgotten histories"] += size > end
            elif written.tokens == tuple(wanted[:size]):
                done["other scopes"] += state is not None and size < len(wanted)
            elif written.tokens[: start + 1] == tuple(wanted[: start + 1]):
                done["diverged in a span"] += written.scope == request.scope
