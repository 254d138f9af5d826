"""Both turns of all chats on one server, held at once through the openai client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import openai

from bench.decode_log import DecodeLog
from bench.server import Server

LOG_STEPS = 5
"""Decode steps for each line of the server's log."""
PENALTY = 1.1
"""Of repetitions. The more, the more words in other tokens than a tokenizer makes of them."""


@dataclass(frozen=True)
class First:
    """The long answer of a chat; counts are tokens.

    Attributes:
        prompt: of the question.
        generated: of the answer.
        slots: KV slots that both hold when the answer ends.
        rounds: of eviction, while it was written.
        text: the answer.
    """

    prompt: int
    generated: int
    slots: int
    rounds: int
    text: str


@dataclass(frozen=True)
class Second:
    """What going on with a chat costs.

    Attributes:
        prompt: tokens of the history and the new question.
        cached: of these, found in the cache.
        first_token_s: seconds until the answer began.
    """

    prompt: int
    cached: int
    first_token_s: float


@dataclass(frozen=True)
class Outcome:
    """All chats on one server.

    Attributes:
        name: of the server.
        first, second: one for each chat.
        seconds: until the first turns of all chats had ended.
        running: requests in a decode step of the first turn, on average.
        retracted: how often a request lost its slots to others, in both turns.
        peak_slots: most KV slots in use, in both turns.
        held: most generated tokens that a request held; 0 on a server without a policy.
        compressed: requests of the second turn that went on from compressed history.
    """

    name: str
    first: list[First]
    second: list[Second]
    seconds: float
    running: float
    retracted: int
    peak_slots: int
    held: int
    compressed: int

    @property
    def tokens_per_second(self) -> float:
        """Of the first turn."""
        return sum(answer.generated for answer in self.first) / self.seconds

    @property
    def cached_share(self) -> float:
        """Of the prompts of the second turn."""
        prompts = sum(answer.prompt for answer in self.second)
        return sum(answer.cached for answer in self.second) / prompts


def hold(
    server: Server,
    name: str,
    questions: Sequence[str],
    follow_up: str,
    tokens: tuple[int, int],
    on_tokens: Callable[[int], object],
) -> Outcome:
    """Both turns of a chat for each of `questions`.

    Args:
        server: a running one, with `--decode-log-interval` of `LOG_STEPS`.
        name: of the server.
        follow_up: what all chats ask in their second turn.
        tokens: the length of all answers in the first turn, and at most in the second.
        on_tokens: called with the number of tokens that were generated, again and again.
    """
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=1800, max_retries=0)
    length, short = tokens
    _answer(client, "Hello", 1)  # What all chats begin with is cached, whichever comes first.
    log = DecodeLog(server.log)
    with _follow(log, on_tokens), ThreadPoolExecutor(len(questions)) as pool:
        began = time.monotonic()
        first = list(pool.map(partial(_answer, client, tokens=length), questions))
        seconds = time.monotonic() - began
    running = fmean(line.running for line in log.lines)
    histories = [
        _history(question, answer.text, follow_up)
        for question, answer in zip(questions, first, strict=True)
    ]
    before = _report(server).get("alias_hits", 0)
    with _follow(log, on_tokens), ThreadPoolExecutor(len(questions)) as pool:
        second = list(pool.map(partial(_go_on, client, tokens=short), histories))
    report = _report(server)
    return Outcome(
        name,
        first,
        second,
        seconds,
        running,
        log.retracted,
        log.peak_slots,
        held=report.get("resident_generated_max", 0),
        compressed=report.get("alias_hits", 0) - before,
    )


def _report(server: Server) -> dict[str, Any]:
    """The policy's; empty on a server without one."""
    report: dict[str, Any] = server.internal_state().get("kv_policy", {})
    return report


@contextmanager
def _follow(log: DecodeLog, on_tokens: Callable[[int], object]) -> Iterator[None]:
    """Tell `on_tokens` as the server logs decode steps."""
    stop = threading.Event()

    def read() -> None:
        on_tokens(sum(line.running * LOG_STEPS for line in log.read_new()))

    def watch() -> None:
        while not stop.wait(0.5):
            read()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        read()


def _answer(client: openai.OpenAI, question: str, tokens: int) -> First:
    """Greedy, without many repetitions, and as long as it may be: servers must do equal work."""
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        extra_body={"min_tokens": tokens, "repetition_penalty": PENALTY, "return_meta_info": True},
    )
    choice = answer.choices[0]
    info: dict[str, Any] = choice.meta_info  # type: ignore[attr-defined]
    prompt, generated = info["prompt_tokens"], info["completion_tokens"]
    policy = info.get("kv_policy", {})
    slots = policy.get("resident_slots", prompt + generated)
    text = choice.message.content or ""
    return First(prompt, generated, slots, policy.get("rounds", 0), text)


def _history(question: str, answer: str, follow_up: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": follow_up},
    ]


def _go_on(client: openai.OpenAI, history: list[dict[str, str]], tokens: int) -> Second:
    """Needs `--enable-cache-report`: a stream has no meta_info."""
    began = time.monotonic()
    first_token_s, usage = None, None
    request: dict[str, Any] = {"messages": history, "max_tokens": tokens, "temperature": 0}
    for chunk in client.chat.completions.create(
        model="default", stream=True, stream_options={"include_usage": True}, **request
    ):
        usage = chunk.usage or usage
        if first_token_s is None and chunk.choices and chunk.choices[0].delta.content:
            first_token_s = time.monotonic() - began
    assert usage is not None
    details = usage.prompt_tokens_details  # Absent when no token was cached.
    cached = (details.cached_tokens or 0) if details else 0
    return Second(usage.prompt_tokens, cached, first_token_s or time.monotonic() - began)
