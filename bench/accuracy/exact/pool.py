"""After many short requests every slot is free or cached, by what an operator can read.

`/v1/loads` counts the slots of the pool that are neither free nor cached and unlocked: none, once
the server is idle. A prompt as long as the pool then shows that they can really be had.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from typing import Any, NamedTuple

import requests

from bench.accuracy.client import at_once
from bench.server import Server

from .parts import Result, need
from .questions import Questions

REQUESTS, AT_ONCE = 200, 24
# Chunks of its output that an aborted request has sent.
ABORTED_AFTER = 6
IDLE_TIMEOUT_S = 30.0
# What the last prompt leaves of the pool: for its output, in whole pages.
SPARE = 64
# A sixth is aborted, a sixth left by the client.
ENDINGS = ("whole", "whole", "whole", "whole", "aborted", "disconnected")


class Short(NamedTuple):
    """A request: token ids, output length and how it ends."""

    prompt: list[int]
    tokens: int
    ending: str


def check(server: Server, questions: Questions) -> Result:
    before = server.kv_policy()["requests_evicted"]
    endings = at_once(lambda short: run(server, short), mixture(questions), AT_ONCE)
    load = idle(server)
    used, size = load["num_used_tokens"], load["max_total_num_tokens"]
    evicted = server.kv_policy()["requests_evicted"] - before
    prompt = random.Random(0).choices(range(1, 200), k=size - SPARE)
    longest = server.generate(input_ids=prompt, sampling_params={"max_new_tokens": 1})
    cut = len(endings) - endings.count("whole")
    some = f"some of {len(endings)} requests are evicted from, some aborted"
    fits = f"{longest['meta_info']['prompt_tokens']} tokens", len(longest["output_ids"]) == 1
    goals = [
        need("free and cached slots are the whole pool", f"{used} of {size} are not", used == 0),
        need(some, f"{evicted}, {cut}", evicted > 0 and cut > 0),
        need("a prompt of nearly as many tokens then fits", *fits),
        need("SGLang reports no leak", "its log", "leak" not in server.log.read_text().lower()),
    ]
    kinds = {kind: endings.count(kind) for kind in set(endings)}
    return Result(goals, {"endings": kinds, "evicted": evicted})


def mixture(questions: Questions) -> list[Short]:
    """Half of them over shared prefixes."""
    rng = random.Random("pool")
    shared = [questions(number)[:80] for number in range(3)]

    def short() -> Short:
        prefix = rng.choice(shared) if rng.random() < 0.5 else []
        own = rng.choices(range(1, 200), k=rng.randrange(2, 60))
        return Short([*prefix, *own], rng.randrange(4, 130), rng.choice(ENDINGS))

    return [short() for _ in range(REQUESTS)]


def run(server: Server, short: Short) -> str:
    """Send it, and end it; returns how it ended, "whole" if it was faster than its end."""
    rid = uuid.uuid4().hex
    params = {"max_new_tokens": short.tokens, "ignore_eos": True}
    body: dict[str, Any] = {"input_ids": short.prompt, "sampling_params": params}
    body |= {"rid": rid, "stream": True}
    reason: dict[str, Any] = {}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=600) as response:
        response.raise_for_status()
        chunks = (line.removeprefix(b"data: ") for line in response.iter_lines() if line)
        for count, chunk in enumerate(chunk for chunk in chunks if chunk != b"[DONE]"):
            reason = json.loads(chunk)["meta_info"]["finish_reason"] or {}
            if count == ABORTED_AFTER and short.ending == "disconnected":
                return short.ending
            if count == ABORTED_AFTER and short.ending == "aborted":
                server.post("/abort_request", rid=rid)
    return "aborted" if reason.get("type") == "abort" else "whole"


def idle(server: Server) -> dict[str, Any]:
    """The server's load once nothing runs and no slot is in use, or after IDLE_TIMEOUT_S."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        load: dict[str, Any] = requests.get(f"{server.url}/v1/loads", timeout=60).json()["loads"][0]
        busy = load["num_running_reqs"] or load["num_waiting_reqs"] or load["num_used_tokens"]
        if not busy or time.monotonic() > deadline:
            return load
        time.sleep(0.2)
