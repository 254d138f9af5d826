"""Spans and aliases: what a history is known by, and who finds it."""

from __future__ import annotations

from array import array
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_tri.config import KvPolicyConfig
from sglang_tri.history import BLOCK, SYNTHETIC, Alias, AliasStore, Chain, Lookup
from sglang_tri.patches.versions import scheduling
from sglang_tri.request.region import Region

SCOPE = "scope"


def text(length: int, seed: int = 0) -> array[int]:
    return array("q", [(seed * 7919 + 31 * position) % 251 for position in range(length)])


def remember(
    store: AliasStore,
    tokens: array[int],
    end: int,
    parent: Alias | None = None,
    slots: int = 8,
    first: int | None = None,
) -> Alias:
    """A span of `slots` slots for what `tokens` go on with behind `parent`, up to `end`."""
    before = parent.chain if parent else Chain()
    start = first or before.end + 5
    slot = before.physical_length(start)
    span = store.new_span(start, end, slot, slot + slots)
    return store.add(Lookup(SCOPE), tokens, before.then(span), parent)


def found(store: AliasStore, tokens: array[int], scope: object = SCOPE) -> list[Alias]:
    return list(store.find(Lookup(scope), tokens))


def test_physical_ids() -> None:
    store = AliasStore(9)
    tokens = text(100)
    first = remember(store, tokens, 40)
    second = remember(store, tokens, 80, first)
    ids = second.chain.physical_ids(tokens)
    assert ids[:5] == tokens[:5]
    assert ids[5:13] == first.span.ids
    assert ids[13:18] == tokens[40:45]
    assert ids[18:26] == second.span.ids
    assert ids[26:] == tokens[80:]
    assert second.chain.delta == (35 - 8) + (35 - 8)
    assert second.chain.physical_length(100) == len(ids)
    assert second.chain.physical_length(42) == 42 - 27
    assert Chain().physical_ids(tokens) == tokens


@given(st.lists(st.integers(1, 300), min_size=2, max_size=20))
def test_ids_are_never_used_twice(sizes: list[int]) -> None:
    store = AliasStore(9)
    spans = [store.new_span(0, 1000, 0, slots) for slots in sizes]
    for before, after in pairwise(spans):
        assert SYNTHETIC <= before.ids[0] <= before.ids[-1] < after.ids[0] < 1 << 63
    store.clear()
    assert store.new_span(0, 9, 0, 1).ids[0] > spans[-1].ids[-1]


@pytest.mark.parametrize("end", [20, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK])
def test_exactly_the_tokens_find_it(end: int) -> None:
    store, tokens = AliasStore(9), text(5 * BLOCK)
    alias = remember(store, tokens, end)
    assert found(store, tokens) == [alias]
    assert found(store, tokens[: end + 1]) == [alias]
    assert found(store, tokens[:end]) == [], "nothing would be left to compute"
    assert found(store, tokens, "another scope") == []
    for position in (0, 4, 5, end - 1):
        other = tokens[:]
        other[position] += 1
        assert found(store, other) == [], position
    other = tokens[:]
    other[end] += 1
    assert found(store, other) == [alias]


def test_longest_first() -> None:
    store, tokens = AliasStore(9), text(6 * BLOCK)
    first = remember(store, tokens, 100)
    second = remember(store, tokens, 110, first)
    third = remember(store, tokens, 300, second)
    assert found(store, tokens) == [third, second, first]
    fork = tokens[:110] + text(200, seed=1)
    fourth = remember(store, fork, 290, second)
    assert found(store, fork) == [fourth, second, first]
    assert found(store, tokens) == [third, second, first]


