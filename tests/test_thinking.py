"""The end of thinking: who marks it, and at which step the region before it is closed."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_tri.aliases import AliasStore, Lookup
from sglang_tri.config import KvPolicyConfig
from sglang_tri.patches import active, thinking
from sglang_tri.rounds import RequestState


class Tokenizer:
    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


def scheduler(ids: list[int] | None, tokenizer: Tokenizer | None, template: Any = None) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(think_end_ids=ids),
        tokenizer=tokenizer,
        server_args=SimpleNamespace(chat_template=template),
    )


def test_who_marks_it(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ reasoning }}[/THINK]{{ answer }}")
    marking = Tokenizer("<think>{{ reasoning }}</think>{{ answer }}")
    assert thinking.end_ids(scheduler([7, 8], marking)) == array("q", [7, 8])
    assert thinking.end_ids(scheduler(None, marking)) == array("q", list(b"</think>"))
    given = thinking.end_ids(scheduler(None, marking, str(template)))
    assert given == array("q", list(b"[/THINK]"))
    for tokenizer in (None, Tokenizer(None), Tokenizer("{{ answer }}")):
        assert not thinking.end_ids(scheduler(None, tokenizer))


@pytest.fixture
def mark() -> array[int]:
    found = array("q", [901, 902, 901, 903])
    unused: Any = None
    active.activate(active.Active(unused, unused, AliasStore(1), found))
    return found


def request(reuse: str = "continuation") -> tuple[Any, RequestState]:
    settings = KvPolicyConfig(policy="triattention", reuse=reuse)
    req = SimpleNamespace(origin_input_ids=array("q", [1] * 10), output_ids=array("q"))
    return req, RequestState("rid", settings, Lookup(None))


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_closed_once_and_in_time(mark: array[int], ahead: int) -> None:
    """`ahead`: output tokens that are known and whose KV is not there yet."""
    req, state = request()
    outputs = [5, 901, 902, *mark, 6, 7, *mark, 8]
    closed = []
    for known in range(1, len(outputs) + 1):
        req.output_ids = array("q", outputs[:known])
        length = 10 + known - ahead
        if thinking.ends(req, state, length):
            closed.append(length - 10)
    assert closed == [3 + len(mark)]


def test_only_where_it_is_of_use(mark: array[int]) -> None:
    req, state = request("prompt")
    req.output_ids = mark
    assert not thinking.ends(req, state, 10 + len(mark))


def test_not_once_it_is_part_of_the_prompt(mark: array[int]) -> None:
    """A retracted request goes on behind the end of its thinking, beyond eviction already."""
    req, state = request()
    req.output_ids = array("q", [5, *mark, 6])
    assert not thinking.ends(req, state, 10 + len(req.output_ids))
    assert not thinking.ends(req, state, 10 + 5)
