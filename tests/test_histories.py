"""Conversations, forks, aborts, retraction and eviction on SGLang's own scheduler, tree and pools.

A state machine plays the users; SGLang's scheduler loop, with the hooks of this project, serves
them with a model that computes digests (`tests/histories`). A plain model that has never heard of
slots says what every request must read. With HISTORIES_EXAMPLES=500 it searches for longer.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sglang_tri import config
from sglang_tri.config import PER_REQUEST, KvPolicyConfig
from sglang_tri.engine import Engine
from sglang_tri.history import Lookup
from sglang_tri.patches import scheduler
from sglang_tri.policies import POLICIES
from tests.histories.asks import (
    ASKS,
    KEYS,
    MARKS,
    OVERRIDES,
    POLICY,
    RARELY,
    SETUPS,
    STEPS,
    Ask,
    Text,
)
from tests.histories.audit import Audit
from tests.histories.book import Book, Request, Store
from tests.histories.hooked import hooked
from tests.histories.loop import FORCE_MISS, LONGEST, ROWS, Loop, Setup
from tests.histories.memory import Memory
from tests.histories.plain import THINK, ByDigest, Plain
from tests.histories.tree import Tree

# The last test asks what happened in all of the others.
pytestmark = pytest.mark.xdist_group("histories")
DEFAULT_EXAMPLES = 8
EXAMPLES = int(os.environ.get("HISTORIES_EXAMPLES", DEFAULT_EXAMPLES))
# What must happen at least, in all histories together. It was about three times as often.
ENOUGH = {
    "hits": 60,
    "longer chains": 10,
    "forks": 15,
    "taken back": 2,
    "rounds in a prefill": 3,
    "chunks behind a span": 5,
    "forgotten histories": 150,
    "stale": 5,
    "diverged in a span": 100,
    "other scopes": 100,
    "histories replaced": 40,
    "slots exchanged": 100,
    "rounds": 700,
    "closed by thinking": 80,
    "evictions": 80,
    "retracted": 25,
    "retracted compressed": 8,
    "retracted before a round ran": 3,
    "preempted": 3,
    "aborts": 20,
    "flushes": 5,
    "new weights": 8,
}
ENOUGH_STEPS = 1500


class Histories(RuleBasedStateMachine):
    """Users of one server."""

    page_size: int
    overlap: bool
    totals: Counter[str]

    @initialize(
        setup=SETUPS,
        mark=MARKS,
        limit=st.sampled_from([2, 1000, 1000]),
        deaf=RARELY,
        collide=RARELY,
    )
    def start(
        self, setup: dict[str, Any], mark: list[int], limit: int, deaf: bool, collide: bool
    ) -> None:
        Lookup.block_hash = staticmethod((lambda content: 1) if collide else hash)
        self.setup = Setup(page_size=self.page_size, overlap=self.overlap, **setup)
        memory = Memory(self.setup.slots + self.page_size, self.page_size)
        self.mark, self.policy = mark, KvPolicyConfig(**POLICY)
        self.loop = Loop(self.setup, self._forward, self._before_decode)
        self.engine = Engine(self.policy, memory.cache, ROWS + 1, think_mark=array("q", mark))
        store, tree = Store(limit, deaf), Tree(self.loop.tree_cache)
        self.engine.aliases = store
        scheduler.activate(scheduler.Active(self.engine, self.loop))
        rows = self.loop.req_to_token_pool.req_to_token
        self.book = Book(self.setup, memory, rows, tree, store)
        self.audit = Audit(self.loop, self.engine, self.book, memory, tree, store)
        self.texts: list[Text] = []
        self.asked: dict[str, Text] = {}
        self.number = 0
        self.sound = True

    def _forward(self, batch: Any) -> list[int]:
        return self.book.forward(batch)

    def _before_decode(self, req: Any) -> None:
        self.book.plan(self.book.requests[req.rid].plain)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """After something happens: note whose slots were released, check everything."""
        self.sound = False
        yield
        for rid, request in list(self.book.requests.items()):
            if request.req.req_pool_idx is None:
                if request.plain.wanted:
                    self._released(rid, request)
                if request.req not in self.loop.waiting_queue:
                    del self.book.requests[rid]
        self.audit()
        self.sound = True

    def _released(self, rid: str, request: Request) -> None:
        req, plain, done = request.req, request.plain, self.book.done
        text = (*req.origin_input_ids, *req.output_ids)
        assert text == (*plain.wanted, *plain.text[len(plain.wanted) :])[: len(text)]
        self.audit.closed(request)
        if req.finished():
            self.audit.report(request)
            self.texts.append(self.asked[rid]._replace(tokens=text))
        else:
            last = self.loop.last_batch
            done["preempted"] += last is not None and last.forward_mode.is_extend()
            done["retracted"] += 1
            done["retracted compressed"] += bool(plain.compressed)
            done["retracted before a round ran"] += plain.fresh
        plain.wanted = ()

    @rule(asks=st.lists(ASKS, min_size=1, max_size=3), steps=STEPS)
    def ask(self, asks: list[Ask], steps: int) -> None:
        """Requests come in, and are served for a while."""
        for ask in asks:
            for _ in range(ask.times):
                self._submit(self._text(ask), ask.most, ask.priority)
        self.run(steps)

    def _text(self, ask: Ask) -> Text:
        """What a request asks for, and how."""
        texts = self._running_texts() if ask.kind == "fork" else self.texts
        if ask.kind == "new" or not texts:
            return Text(ask.system + ask.message, ask.key, ask.override)
        text = texts[-1 - ask.back % len(texts)]
        tokens = list(text.tokens)
        if ask.kind == "again":
            return text._replace(tokens=text.tokens[: text.prompt])
        if ask.kind == "trim":
            del tokens[max(1, len(tokens) - ask.at % 24) :]
        if ask.kind == "change":
            tokens[ask.at % len(tokens)] ^= 32
        tokens += ask.message
        if ask.kind == "key":
            return Text(tuple(tokens), 1 - text.key, text.override)
        override = ask.override if ask.kind == "override" else text.override
        return Text(tuple(tokens), text.key, override)

    def _running_texts(self) -> list[Text]:
        return [
            self.asked[rid]._replace(tokens=(*r.req.origin_input_ids, *r.req.output_ids))
            for rid, r in self.book.requests.items()
        ]

    def _submit(self, text: Text, most: int, priority: int) -> None:
        room = self.setup.slots - 2 * self.page_size - len(text.tokens)
        if room < 1:
            return
        self.number += 1
        rid, key, overrides = f"r{self.number}-", KEYS[text.key], OVERRIDES[text.override]
        req = self.loop.submit(rid, text.tokens, min(most, room), priority, key, overrides)
        wanted = self.policy.with_overrides(overrides)
        plain = Plain(
            text.tokens, wanted if wanted.enabled else None, key, self.mark, self.page_size
        )
        self.book.requests[rid] = Request(req, plain)
        self.asked[rid] = text._replace(prompt=len(text.tokens))

    @precondition(lambda self: not self.loop.idle)
    @rule(steps=STEPS)
    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.loop.idle:
                break
            with self._checked():
                self.loop.step()

    @precondition(lambda self: not self.loop.idle)
    @rule()
    def finish(self) -> None:
        """Let everything end."""
        self.run(ENOUGH_STEPS)
        assert self.loop.idle, "requests wait for ever"
        self.audit.released()

    @precondition(lambda self: self.book.requests)
    @rule(which=st.integers(0, 3), steps=STEPS)
    def abort(self, which: int, steps: int) -> None:
        with self._checked():
            self.loop.abort(list(self.book.requests)[which % len(self.book.requests)])
        self.book.done["aborts"] += 1
        self.run(steps)

    @precondition(lambda self: self.book.requests)
    @rule(how=st.sampled_from(["at a round", "now", "all", "starve"]), steps=STEPS)
    def retract(self, how: str, steps: int) -> None:
        """Whom the scheduler likes to, perhaps before a round; or all; or all but for memory."""
        if how == "at a round":
            for _ in range(20):
                if not self._next_retracted_is_due():
                    self.run(1)
        if how == "starve":
            self._starve()
        else:
            with self._checked():
                self.loop.retract_all() if how == "all" else self.loop.retract()
        self.run(steps)

    def _next_retracted_is_due(self) -> bool:
        running = [req for req in self.loop.running_batch.reqs if not req.finished()]
        order = self.loop.running_batch._get_decode_retraction_order(running, self.loop.server_args)
        return len(running) > 1 and self.book.requests[running[order[-1]].rid].plain.due

    def _starve(self) -> None:
        """Somebody else takes all memory until nobody runs; the last request is aborted."""
        self.loop.evict(LONGEST)
        self.audit.taken = self.loop.take_all()
        while self.loop.running_batch.reqs and not self.loop.chunked_req:
            with self._checked():
                self.loop.step()
        self.loop.give_back(self.audit.taken)
        self.audit.taken = self.audit.taken[:0]

    @precondition(lambda self: bool(self.loop.tree_cache.root_node.children))
    @rule(what=st.sampled_from([3, 10, 30, 100, 10, 30, "flush", "weights"]))
    def forget(self, what: int | str) -> None:
        """Memory pressure from elsewhere; a flush, if the server is idle; or new weights."""
        with self._checked():
            if what == "flush":
                self.book.done["flushes"] += bool(self.loop.flush_cache(empty_cache=False))
            elif what == "weights":
                self.loop.new_weights()
                self.book.outdate()
            else:
                before = self.loop.tree_cache.evictable_size()
                self.loop.evict(int(what))
                self.book.done["evictions"] += self.loop.tree_cache.evictable_size() < before

    def teardown(self) -> None:
        if not hasattr(self, "sound") or not self.sound:
            return
        self.finish()
        self.audit.totals()
        self.totals.update(self.book.done)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """The hooks, and a policy and limits that make histories short."""
    with pytest.MonkeyPatch.context() as patch, hooked():
        patch.setenv(PER_REQUEST, "1")
        patch.setenv(FORCE_MISS, "0")
        patch.setattr(config, "LEAST_RECENT", 4)
        patch.setitem(POLICIES, "triattention", ByDigest)
        patch.setattr(Lookup, "block_hash", Lookup.block_hash)
        logging.disable(logging.WARNING)  # A line for each retraction.
        yield
        logging.disable(logging.NOTSET)


def started(overlap: bool, policy: str, chunk: int = 512, marks: bool = False) -> Any:
    """Users of a server with single slots, for one history in particular."""
    kind = {"page_size": 1, "overlap": overlap, "totals": Counter()}
    users = type("Users", (Histories,), kind)()
    setup = {"slots": 256, "chunk": chunk, "policy": policy, "optimism": 0.1}
    mark = [THINK] if marks else []
    users.start({**setup, "preempts": False, "forces_miss": False}, mark, 1000, False, False)
    return users


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_a_history_lost_in_the_queue(policy: str) -> None:
    """A retracted request waits for memory while its history is evicted: it prefills its tokens."""
    users = started(overlap=False, policy=policy)
    first = Ask("new", 0, tuple(range(32, 38)), (8,), 0, 0, 0, 60, 1, 0)
    users.ask([first, first._replace(message=(9, 10, 11))], 20)
    users.retract("now", 0)
    (waiting,) = users.loop.waiting_queue
    users.audit.taken = users.loop.take_all()
    users.run(1)
    assert (waiting.kv_policy_state.history is not None) or policy == "fcfs"
    users.loop.evict(LONGEST)
    users.loop.give_back(users.audit.taken)
    users.audit.taken = users.audit.taken[:0]
    users.finish()


@pytest.mark.parametrize("overlap", [False, True], ids=["normal", "overlap"])
def test_retracted_when_a_round_is_due(overlap: bool) -> None:
    """The round would come between what it left and its last token: it is prefilled anew."""
    users = started(overlap=overlap, policy="fcfs")
    users.ask([Ask("new", 0, tuple(range(32, 38)), (8,), 0, 0, 0, 60, 1, 0)], 20)
    (request,) = users.book.requests.values()
    while not (request.plain.due and request.plain.rounds > 1):
        users.run(1)
    users.retract("all", 20)
    assert users.book.done["retracted compressed"] == 1
    users.finish()


def test_prefilled_anew_over_the_end_of_thinking() -> None:
    """In a region before it and one behind it: it waits until there is room for both."""
    users = started(overlap=False, policy="fcfs", chunk=8, marks=True)
    users.ask([Ask("new", 0, tuple(range(32, 38)), (11,), 0, 0, 0, 60, 1, 0)], 30)
    (request,) = users.book.requests.values()
    assert request.plain.closed == 1
    users.retract("all", 0)
    users.loop.evict(LONGEST)
    users.audit.taken = users.loop.take_all()
    while not users.loop.running_batch.reqs:
        if users.loop.chunked_req is None:
            users.loop.give_back(users.audit.taken[:1])
            users.audit.taken = users.audit.taken[1:]
            users.loop.running_batch.batch_is_full = False
        users.run(1)
    assert users.book.done["rounds in a prefill"]
    users.loop.give_back(users.audit.taken)
    users.audit.taken = users.audit.taken[:0]
    users.finish()


@pytest.fixture(scope="module")
def totals() -> dict[str, Counter[str]]:
    """How often what happened, by server."""
    return {}


@pytest.mark.parametrize("overlap", [False, True], ids=["normal", "overlap"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_every_request_reads_what_its_own_conversation_left(
    page_size: int, overlap: bool, totals: dict[str, Counter[str]]
) -> None:
    # Hypothesis takes its random numbers from the name.
    name = f"Histories{page_size}{'Overlap' if overlap else 'Normal'}"
    happened: Counter[str] = Counter()
    machine = type(
        name, (Histories,), {"page_size": page_size, "overlap": overlap, "totals": happened}
    )
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )
    totals[name] = happened


def test_the_histories_were_rich(totals: dict[str, Counter[str]]) -> None:
    """What was to be shown did happen, and more than once or twice."""
    if len(totals) < 4 or EXAMPLES < DEFAULT_EXAMPLES:
        pytest.skip("not all histories were played")
    total = sum(totals.values(), Counter())
    print(dict(total))
    assert {name: total[name] for name, least in ENOUGH.items() if total[name] < least} == {}
