"""The demo, without a server: what it prints and what it fails for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.agent.answers import Answer
from bench.demo import HELD, POOL, QUESTIONS, SHOWN, Outcome, draw, excerpts, measured, problems

WRITTEN = Answer(
    text="Once.\n\nThe end.",
    prompt=45,
    cached=30,
    generated=448,
    first_token_s=0.1,
    rounds=11,
    evicted=333,
    slots=160,
    compressed=False,
)
GONE_ON = replace(WRITTEN, prompt=510, cached=488, first_token_s=0.5, compressed=True)
POLICY = Outcome(
    name="triattention",
    first=[WRITTEN] * 8,
    second=[GONE_ON] * 8,
    seconds=64.0,
    running=8.0,
    retracted=0,
    peak_slots=1200,
    held=HELD,
)
STOCK = replace(
    POLICY,
    name="stock",
    first=[replace(WRITTEN, slots=493, rounds=0)] * 8,
    second=[replace(GONE_ON, cached=51, first_token_s=4.0, compressed=False)] * 8,
    seconds=128.0,
    running=3.25,
    retracted=2,
    peak_slots=POOL,
    held=0,
)


def test_a_demo_as_it_should_be_has_no_problems() -> None:
    assert problems(POLICY, STOCK) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"first": [replace(WRITTEN, rounds=0), *[WRITTEN] * 7]},
            "1 of 8 chats had nothing evicted",
        ),
        ({"held": 129}, "a request held 129 generated tokens, more than 128"),
        (
            {"second": [GONE_ON, replace(GONE_ON, compressed=False)] * 4},
            "only 4 of 8 chats went on from compressed history",
        ),
        (
            {"second": [replace(GONE_ON, cached=51)] * 8},
            "10% of the second turn was cached, not 60%",
        ),
        ({"seconds": 128.0}, "no more tokens/s than stock SGLang"),
        ({"peak_slots": 1281}, "triattention had 1281 slots in use, of 1280"),
    ],
)
def test_what_is_missing_is_a_problem(changes: dict[str, object], problem: str) -> None:
    assert problems(replace(POLICY, **changes), STOCK) == [problem]  # type: ignore[arg-type]


def test_stock_has_to_keep_to_the_pool_too() -> None:
    found = problems(POLICY, replace(STOCK, peak_slots=1281))
    assert found == ["stock had 1281 slots in use, of 1280"]


def test_table() -> None:
    rows = measured(POLICY, STOCK).splitlines()
    assert [" ".join(row.split()) for row in rows[:10]] == [
        "triattention stock",
        "First turn: requests at once, mean 8.0 3.2",
        "generated tokens/s 56.0 28.0",
        "seconds until all had finished 64 128",
        "KV slots of a chat of 493 tokens 160 493",
        "Second turn: prompt tokens 4,080 4,080",
        "of them cached 3,904 (96%) 408 (10%)",
        "first token after, median 0.5 s 4.0 s",
        "Both: peak KV slots 1,200 1,280",
        "requests retracted 0 2",
    ]


def test_gain() -> None:
    assert measured(POLICY, STOCK).splitlines()[-1] == (
        "In the same 1,280 KV slots: 2.0 times the tokens/s; in the second turn the first token "
        "after 0.5 s instead of 4.0 s."
    )


def test_excerpts_are_the_ends_of_both_texts() -> None:
    longer = replace(STOCK, first=[replace(WRITTEN, text="x" * 400 + " is all.")] * 8)
    lines = excerpts(POLICY, longer).splitlines()
    assert lines[:4] == [
        f"Asked: {QUESTIONS[SHOWN]}",
        "triattention, which keeps at most 128 of the 448 tokens it writes, ends:",
        "  | Once.",
        "  | The end.",
    ]
    assert lines[4] == "stock, which keeps all, ends:"
    assert sum(line.count("x") for line in lines[5:]) == 392
    assert lines[-1].endswith("is all.")


def test_no_two_chats_ask_the_same() -> None:
    assert len(set(QUESTIONS)) == len(QUESTIONS)


def test_picture_is_a_png(tmp_path: Path) -> None:
    draw(POLICY, STOCK, "model", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
