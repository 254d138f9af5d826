"""What ends SGLang itself, and what a retraction changes in its outputs, with no policy.

`python -m bench.stock_faults` sends each request below to stock SGLang with a tiny model and says
whether the server goes on. `--policy` does the same to a server with a policy.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import requests

from bench.machine import machine
from bench.models.tiny import make_model
from bench.server import STOCK_ENVIRONMENT, Server
from bench.table import table

POLICY = ["--kv-policy", "streaming", "--kv-budget", "48", "--kv-interval", "24"]
TIMEOUT_S = 20
# Of the first seven the hooks read a field; of the others they read none that is wrong.
FAULTS: list[dict[str, Any]] = [
    {"sampling_params": {"max_new_tokens": 16.5}},
    {"return_logprob": True, "logprob_start_len": -7},
    {"input_ids": [[]], "text": None},
    {"extra_key": ["a"]},
    {"lora_id": ["a"]},
    {"positional_embed_overrides": 5},
    {"sampling_params": {"custom_params": {"kv_policy": 5}}},
    {"sampling_params": {"skip_special_tokens": 1}},
    {"return_logprob": True, "top_logprobs_num": 10**9},
    {"sampling_params": {"logit_bias": {"5": 1e300}}},
    {"session_params": {"id": {}}},
    {"sampling_params": {"min_new_tokens": 2, "stop_token_ids": [5000]}},
]
RETRACTED = 24  # Requests of each kind; SGLang never retracts one that runs alone.
AT_ONCE = 6
SAMPLING: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 1.0},
    {"presence_penalty": 1.0},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 90, "stop_token_ids": [*range(32, 80)], "ignore_eos": False},
]
# SGLang's own test of retraction; and its check that no slot is lost or freed twice.
RETRACTS = {
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "40",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
}
# A server with these arguments, and whether it retracts.
Start = Callable[[list[str], bool], Server]


def body(sampling_params: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A short greedy request to `/generate`."""
    sampling = {"max_new_tokens": 4, "temperature": 0, **(sampling_params or {})}
    return {"text": "Once upon a time", "sampling_params": sampling, **fields}


def answer(server: Server, path: str, request: dict[str, Any]) -> str:
    """The status of the response, or why there is none."""
    try:
        return str(requests.post(server.url + path, json=request, timeout=TIMEOUT_S).status_code)
    except requests.RequestException as error:
        return type(error).__name__


def afterwards(server: Server) -> str:
    """Whether a request that has nothing wrong is answered still."""
    return "goes on" if answer(server, "/generate", body()) == "200" else "has ended"


def send_each(start: Start) -> list[list[str]]:
    """Each request by itself, to a new server where the last has ended."""
    rows, waiting = [["request", "answer", "server"]], list(FAULTS)
    while waiting:
        with start([], False) as server:
            state = "goes on"
            while waiting and state == "goes on":
                fault = waiting.pop(0)
                status = answer(server, "/generate", body(**fault))
                state = afterwards(server)
                rows.append([str(fault), status, state])
    return rows


def update_in_a_pause(start: Start) -> str:
    """Retract a running request by a pause, then update weights as is the default: with a flush."""
    with start([], False) as server, ThreadPoolExecutor(1) as pool:
        long = body({"max_new_tokens": 4000, "ignore_eos": True})
        running = pool.submit(answer, server, "/generate", long)
        while not server.internal_state()["last_gen_throughput"] and not running.done():
            time.sleep(0.1)
        answer(server, "/pause_generation", {"mode": "retract"})
        update = {"model_path": server.server_info()["model_path"]}
        status = answer(server, "/update_weights_from_disk", update)
        answer(server, "/continue_generation", {})
        return f"{status}, {afterwards(server)}"


def strip_retracted(start: Start) -> str:
    """Reasoning requests that are retracted, and stripped of their reasoning at their end."""
    params = {"max_new_tokens": 200, "ignore_eos": True}
    asked = [body(params, text=f"{n} think", require_reasoning=True) for n in range(AT_ONCE)]
    arguments = ["--reasoning-parser", "qwen3", "--strip-thinking-cache"]
    with start(arguments, True) as server, ThreadPoolExecutor(AT_ONCE) as pool:
        statuses = set(pool.map(partial(answer, server, "/generate"), asked))
        return f"{', '.join(sorted(statuses))}, {afterwards(server)}"


def retract_each(start: Start, arguments: list[str]) -> list[list[str]]:
    """Each request alone and beside others that are retracted: how many outputs differ."""
    rows = [[" ".join(arguments) or "overlap", "retracted", "differ", "not retracted", "differ"]]
    with start(arguments, True) as server, ThreadPoolExecutor(AT_ONCE) as pool:
        for more in SAMPLING:
            params = {"max_new_tokens": 130, "ignore_eos": True, **more}
            asked = [body(params, text=f"{number} Retract me") for number in range(RETRACTED)]
            alone = [server.generate(**request) for request in asked]
            together = list(pool.map(lambda request: server.generate(**request), asked))
            counts = [0, 0, 0, 0]
            for one, other in zip(alone, together, strict=True):
                group = 0 if other["meta_info"]["num_retractions"] else 2
                counts[group] += 1
                counts[group + 1] += one["output_ids"] != other["output_ids"]
            rows.append([str(more)[:40], *map(str, counts)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", action="store_true", help="to a server with a policy")
    parser.add_argument("--retraction", action="store_true", help="only what a retraction changes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model("qwen3", Path(folder) / "model")
        given = ["--max-total-tokens", "8192", *(POLICY if arguments.policy else [])]

        def start(more: list[str], retracts: bool) -> Server:
            environment = {} if arguments.policy else STOCK_ENVIRONMENT
            environment = {**environment, **(RETRACTS if retracts else {})}
            return Server(model, [*given, *more], Path(folder) / "log", environment)

        print(machine())
        if not arguments.retraction:
            print(table(send_each(start)), flush=True)
            print(f"update of weights in a pause that retracts: {update_in_a_pause(start)}")
            print(f"--strip-thinking-cache and retraction: {strip_retracted(start)}", flush=True)
        for more in (["--disable-overlap-schedule"], []):
            print(table(retract_each(start, more)), flush=True)


if __name__ == "__main__":
    main()
