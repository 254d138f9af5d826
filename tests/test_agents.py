"""The benches of agents, without a server: tools, prompts, goals, tables."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import llguidance
import pytest
from transformers import PreTrainedTokenizerBase

from bench.agent import frontend
from bench.agent.answers import Answer
from bench.agent.loops import REASONING, TOOL_CALL
from bench.agent.prompt import TEMPLATE, THINK_END, after_call, messages, rendered, system_prompt
from bench.agent.report import (
    CONTINUATION,
    PROMPT,
    RADIX_OFF,
    RECENT,
    STOCK,
    Outcome,
    arm_table,
    judge,
    turn_table,
    waits,
)
from bench.agent.tools import CALL_SCHEMA, LONGEST_CALL, TOOLS, execute
from bench.agents import check_settings
from bench.goal import Goal
from bench.server import Endpoint

SYSTEM = "Use tools."
SHARED, TASK, THOUGHT, CALL, RESULT = 100, 10, 1000, 20, 8


def calls_of_a_random_model(number: int) -> list[str]:
    """Calls that the grammar engine lets through, each token chosen at random."""
    rng = random.Random(0)
    tokenizer = llguidance.LLTokenizer("byte")
    compact = {"whitespace_flexible": False}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(CALL_SCHEMA), compact)
    calls = []
    for _ in range(number):
        matcher, tokens = llguidance.LLMatcher(tokenizer, grammar), []
        while not matcher.is_stopped():
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            tokens.append(rng.choice([t for t in range(tokenizer.vocab_size) if mask >> t & 1]))
            matcher.consume_token(tokens[-1])
        calls.append(tokenizer.decode_str(tokens))
        assert len(tokens) < LONGEST_CALL
    return calls


def test_every_call_that_the_grammar_allows_can_be_executed() -> None:
    calls = calls_of_a_random_model(300)
    assert {json.loads(call)["name"] for call in calls} == {tool.__name__ for tool in TOOLS}
    for call in calls:
        assert json.loads(execute(call))
        assert "\\" not in call


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("calculate", {"operation": "subtract", "a": 3, "b": 5}, {"result": -2}),
        ("count_text", {"text": "ab a b"}, {"characters": 6, "words": 3, "letters": 2}),
        ("shift_date", {"month": 2, "days": 28}, {"date": "2026-03-01", "weekday": "Sunday"}),
    ],
)
def test_tools_compute(name: str, arguments: dict[str, Any], result: dict[str, Any]) -> None:
    call = json.dumps({"name": name, "arguments": arguments})
    assert json.loads(execute(call)) == result


@pytest.mark.parametrize("call", ["no JSON", '{"name":"execute","arguments":{"call":"1"}}'])
def test_other_calls_are_refused(call: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting value|not enough values"):
        execute(call)


def test_system_prompt_describes_all_tools_and_is_long_enough() -> None:
    short, long = (system_prompt(len, least) for least in (0, 4000))
    assert len(long) >= 4000
    assert long.startswith(short)
    assert all(f"\n{tool.__name__}: {tool.__doc__}\n" in short for tool in TOOLS)


def test_template_writes_what_was_generated(tokenizer: PreTrainedTokenizerBase) -> None:
    """Through messages an agent's history is the text that it sent and got through ids."""
    call, result = '{"name":"x"}', '{"y": 1}'
    history = messages(SYSTEM, 1)
    opening = rendered(history)
    assert rendered_by(tokenizer, history) == opening
    history += [
        {"role": "assistant", "reasoning_content": "Hm. ", "content": call},
        {"role": "tool", "content": result},
    ]
    sent = opening + "Hm. " + THINK_END + call + after_call(result)
    assert rendered_by(tokenizer, history) == sent


