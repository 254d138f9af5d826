"""What a request may ask of its sampling holds over retractions, and so does stripped reasoning."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from bench.models.tiny import VOCAB
from bench.simulator.conversation import Conversation
from bench.simulator.oracle import Oracle
from bench.simulator.registry import make_policy
from bench.simulator.trace import Replay
from tests.client import Answer, Ask, recorded_rounds, send, send_all, tokens_of
from tests.conftest import Running
from tests.probing import ask
from tests.test_fuzz import computed_twice
from tests.test_serving import wait_idle

PAGE_1 = pytest.mark.parametrize("server", ["fuzz-page1"], indirect=True)
PAGE_4 = pytest.mark.parametrize("server", ["fuzz-page4"], indirect=True)
SETTINGS: dict[str, Any] = {"budget": 20, "interval": 16}
AT_ONCE, LENGTH, ATTEMPTS = 6, 130, 8

Shift = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Limits:
    """What a request asks of its sampling.

    Attributes:
        shift: what is added to the logits of its n-th output token.
        extra: sampling parameters.
        fields: what stands beside them in the request.
    """

    shift: Shift
    extra: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


def only(characters: str) -> np.ndarray:
    shift = np.full(VOCAB, -np.inf)
    shift[tokens_of(characters)] = 0
    return shift


def but(tokens: Sequence[int]) -> np.ndarray:
    shift = np.zeros(VOCAB)
    shift[list(tokens)] = -np.inf
    return shift


def pattern(first: str, repeated: Sequence[str]) -> Shift:
    """`first`, then one character of each of the `repeated` sets, over and over."""

    def shift(number: int) -> np.ndarray:
        place = number - len(first)
        return only(first[number] if place < 0 else repeated[place % len(repeated)])

    return shift


def forced(text: str, at: int, never: Sequence[int] = ()) -> Limits:
    """`text` is said from output token `at` on, by the tests' own logit processor."""
    ids = tokens_of(text)

    def shift(number: int) -> np.ndarray:
        said = 0 <= number - at < len(ids)
        return only(text[number - at]) if said else but(never)

    params = {"at": at, "ids": ids, "never": list(never)}
    fields = {"custom_logit_processor": processor(b"cforced_text\nForcedText\n.")}
    return Limits(shift, {"custom_params": params}, fields)


def processor(pickled: bytes) -> str:
    """A logit processor that the server imports by its name."""
    return json.dumps({"callable": pickled.hex()})


def biased(biases: dict[int, float]) -> Limits:
    shift = np.zeros(VOCAB)
    shift[list(biases)] = list(biases.values())
    extra = {"logit_bias": {str(token): bias for token, bias in biases.items()}}
    return Limits(lambda _: shift, extra)


LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
ITEM = [LETTERS, LETTERS, " ", DIGITS, ";"]
ITEM_EBNF = '([a-z] [a-z] " " [0-9] ";")'
SCHEMA = {"type": "array", "items": {"enum": list(LETTERS)}, "minItems": LENGTH}
DISALLOWED = tokens_of(LETTERS)
LIMITS = {
    "logit_bias": biased({ord("a"): 3.0, ord("b"): 2.0, ord("3"): -4.0}),
    "regex": Limits(pattern("", ITEM), {"regex": f"([a-z]{{2}} [0-9];){{{LENGTH}}}"}),
    "ebnf": Limits(pattern("=", ITEM), {"ebnf": f'root ::= "=" {ITEM_EBNF}{{{LENGTH}}}'}),
    "json_schema": Limits(
        pattern("[", ['"', LETTERS, '"', ","]), {"json_schema": json.dumps(SCHEMA)}
    ),
    "processor": Limits(
        lambda _: but(DISALLOWED),
        {"custom_params": {"token_ids": DISALLOWED}},
        {"custom_logit_processor": DisallowedTokensLogitsProcessor.to_str()},
    ),
    "processor with a state": forced("the same words", 70, tokens_of(DIGITS)),
}


def expected(judged: Replay, shift: Shift) -> np.ndarray:
    """The log-probabilities of a judged output under what was asked of its sampling."""
    assert judged.logits is not None
    logits = judged.logits + [shift(number) for number in range(len(judged.logits))]
    best = logits.max(axis=1)
    total = best + np.log(np.exp(logits - best[:, None]).sum(axis=1))
    chosen: np.ndarray = logits[np.arange(len(logits)), judged.output_ids] - total
    return chosen


