"""The end of thinking: who marks it, and at which step the region before it is closed."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_tri.config import KvPolicyConfig
from sglang_tri.patches.versions.v0_5_17.loading import think_mark
from sglang_tri.request.request import Request


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
    assert think_mark(scheduler([7, 8], marking)) == array("q", [7, 8])
    assert think_mark(scheduler(None, marking)) == array("q", list(b"</think>"))
    given = think_mark(scheduler(None, marking, str(template)))
    assert given == array("q", list(b"[/THINK]"))
    for tokenizer in (None, Tokenizer(None), Tokenizer("{{ answer }}")):
        assert not think_mark(scheduler(None, tokenizer))


MARK = array("q", [901, 902, 901, 903])


def thinker(reuse: str = "continuation") -> Request:
    """Ten prompt tokens, and the region behind them open."""
    settings = KvPolicyConfig(policy="triattention", reuse=reuse)
    request = Request.queued("rid", array("q", [1] * 10), settings, 1, MARK)
    request.decoded(10, array("q"))
    return request


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_closed_once_and_in_time(ahead: int) -> None:
    """`ahead`: output tokens that are known and whose KV is not there yet."""
    request = thinker()
    outputs = [5, 901, 902, *MARK, 6, 7, *MARK, 8]
    for known in range(1, len(outputs) + 1):
        request.decoded(10 + known - ahead, array("q", outputs[:known]))
    assert [region.opened - 10 for region in request.regions] == [0, 3 + len(MARK)]


def test_only_where_it_is_of_use() -> None:
    request = thinker("prompt")
    request.decoded(10 + len(MARK), MARK)
    assert len(request.regions) == 1


def test_not_once_it_is_part_of_the_prompt() -> None:
    """A retracted request goes on behind the end of its thinking, beyond eviction already."""
    request = thinker()
    output = array("q", [5, *MARK, 6])
    request.decoded(10 + len(output), output)
    request.decoded(10 + 5, output)
    assert len(request.regions) == 1