def test_template_drops_reasoning_of_answered_questions(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    answer = {"role": "assistant", "reasoning_content": "Hm.", "content": "Yes."}
    text = rendered_by(
        tokenizer, [*messages(SYSTEM, 1), answer, {"role": "user", "content": "Why?"}]
    )
    assert "Hm." not in text
    assert "Yes." in text


def rendered_by(tokenizer: PreTrainedTokenizerBase, history: list[dict[str, str]]) -> str:
    text = tokenizer.apply_chat_template(
        history, chat_template=TEMPLATE.read_text(), tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from bench.models.tiny import make_model

    return AutoTokenizer.from_pretrained(make_model("qwen3", tmp_path_factory.mktemp("model")))


def conversation(path: str, more: int = 0, seconds: float = 1.0) -> list[Answer]:
    """Two turns of one agent; later requests prefill `more` tokens than are new."""
    answers, length = [], 0
    for turn, kind, new, generated in (
        (1, REASONING, SHARED + TASK, THOUGHT),
        (1, TOOL_CALL, 1, CALL),
        (2, REASONING, RESULT, THOUGHT),
        (2, TOOL_CALL, 1, CALL),
    ):
        cached = length - more if length else SHARED
        info = {
            "prompt_tokens": length + new,
            "cached_tokens": cached,
            "completion_tokens": generated,
            "request_received_ts": 0.0,
            "prefill_finished_time": seconds,
            "kv_policy": {"rounds": 2, "evicted_tokens": 77},
        }
        answers.append(Answer.of("", info, path=path, turn=turn, kind=kind, known=length))
        length += new + generated
    return answers


def outcome(name: str, more: int = 0, seconds: float = 1.0) -> Outcome:
    answers = conversation("exact", more, seconds) + conversation("chat", more, seconds)
    return Outcome(name, answers, 8.0, 1234)


def outcomes(**changes: Outcome) -> list[Outcome]:
    """All arms as they should be, but for `changes`."""
    good = {name: outcome(name) for name in (PROMPT, CONTINUATION, STOCK, RADIX_OFF)}
    good[CONTINUATION] = outcome(CONTINUATION, 0, 0.2)
    return list((good | changes).values())


def about(goals: list[Goal], *words: str) -> Goal:
    (found,) = (goal for goal in goals if all(word in goal.text for word in words))
    return found


def test_all_goals_are_met_where_they_should_be() -> None:
    goals = judge(outcomes(), THOUGHT)
    assert [goal.met for goal in goals] == [True] * 7


def test_prefilling_more_than_recent_misses() -> None:
    few, many = (
        judge(outcomes(continuation=outcome(CONTINUATION, more, 0.2)), THOUGHT)
        for more in (RECENT, RECENT + 1)
    )
    assert about(few, CONTINUATION, "exact", "prefill").met
    exact, chat = (about(many, CONTINUATION, path, "prefill") for path in ("exact", "chat"))
    assert exact.failed
    assert chat.met is False
    assert not chat.failed
    # Three later requests of 1 + 8 + 1 new tokens.
    assert exact.measured == "at most 17 more; 61 prefilled, 10 new in 3 requests"


def test_fewer_hits_of_the_shared_prompt_fail() -> None:
    worse = outcome(CONTINUATION)
    answers = [a if a.known else replace(a, cached=SHARED - 1) for a in worse.answers]
    goals = judge(outcomes(continuation=replace(worse, answers=answers)), THOUGHT)
    assert about(goals, f"{CONTINUATION}:", "shared").failed
    assert about(goals, f"{PROMPT}:", "shared").met


@pytest.mark.parametrize(("seconds", "met"), [(0.2, True), (0.21, False)])
def test_time_to_first_token_is_judged_but_does_not_fail(seconds: float, met: bool) -> None:
    goals = judge(outcomes(continuation=outcome(CONTINUATION, 0, seconds)), THOUGHT)
    goal = about(goals, "first token")
    assert goal.met is met
    assert not goal.failed
    assert goal.measured.startswith(f"{seconds:.2f} x")


def test_short_reasoning_judges_no_times() -> None:
    assert about(judge(outcomes(), THOUGHT - 1), "first token").met is None


def test_waits_add_up_each_turn_after_the_first() -> None:
    assert waits(conversation("exact", seconds=0.5)) == [1.0]


def test_one_server_is_judged_alone() -> None:
    goals = judge([outcome("http://host:1", RECENT + 1)], THOUGHT)
    assert [goal.failed for goal in goals] == [True, False]


def test_goals_say_what_was_measured() -> None:
    assert str(Goal("fast", "2 s", False, False)) == "[MISSED] fast: 2 s"
    assert str(Goal("fast", "2 s", None, False)) == "[not measured] fast: 2 s"


def test_arm_table() -> None:
    """8 answers of 2 x 1020 tokens in 8 s; prompts of 110, 1111, 1139 and 2140 tokens."""
    without = [replace(answer, rounds=0, evicted=0) for answer in outcome(STOCK).answers]
    remote = replace(outcome("http://host:1"), answers=without)
    rows = arm_table([outcome(STOCK), remote]).splitlines()
    assert [" ".join(row.split()) for row in rows] == [
        "arm tokens/s peak slots rounds evicted cached prefilled hits exact hits chat",
        "stock 510 1234 16 616 8960 40 99.6% 99.6%",
        "http://host:1 510 1234 0 0 8960 40 99.6% 99.6%",
    ]


def test_turn_table() -> None:
    answers = [
        replace(answer, first_token_s=second)
        for answer, second in zip(conversation("exact"), (1.0, 2.0, 3.0, 4.0), strict=True)
    ]
    slower = [replace(a, agent=1, first_token_s=2 * a.first_token_s) for a in answers]
    rows = turn_table([replace(outcome(STOCK), answers=answers + slower)]).splitlines()
    assert [" ".join(row.split()) for row in rows[2:4]] == [
        "stock 1 tool call 3000 ms 3900 ms 2220 2 2",
        "stock 2 reasoning 4500 ms 5850 ms 2262 16 16",
    ]


@pytest.mark.parametrize("setting", [{"enable_metrics": False}, {"reasoning_parser": "qwen3"}])
def test_servers_that_cannot_be_measured_are_refused(setting: dict[str, Any]) -> None:
    good = {"enable_metrics": True, "reasoning_parser": None}
    check_settings(good)
    with pytest.raises(SystemExit):
        check_settings(good | setting)


def test_frontend_knows_what_it_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that an earlier request has sent or got is known, also to requests that fork from it."""
    monkeypatch.setattr(frontend, "tokenize", lambda _, prompt, **__: list(prompt.encode()))

    def sent(text: str, reply: str) -> tuple[str, Answer]:
        info = {"prompt_tokens": len(text), "cached_tokens": 0, "completion_tokens": len(reply)}
        times = {"request_received_ts": 1.0, "prefill_finished_time": 2.0}
        return text, Answer.of(reply, info | times)

    record = [sent("abc", "de"), sent("abcdef", "g"), sent("abcdeh", "i"), sent("abcdehij", "")]
    answers = frontend.with_known(Endpoint("http://host:1"), record)
    assert [(answer.known, answer.new) for answer in answers] == [(0, 3), (5, 1), (5, 1), (7, 1)]