def retracted(server: Running, answers: Sequence[Answer]) -> list[Answer]:
    """Those that were retracted, and computed no token anew that a round had passed."""
    resumed = ask(server.probe)["resumed"]
    for answer in answers:
        assert len(resumed.get(answer.rid, [])) == answer.meta["num_retractions"]
    return [
        answer
        for answer in answers
        if answer.rid in resumed
        and not any(computed_twice(server, answer, *found) for found in resumed[answer.rid])
    ]


def conversation(server: Running) -> Conversation:
    oracle = Oracle(server.model, server.stats)
    return oracle.conversation(make_policy("triattention", **SETTINGS), server.setup.page_size)


def exact(
    server: Running,
    talk: Conversation,
    answer: Answer,
    shift: Shift = lambda _: np.zeros(VOCAB),
    closes: tuple[int, ...] = (),
) -> None:
    """The oracle, which was never interrupted, gives the answer the same log-probabilities."""
    cached = answer.meta["cached_tokens"] if talk.length else 0
    recorded = recorded_rounds(server.trace, answer.rid)
    judged = talk.turn(
        answer.ask.prompt, answer.ids, cached, recorded, closes=closes, keep_logits=True
    )
    assert answer.meta["kv_policy"]["rounds"] - len(judged.rounds) in (0, 1)
    assert answer.error(expected(judged, shift)) < 1e-4


@PAGE_1
@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_sampling_hold_over_retraction(server: Running, name: str) -> None:
    limits, verified = LIMITS[name], 0
    for attempt in range(ATTEMPTS):
        asks = [
            Ask(
                tokens_of(f"{attempt} {number} {name}"),
                LENGTH + 11 * attempt,
                {**SETTINGS, "reuse": ("continuation", "prompt")[number % 2]},
                1.0,
                limits.extra,
                limits.fields,
            )
            for number in range(AT_ONCE)
        ]
        for answer in retracted(server, send_all(server, asks)):
            exact(server, conversation(server), answer, limits.shift)
            verified += 1
        if verified >= 3:
            return
    pytest.fail(f"only {verified} retracted requests could be judged")


MARK, THINKING = "</think>", 80
ENDS = (THINKING + len(MARK),)
THINKS = forced(MARK, THINKING)


def thinks(prompt: list[int], tokens: int) -> Ask:
    """A request to a reasoning model: the tiny one is told when its reasoning ends."""
    fields = {**THINKS.fields, "require_reasoning": True}
    return Ask(prompt, tokens, SETTINGS, 1.0, THINKS.extra, fields)


@PAGE_4
def test_stripped_reasoning_over_retraction(server: Running) -> None:
    """It goes on from compressed history, and nothing of it enters the tree."""
    verified = 0
    for attempt in range(ATTEMPTS):
        begin = [tokens_of(f"{attempt} {number} Begin.") for number in range(AT_ONCE)]
        firsts = send_all(server, [Ask(prompt, 60, SETTINGS, 1.0) for prompt in begin])
        histories = [first.ask.prompt + first.ids for first in firsts]
        tokens = LENGTH + 40 + 11 * attempt
        asks = [thinks([*history, *tokens_of(" Think!")], tokens) for history in histories]
        answers = send_all(server, asks)
        judged = {answer.rid for answer in retracted(server, answers)}
        for first, answer in zip(firsts, answers, strict=True):
            if answer.rid in judged and not first.meta["num_retractions"]:
                talk = conversation(server)
                exact(server, talk, first)
                assert answer.meta["kv_policy"]["history"] == "compressed"
                exact(server, talk, answer, THINKS.shift, ENDS)
                next_turns(server, talk, answer)
                verified += 1
        wait_idle(server)
        if verified >= 2:
            return
    pytest.fail(f"only {verified} retracted requests could be judged")


def next_turns(server: Running, talk: Conversation, answer: Answer) -> None:
    """With the reasoning and without it: both are computed anew behind the prompt."""
    prompt = answer.ask.prompt
    for said in (answer.ids, answer.ids[ENDS[0] :]):
        following = send(server, Ask([*prompt, *said, *tokens_of(" Next.")], 60, SETTINGS, 1.0))
        assert following.meta["kv_policy"]["history"] == "compressed"
        assert abs(following.meta["cached_tokens"] - len(prompt)) < server.setup.page_size
        exact(server, talk.fork(), following)
