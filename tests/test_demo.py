"""The demo, without a server: what it prints and what it fails for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.chats.checks import problems
from bench.chats.questions import QUESTIONS
from bench.chats.report import excerpts, gain, measured
from bench.chats.turns import First, Outcome, Second

HELD, POOL = 128, 1280
WRITTEN = First(prompt=45, generated=448, slots=160, rounds=11, text="Once.\n\nThe end.")
POLICY = Outcome(
    name="triattention",
    first=[WRITTEN] * 8,
    second=[Second(prompt=510, cached=488, first_token_s=0.5)] * 8,
    seconds=64.0,
    running=8.0,
    retracted=0,
    peak_slots=1200,
    held=HELD,
    compressed=8,
)
STOCK = replace(
    POLICY,
    name="stock",
    first=[replace(WRITTEN, slots=493, rounds=0)] * 8,
    second=[Second(prompt=510, cached=51, first_token_s=4.0)] * 8,
    seconds=128.0,
    running=3.25,
    retracted=2,
    peak_slots=POOL,
    held=0,
    compressed=0,
)


def test_a_demo_as_it_should_be_has_no_problems() -> None:
    assert problems(POLICY, STOCK, HELD, POOL) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"first": [replace(WRITTEN, rounds=0), *[WRITTEN] * 7]},
            "1 of 8 chats had nothing evicted",
        ),
        ({"held": 129}, "a request held 129 generated tokens, more than 128"),
        ({"compressed": 4}, "only 4 of 8 chats went on from compressed history"),
        ({"second": STOCK.second}, "10% of the second turn was cached, not 60%"),
        ({"seconds": 128.0}, "no more tokens/s than stock SGLang"),
        ({"peak_slots": 1281}, "triattention had 1281 slots in use, of 1280"),
    ],
)
def test_what_is_missing_is_a_problem(changes: dict[str, object], problem: str) -> None:
    assert problems(replace(POLICY, **changes), STOCK, HELD, POOL) == [problem]  # type: ignore[arg-type]


def test_stock_has_to_keep_to_the_pool_too() -> None:
    found = problems(POLICY, replace(STOCK, peak_slots=1281), HELD, POOL)
    assert found == ["stock had 1281 slots in use, of 1280"]


def test_table() -> None:
    assert measured(POLICY, STOCK).splitlines() == [
        "                                    triattention      stock",
        "First turn: requests at once, mean           8.0        3.2",
        "  generated tokens/s                        56.0       28.0",
        "  seconds until all had finished              64        128",
        "  KV slots of a chat of 493 tokens           160        493",
        "Second turn: prompt tokens                 4,080      4,080",
        "  of them cached                     3,904 (96%)  408 (10%)",
        "  first token after, median                0.5 s      4.0 s",
        "Both: peak KV slots                        1,200      1,280",
        "  requests retracted                           0          2",
    ]


def test_gain() -> None:
    assert gain(POLICY, STOCK, POOL) == (
        "In the same 1,280 KV slots: 2.0 times the tokens/s; in the second turn the first token "
        "after 0.5 s instead of 4.0 s."
    )


def test_excerpts_are_the_ends_of_both_texts() -> None:
    longer = replace(STOCK, first=[replace(WRITTEN, text="x" * 400 + " is all.")] * 8)
    lines = excerpts("Why?", POLICY, longer, 0, HELD).splitlines()
    assert lines[:4] == [
        "Asked: Why?",
        "triattention, which keeps at most 128 of the 448 tokens it writes, ends:",
        "  | Once.",
        "  | The end.",
    ]
    assert lines[4] == "stock, which keeps all, ends:"
    assert sum(line.count("x") for line in lines[5:]) == 392
    assert lines[-1].endswith("is all.")


def test_no_two_chats_ask_the_same() -> None:
    assert len(set(QUESTIONS)) == len(QUESTIONS)
