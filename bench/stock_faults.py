"""What ends SGLang itself, and what a retraction changes in its outputs, with no policy.

`python -m bench.stock_faults` sends each request below to stock SGLang with a tiny model and says
whether the server goes on. `--policy` does the same to a server with a policy.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from bench.machine import machine
from bench.models.tiny import make_model
from bench.server import STOCK_ENVIRONMENT, Server
from bench.table import table

POLICY = ("--kv-policy", "streaming", "--kv-budget", "48", "--kv-interval", "24")
TIMEOUT_S = 20
TEXT = "Once upon a time"


def body(fields: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    """A short request to `/generate` with sampling parameters and fields of its own."""
    prompt = {} if fields and "input_ids" in fields else {"text": TEXT}
    sampling = {"max_new_tokens": 4, "temperature": 0, **params}
    return {**prompt, "sampling_params": sampling, **(fields or {})}


# Of the first group the hooks read a field; of the second they read none that is wrong.
READ = {
    "max_new_tokens 16.5": body(max_new_tokens=16.5),
    "logprob_start_len -7": body({"return_logprob": True, "logprob_start_len": -7}),
    "input_ids [[]]": body({"input_ids": [[]]}),
    "extra_key ['a']": body({"extra_key": ["a"]}),
    "lora_id ['a']": body({"lora_id": ["a"]}),
    "positional_embed_overrides 5": body({"positional_embed_overrides": 5}),
    "custom_params {'kv_policy': 5}": body(custom_params={"kv_policy": 5}),
}
UNREAD = {
    "skip_special_tokens 1": body(skip_special_tokens=1),
    "top_logprobs_num 1000000000": body({"return_logprob": True, "top_logprobs_num": 10**9}),
    "logit_bias {'5': 1e300}": body(logit_bias={"5": 1e300}),
    "session_params {'id': {}}": body({"session_params": {"id": {}}}),
    "min_new_tokens 2, stop_token_ids [5000]": body(min_new_tokens=2, stop_token_ids=[5000]),
}
RETRACTED = 24  # Requests of each kind; SGLang never retracts one that runs alone.
AT_ONCE, LENGTH = 6, 130
SCHEDULES = {"no overlap": ["--disable-overlap-schedule"], "overlap": []}
SAMPLING: dict[str, dict[str, Any]] = {
    "nothing": {},
    "frequency_penalty 1.0": {"frequency_penalty": 1.0},
    "presence_penalty 1.0": {"presence_penalty": 1.0},
    "repetition_penalty 1.3": {"repetition_penalty": 1.3},
    "min_new_tokens 90": {
        "min_new_tokens": 90,
        "stop_token_ids": list(range(32, 80)),
        "ignore_eos": False,
    },
}
# SGLang's own test of retraction; and its check that no slot is lost or freed twice.
RETRACTS = {
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "40",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
}
STRIPS = ("--reasoning-parser", "qwen3", "--strip-thinking-cache")


class Servers:
    """Servers of one kind, one after the other: a new one where the last has ended."""

    def __init__(self, model: Path, policy: bool, folder: Path) -> None:
        self._model, self._policy, self._folder = model, policy, folder
        self._started = 0

    def start(self, arguments: Sequence[str] = (), retracts: bool = False) -> Server:
        self._started += 1
        environment = {} if self._policy else dict(STOCK_ENVIRONMENT)
        if retracts:
            environment |= RETRACTS
        given = [*arguments, *(POLICY if self._policy else ())]
        log = self._folder / f"{self._started}.log"
        return Server(self._model, ["--max-total-tokens", "8192", *given], log, environment)


def answer(server: Server, path: str, request: dict[str, Any]) -> str:
    """The status of the response, or why there is none."""
    try:
        return str(requests.post(server.url + path, json=request, timeout=TIMEOUT_S).status_code)
    except requests.RequestException as error:
        return type(error).__name__


def afterwards(server: Server) -> str:
    """Whether a request that has nothing wrong is answered still."""
    return "goes on" if answer(server, "/generate", body()) == "200" else "has ended"


def send_each(servers: Servers) -> list[list[str]]:
    """Each request by itself: its answer, and whether the next one is answered."""
    rows, waiting = [["request", "answer", "server"]], list((READ | UNREAD).items())
    while waiting:
        with servers.start() as server:
            state = "goes on"
            while waiting and state == "goes on":
                name, request = waiting.pop(0)
                status, state = answer(server, "/generate", request), afterwards(server)
                rows.append([name, status, state])
    return rows


def update_in_a_pause(servers: Servers) -> str:
    """Retract a running request by a pause, then update weights as is the default: with a flush."""
    with servers.start() as server, ThreadPoolExecutor(1) as pool:
        long = body(max_new_tokens=4000, ignore_eos=True)
        running = pool.submit(answer, server, "/generate", long)
        while not server.internal_state()["last_gen_throughput"] and not running.done():
            time.sleep(0.1)
        answer(server, "/pause_generation", {"mode": "retract"})
        update = {"model_path": server.server_info()["model_path"]}
        status = answer(server, "/update_weights_from_disk", update)
        answer(server, "/continue_generation", {})
        return f"{status}, {afterwards(server)}"


def strip_retracted(servers: Servers) -> str:
    """Reasoning requests that are retracted, and stripped of their reasoning at their end."""
    thinks = body({"require_reasoning": True}, max_new_tokens=200, ignore_eos=True)
    with servers.start(STRIPS, retracts=True) as server, ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [{**thinks, "text": f"{number} think"} for number in range(AT_ONCE)]
        statuses = list(pool.map(lambda request: answer(server, "/generate", request), asked))
        return f"{', '.join(sorted(set(statuses)))}, {afterwards(server)}"


def retract_each(servers: Servers, schedule: str, arguments: Sequence[str]) -> list[list[str]]:
    """Each request alone and beside others that are retracted: how many outputs differ."""
    rows = [[schedule, "retracted", "differ", "not retracted", "differ"]]
    with servers.start(arguments, retracts=True) as server:
        for name, params in SAMPLING.items():
            asked = [
                {**body(**{"max_new_tokens": LENGTH, "ignore_eos": True, **params}), "text": text}
                for text in (f"{number} Retract me" for number in range(RETRACTED))
            ]
            alone = [server.generate(**request) for request in asked]
            with ThreadPoolExecutor(AT_ONCE) as pool:
                together = list(pool.map(lambda request: server.generate(**request), asked))
            rows.append([name, *map(str, count(alone, together))])
    return rows


def count(alone: list[dict[str, Any]], together: list[dict[str, Any]]) -> list[int]:
    """Retracted requests, those of them that differ; and the same of all others."""
    counts = [0, 0, 0, 0]
    for one, other in zip(alone, together, strict=True):
        group = 0 if other["meta_info"]["num_retractions"] else 2
        counts[group] += 1
        counts[group + 1] += one["output_ids"] != other["output_ids"]
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", action="store_true", help="to a server with a policy")
    parser.add_argument("--retraction", action="store_true", help="only what a retraction changes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("qwen3", Path(folder) / "model")
        servers = Servers(model, arguments.policy, Path(folder))
        print(machine())
        if not arguments.retraction:
            print(table(send_each(servers)), flush=True)
            print(f"update of weights in a pause that retracts: {update_in_a_pause(servers)}")
            print(f"--strip-thinking-cache and retraction: {strip_retracted(servers)}", flush=True)
        for schedule, more in SCHEDULES.items():
            print(table(retract_each(servers, schedule, more)), flush=True)


if __name__ == "__main__":
    main()
