"""The life of one request as SGLang gives it, without SGLang."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import fields, replace
from itertools import count
from typing import Any

from sglang_tri.config import KvPolicyConfig
from sglang_tri.history import Alias, AliasStore, Chain
from sglang_tri.request.region import stagger_slots
from sglang_tri.request.request import Request

# A region holds 40 slots; 20 of them survive a round, the last 16 of these as they are.
SETTINGS = KvPolicyConfig("streaming", budget=20, interval=20, recent=16)
MARK = array("q", [901, 902])


def text(length: int, seed: int = 0) -> array[int]:
    return array("q", [(seed * 7919 + 31 * position) % 251 for position in range(length)])


def staggered(slots: int, length: int = 10, page: int = 1) -> array[int]:
    """A prompt whose first round comes so many slots early."""
    prompts = (text(length, seed) for seed in count())
    return next(prompt for prompt in prompts if stagger_slots(SETTINGS, prompt, page) == slots)


class Life:
    """A request, its tokens, the aliases of its server, and how many slots it has in use."""

    def __init__(
        self, prompt: array[int] | None = None, page: int = 1, mark: Iterable[int] = ()
    ) -> None:
        self.store, self.length, self.output = AliasStore(9), 0, array("q")
        self.prompt = staggered(0) if prompt is None else prompt
        mark = array("q", mark)
        self.request = Request.queued("rid", self.prompt, SETTINGS, page, mark)

    @property
    def tokens(self) -> array[int]:
        return self.prompt + self.output

    @property
    def rest(self) -> int:
        """Tokens that are still to be prefilled."""
        return len(self.tokens) - self.length - self.request.delta

    def history(self, start: int, end: int, first_slot: int, last_slot: int) -> Alias:
        """Another request has compressed these tokens into these slots."""
        chain = self.store.extend(Chain(), [(start, end, first_slot, last_slot)])
        return self.store.add(self.request.lookup, self.tokens, chain, None)

    def match(self, alias: Alias | None = None, slots: int = 0) -> None:
        self.request.rematching()
        self.request.matched(alias)
        self.length = max(slots, self.request.chain.last_slot)

    def prefill(self, most: int = 1000, detached: bool = True) -> None:
        """The next chunk."""
        request = self.request
        if request.stays_out_of_tree and request.is_due(self.length):
            self.length -= request.evicted()
            request.chunked(self.output)
        chunk = request.tokens_until_round(self.length) if request.resumed else None
        size = min(most, self.rest, self.rest if chunk is None else chunk)
        assert size > 0, "it would never end"
        assert len(request.regions) <= 2, "one for thinking, one for the answer"
        self.length += size
        request.prefilled(self.length, self.output, detached)

    def prefill_all(self) -> None:
        while self.rest:
            self.prefill()

    def decode(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.output.append(token)
            self.request.decoded(self.length, self.output)
            if self.request.is_due(self.length):
                self.length -= self.request.evicted()
            self.length += 1

    def retract(self, token: int | None = 5, held: bool = True) -> Alias | None:
        """Before the KV of `token` is there; the prefix cache keeps all its slots or none."""
        if token is not None:
            self.output.append(token)
        request, alias = self.request, None
        spans = [region.span for region in request.compressed]
        if spans:
            chain, slots = self.store.extend(request.chain, spans), self.length if held else 0
            known = request.history
            alias = self.store.remember(request.lookup, self.tokens, chain, known, slots)
        request.retracted(self.length, self.output, alias)
        self.length = 0
        return alias


def running(outputs: int, **kwargs: Any) -> Life:
    """A request that decodes; the KV of so many output tokens is there."""
    life = Life(**kwargs)
    life.match()
    life.prefill()
    life.decode([5] * outputs)
    return life


def left_behind() -> tuple[Life, Alias]:
    """Retracted behind a round, with its 54 tokens in 34 slots."""
    life = running(44)
    alias = life.retract()
    assert alias is not None
    return life, alias


def answers(life: Life) -> dict[str, Any]:
    """What each question about the request says."""
    request, length = life.request, life.length
    calls: dict[str, tuple[Any, ...]] = {
        "resident": (length,),
        "slots_to_come": (length, 50),
        "tokens_until_round": (length,),
        "most_slots": (life.output,),
        "report": (length,),
    }
    names = ("chain", "delta", "compressed", "found_own", "stays_out_of_tree")
    return {
        **{name: getattr(request, name) for name in names},
        **{name: getattr(request, name)(*given) for name, given in calls.items()},
        "histories": list(request.histories(life.store, life.tokens)),
        "is_due": bool(request.regions) and request.is_due(length),
        "is_own": request.left is not None and request.is_own(request.left.alias),
    }


def state(request: Request) -> dict[str, Any]:
    """Its fields, except for what its lookup keeps so as not to work it out twice."""
    now = {each.name: getattr(request, each.name) for each in fields(request)}
    now["lookup"] = request.lookup.scope
    now["regions"] = [replace(region) for region in request.regions]
    if request.left:
        now["left"] = replace(request.left, regions=[replace(r) for r in request.left.regions])
    return now
