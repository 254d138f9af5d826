"""After many short requests every slot is free or cached, by what an operator can read.

`/v1/loads` counts the slots of the pool that are neither free nor cached and unlocked: none, once
the server is idle. A prompt as long as the pool then shows that they can really be had.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal

import requests

from bench.server import Server

from .client import at_once
from .questions import Questions
from .results import Result, need

REQUESTS, AT_ONCE = 200, 24
SHORTEST, LONGEST = 4, 130
# Chunks of its output that an aborted request has sent.
ABORTED_AFTER = 6
IDLE_TIMEOUT_S = 30.0
# What the last prompt leaves of the pool: for its output, in whole pages.
SPARE = 64
Ending = Literal["whole", "aborted", "disconnected"]


@dataclass(frozen=True)
class Short:
    """A request: token ids, output length and how it ends."""

    prompt: list[int]
    tokens: int
    ending: Ending


def check(server: Server, questions: Questions) -> Result:
    before = server.kv_policy()
    endings = at_once(lambda short: run(server, short), mixture(questions), AT_ONCE)
    load = idle(server)
    used, size = load["num_used_tokens"], load["max_total_num_tokens"]
    evicted = server.kv_policy()["requests_evicted"] - before["requests_evicted"]
    longest = server.generate(
        input_ids=random.Random(0).choices(range(1, 200), k=size - SPARE),
        sampling_params={"max_new_tokens": 1},
    )
    cut = endings.count("aborted") + endings.count("disconnected")
    return Result(
        [
            need(
                "free and cached slots are the whole pool", f"{used} of {size} are not", used == 0
            ),
            need(
                f"some of {len(endings)} requests are evicted from, some aborted",
                f"{evicted}, {cut}",
                evicted > 0 and cut > 0,
            ),
            need(
                "a prompt of nearly as many tokens then fits",
                f"{longest['meta_info']['prompt_tokens']} tokens",
                len(longest["output_ids"]) == 1,
            ),
            need("SGLang reports no leak", "its log", "leak" not in server.log.read_text().lower()),
        ],
        {"endings": {kind: endings.count(kind) for kind in set(endings)}, "evicted": evicted},
    )


def mixture(questions: Questions) -> list[Short]:
    """Half of them over shared prefixes, a sixth aborted, a sixth left by the client."""
    rng = random.Random("pool")
    shared = [questions(number)[:80] for number in range(3)]
    endings: tuple[Ending, ...] = ("whole", "whole", "whole", "whole", "aborted", "disconnected")
    return [
        Short(
            [*(rng.choice(shared) if rng.random() < 0.5 else []), *_own(rng)],
            rng.randrange(SHORTEST, LONGEST),
            rng.choice(endings),
        )
        for _ in range(REQUESTS)
    ]


def _own(rng: random.Random) -> list[int]:
    return rng.choices(range(1, 200), k=rng.randrange(2, 60))


def run(server: Server, short: Short) -> Ending:
    """Send it, and end it; returns how it ended, "whole" if it was faster than its end."""
    rid = uuid.uuid4().hex
    body: dict[str, Any] = {
        "input_ids": short.prompt,
        "sampling_params": {"max_new_tokens": short.tokens, "ignore_eos": True},
        "rid": rid,
        "stream": True,
    }
    cut = False
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=600) as response:
        response.raise_for_status()
        for count, info in enumerate(_chunks(response)):
            if short.ending == "whole" or count != ABORTED_AFTER:
                cut = (info["finish_reason"] or {}).get("type") == "abort"
            elif short.ending == "disconnected":
                return short.ending
            else:
                server.post("/abort_request", rid=rid)
    return "aborted" if cut else "whole"


def _chunks(response: requests.Response) -> Any:
    """`meta_info` of each chunk of a stream."""
    for line in response.iter_lines():
        text = line.removeprefix(b"data: ")
        if line.startswith(b"data: ") and text != b"[DONE]":
            yield json.loads(text)["meta_info"]


def idle(server: Server) -> dict[str, Any]:
    """The server's load once nothing runs and no slot is in use, or after IDLE_TIMEOUT_S."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        load: dict[str, Any] = requests.get(f"{server.url}/v1/loads", timeout=60).json()["loads"][0]
        busy = load["num_running_reqs"] or load["num_waiting_reqs"] or load["num_used_tokens"]
        if not busy or time.monotonic() > deadline:
            return load
        time.sleep(0.2)