def test_colliding_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lookup, "block_hash", staticmethod(lambda content: 1))
    store, tokens, others = AliasStore(9), text(3 * BLOCK), text(3 * BLOCK, seed=2)
    chains = [Chain((store.new_span(5, 2 * BLOCK, 5, 9),)) for _ in range(2)]
    lookups = [Lookup(SCOPE), Lookup(SCOPE), Lookup("other")]
    ours = store.add(lookups[0], tokens, chains[0], None)
    theirs = store.add(lookups[1], others, chains[1], None)
    assert list(store.find(lookups[0], tokens)) == [ours]
    assert list(store.find(lookups[1], others)) == [theirs]
    assert list(store.find(lookups[2], tokens)) == []


def test_tokens_are_compared_once() -> None:
    store, tokens = AliasStore(9), text(300)
    alias = remember(store, tokens, 200)
    lookup = Lookup(SCOPE)
    assert list(store.find(lookup, tokens)) == [alias]
    tokens[7] += 1  # Never happens: requests only grow. It shows that nobody looks again.
    assert list(store.find(lookup, tokens)) == [alias]


def test_a_physical_prompt_is_as_long_as_its_slots() -> None:
    """SGLang may keep answers out of its tree: it goes by the prompt's length then."""
    store, tokens = AliasStore(9), text(300)
    prompt = remember(store, tokens, 100)
    answer = remember(store, tokens, 250, prompt, first=125)
    req = SimpleNamespace(origin_input_ids=tokens[:120], output_ids=tokens[120:])
    with scheduling.physical_tokens(req, answer.chain):
        assert len(req.origin_input_ids) == 120 - prompt.chain.delta
        assert req.origin_input_ids + req.output_ids == answer.chain.physical_ids(tokens)
    assert (req.origin_input_ids, req.output_ids) == (tokens[:120], tokens[120:])


def test_the_newest_of_two_equal_histories_is_found() -> None:
    store, tokens = AliasStore(9), text(100)
    remember(store, tokens, 80)
    newer = remember(store, tokens, 80)
    assert found(store, tokens) == [newer]
    assert len(store) == 1


def test_least_recently_used_is_dropped() -> None:
    store = AliasStore(2)
    texts = [text(100, seed) for seed in range(3)]
    first = remember(store, texts[0], 80)
    remember(store, texts[1], 80)
    store.touch(first)
    remember(store, texts[2], 80)
    assert [len(found(store, tokens)) for tokens in texts] == [1, 0, 1]
    assert store.report()["live_spans"] == 2


def test_a_used_history_keeps_what_it_goes_on_from() -> None:
    store, tokens = AliasStore(3), text(300)
    first = remember(store, tokens, 100)
    second = remember(store, tokens, 200, first)
    remember(store, text(100, seed=1), 80)
    store.touch(second)
    remember(store, text(100, seed=2), 80)
    assert found(store, tokens) == [second, first]


def test_what_the_tree_deletes_is_dropped() -> None:
    store, tokens = AliasStore(9), text(300)
    first = remember(store, tokens, 100)
    second = remember(store, tokens, 200, first)
    store.drop_ids(tokens)
    assert len(store) == 2
    store.drop_ids(tokens[:3] + second.span.ids[-1:])
    assert found(store, tokens) == [first]
    store.drop_ids(second.span.ids + first.span.ids)
    assert found(store, tokens) == []
    assert store.report()["span_slots"] == 0


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize(("budget", "recent"), [(64, 16), (17, 17), (16, 16), (50, 20), (48, 17)])
def test_a_span_ends_before_the_recent_tokens(page_size: int, budget: int, recent: int) -> None:
    settings = KvPolicyConfig(policy="triattention", budget=budget, interval=32, recent=recent)
    region = Region.open(settings, 101, 7, page_size)
    region.evicted = 64
    start, end, first_slot, last_slot = region.span
    assert (start, first_slot) == (region.start + 7, region.start)
    assert first_slot % page_size == last_slot % page_size == 0
    assert last_slot > first_slot, "a span without a slot would be lost in the tree"
    tail = region.start + region.kept - last_slot
    assert max(0, recent - page_size) < tail + 1 <= recent + 1
    assert end == last_slot + 7 + 64
