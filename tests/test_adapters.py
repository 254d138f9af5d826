"""LoRA adapters over one text, at page size 16: each has compressed history of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sglang.srt.lora.lora_registry import LoRARef

from bench.models.tiny import make_model
from bench.simulator.oracle import Oracle
from tests.adapters import make_adapter, merge
from tests.client import Answer, send, send_all
from tests.conftest import Running, Servers
from tests.test_conversations import POLICIES, Talk, exact, history, whole_pages

SERVED = pytest.mark.parametrize("server", ["lora-page16"], indirect=True)
NAMES = (None, "a", "b")
LONG = 160
LEAST_ROUNDS = 3  # At 80, 112 and 144 tokens: budget and interval are rounded up to pages.

Oracles = dict[str | None, Oracle]


@pytest.fixture(scope="module")
def oracles(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Oracles:
    """One for the model and one for each adapter, with the statistics of the model alone."""
    running = servers.get("lora-page16")
    model, root = running.model, tmp_path_factory.mktemp("merged")
    made: Oracles = {None: Oracle(model, running.stats)}
    for name in ("a", "b"):
        merged = merge(model, servers.adapter(running.setup.kind, name), root / name)
        made[name] = Oracle(merged, running.stats)
    return made


def talk(
    server: Running,
    oracles: Oracles,
    text: str,
    adapter: str | None,
    policy: dict[str, Any] | None = None,
) -> Talk:
    body = {} if adapter is None else {"lora_path": adapter}
    return Talk(server, text, policy, oracles[adapter], **body)


def check(one: Talk, answer: Answer, kept: str) -> None:
    """The answer is the oracle's, has been evicted from, and begins behind such a history."""
    exact(one.judge(answer), answer)
    assert answer.meta["kv_policy"]["rounds"] >= LEAST_ROUNDS
    assert history(answer) == kept


@SERVED
def test_in_one_batch(server: Running, oracles: Oracles) -> None:
    """The same prompt under both adapters and under none, turn after turn."""
    talks = [talk(server, oracles, "shared", name) for name in NAMES]
    for turn in range(3):
        left = [len(one.tokens) for one in talks]
        answers = send_all(server, [one.ask(f" Question {turn}.", LONG) for one in talks])
        for one, tokens, answer in zip(talks, left, answers, strict=True):
            check(one, answer, "compressed" if turn else "exact")
            missing = tokens - answer.meta["cached_tokens"]
            assert not turn or missing <= server.setup.page_size
        assert len({tuple(answer.ids) for answer in answers}) == len(NAMES)
    assert "#running-req: 3" in server.server.log.read_text()


@SERVED
def test_every_mode(server: Running, oracles: Oracles) -> None:
    """Other policies and budgets that are no whole pages, under different adapters."""
    talks = [
        talk(server, oracles, f"mode {index}", NAMES[index % len(NAMES)], policy)
        for index, policy in enumerate(POLICIES)
    ]
    for kept in ("exact", "compressed"):
        answers = send_all(server, [one.ask(" Go on.", LONG) for one in talks])
        for one, answer in zip(talks, answers, strict=True):
            check(one, answer, kept)


@SERVED
def test_one_text_under_each(server: Running, oracles: Oracles) -> None:
    """What one adapter has made of a text is found under it alone, by whoever sends the text."""
    first = talk(server, oracles, "passed on", "a")
    check(first, send(server, first.ask("Begin.", LONG)), "exact")
    said = first.tokens
    others = [talk(server, oracles, "passed on", name) for name in ("b", None)]
    for other in others:
        other.tokens = said
        answer = send(server, other.ask(" Next.", LONG))
        assert answer.meta["cached_tokens"] == 0
        check(other, answer, "exact")
    for one in (first, *others):
        left = len(one.tokens)
        answer = send(server, one.ask(" Next.", LONG))
        check(one, answer, "compressed")
        assert answer.meta["cached_tokens"] >= whole_pages(server, left - 1)


@SERVED
def test_a_key_that_spells_an_adapter(server: Running, oracles: Oracles, servers: Servers) -> None:
    """Adapters of the command line have ids that anybody can work out."""
    first = talk(server, oracles, "spelled", "a")
    check(first, send(server, first.ask("Begin.", LONG)), "exact")
    spelled = LoRARef.deterministic_id("a", str(servers.adapter("qwen3", "a")))
    other = Talk(server, "spelled", oracle=oracles[None], extra_key=spelled)
    other.tokens = first.tokens
    answer = send(server, other.ask(" Next.", LONG))
    assert answer.meta["cached_tokens"] == 0
    check(other, answer, "exact")


@SERVED
def test_another_adapter_of_that_name(server: Running, oracles: Oracles, servers: Servers) -> None:
    """An adapter that is loaded anew is another one: nothing goes on from the old one's KV."""
    before = talk(server, oracles, "renewed", "b")
    check(before, send(server, before.ask("Begin.", LONG)), "exact")
    load(server, "b", servers.adapter("qwen3", "a"))
    after = Talk(server, "renewed", oracle=oracles["a"], lora_path="b")
    after.tokens = before.tokens
    answer = send(server, after.ask(" Next.", LONG))
    assert answer.meta["cached_tokens"] == 0
    check(after, answer, "exact")
    load(server, "b", servers.adapter("qwen3", "b"))


def load(server: Running, name: str, path: Path) -> None:
    """Put the adapter in `path` in the place of the one that is served as `name`."""
    for action, body in (("unload", {}), ("load", {"lora_path": str(path)})):
        response = server.server.post(f"/{action}_lora_adapter", lora_name=name, **body)
        assert response.json()["success"], response.text


def test_same_bytes_every_time(tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path / "model")
    one, again, other = (
        make_adapter(name, model, tmp_path / folder)
        for name, folder in (("a", "one"), ("a", "again"), ("b", "other"))
    )
    for path in one.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
        assert path.read_bytes() != (other / path.name).read_bytes()
