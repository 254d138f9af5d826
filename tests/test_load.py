"""The serving benchmark: SGLang's client on real servers, and what is made of its figures."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from bench import metrics
from bench.arms import Arm
from bench.cutoff import Clock
from bench.load import sweep
from bench.load.client import RATE, Client, LoadFailed, Run
from bench.load.report import Row, Traffic, compare, draw, judge, show, traffic_of
from bench.load.sweep import CLIP_VARIABLE, make_arm, measure
from bench.load.workloads import (
    CONSTRAINED,
    NEVER,
    POLICY,
    PRESETS,
    PRODUCTION,
    RICH,
    WAITING,
    Workload,
)
from bench.models.dummy import make_dummy
from bench.models.tiny import make_model
from bench.models.tokenizer import write_printable_tokenizer
from bench.server import STOCK_ENVIRONMENT
from sglang_tri.patches.scheduler import WAIT
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL

LARGE_VOCABULARY = 151936
TINY, QUICK = PRESETS["tiny"], PRESETS["quick"]
RUN: Run = {
    **{"arm": PRODUCTION, "pool": "4", "workload": "reasoning 10+20"},
    **{"duration": 2.0, RATE: 50.0, "request_throughput": 1.0},
    **{"median_ttft_ms": 100.0, "p95_ttft_ms": 200.0, "p99_ttft_ms": 300.0},
    **{"median_itl_ms": 10.0, "p95_itl_ms": 20.0, "p99_itl_ms": 30.0},
    **{"slots": 100, "attention": "torch_native", "cached": 30, "retracted": 0, "rounds": 0},
    **{"running": 4.0, "read": 200.0, "peak_slots": 90, "wall": 3.0},
    "over_time": [(0.0, 4, 50.0), (1.0, 3, 40.0)],
}
# Each run takes a client, which takes its time to start.
FULL_STOCK = pytest.param("stock", marks=pytest.mark.full)
BANDWIDTH = Traffic(weights=1000, slot=10, bandwidth=1e6)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Client:
    folder = tmp_path_factory.mktemp("client")
    write_printable_tokenizer(folder / "tokenizer")
    return Client(folder, make_model("qwen3", folder / "model"), folder / "tokenizer")


def reasoning(requests: int, system: int, question: int, output: int) -> Workload:
    return Workload("reasoning", requests, system, question, output)


@pytest.mark.parametrize("server", [FULL_STOCK, "page1-overlap"], indirect=True)
def test_a_run(server: Running, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """All counts are those that follow from the workload."""
    monkeypatch.setattr(metrics, "PERIOD_S", 0.02)  # Or the most slots would not be seen.
    requests, system, question, output = 5, 40, 8, 3 * (BUDGET + INTERVAL) - 16
    began, workload = time.monotonic(), reasoning(requests, system, question, output)
    run = client.measure(server.server, workload, "arm", "pool")
    wall = time.monotonic() - began
    assert (run["workload"], run["arm"], run["pool"]) == ("reasoning", "arm", "pool")
    assert run["slots"] == 8192
    assert run["attention"] == "torch_native"
    seconds = run["duration"]
    assert seconds < run["wall"] <= wall
    assert run[RATE] * seconds == pytest.approx(requests * output)
    assert run["request_throughput"] * seconds == pytest.approx(requests)
    # The first request is known, from the client's warm-up, up to its last token.
    prompt = system + 2 + question
    known = (requests - 1) * (system + 2) + prompt - 1
    assert known <= run["cached"] <= requests * (prompt - 1)
    assert run["retracted"] == 0
    policy = server.setup.policy
    # However early the first of them is, by up to 8 tokens.
    rounds = (output - BUDGET - 1) // INTERVAL
    assert rounds == (output - BUDGET - 1 + 8) // INTERVAL
    assert run["rounds"] in ((requests * rounds, requests * (rounds - 1)) if policy else (0,))
    most = BUDGET + INTERVAL if policy else output
    held = system + requests * (2 + question + most)
    assert held - 25 * requests <= run["peak_slots"] <= held + 1
    assert max(running for _, running, _ in run["over_time"]) == requests
    assert 1 <= run["running"] <= requests
    # On average a request holds its prompt and half of its output, or most of its budget.
    low, high = (BUDGET // 2, most) if policy else (output / 3, 2 * output / 3)
    assert run["running"] * (prompt + low) <= run["read"] <= run["running"] * (prompt + high)
    assert all(0 <= look <= seconds for look, _, _ in run["over_time"])
    assert 0 < run["median_ttft_ms"] <= run["p99_ttft_ms"] < 1000 * seconds
    assert 0 < run["median_itl_ms"] <= run["p99_itl_ms"] < 1000 * seconds


@pytest.mark.full
@pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
def test_a_run_without_rounds(server: Running, client: Client) -> None:
    chosen = replace(TINY, workloads=(NEVER,), systems=(40,), question=8, budget=BUDGET)
    (pool,) = replace(chosen, untouched=3).all_pools()
    run = client.measure(server.server, pool.workloads[0], "arm", "pool")
    assert run[RATE] * run["duration"] == pytest.approx(12 * 45)
    assert run["rounds"] == 0


@pytest.mark.full
@pytest.mark.parametrize("server", ["stock"], indirect=True)
def test_random_prompts_share_little(server: Running, client: Client) -> None:
    workload = Workload("random", 6, system=0, question=200, output=40)
    run = client.measure(server.server, workload, "arm", "pool")
    assert run["cached"] < 400
    assert run["read"] <= run["peak_slots"]


@pytest.mark.full
@pytest.mark.parametrize("server", ["stock"], indirect=True)
def test_no_more_at_once(server: Running, client: Client) -> None:
    workload = Workload("name", 3, system=10, question=4, output=60).times(3)
    run = client.measure(server.server, workload, "arm", "pool")
    assert run[RATE] * run["duration"] == pytest.approx(9 * 60)
    assert max(running for _, running, _ in run["over_time"]) == 3


@pytest.mark.full
@pytest.mark.parametrize("server", ["stock"], indirect=True)
def test_a_refused_request_is_an_error(server: Running, client: Client) -> None:
    too_long = reasoning(1, system=40_000, question=1, output=4)
    with pytest.raises(LoadFailed, match="1 requests got no token"):
        client.measure(server.server, too_long, "arm", "pool")


def test_a_package_that_the_client_imports_and_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Client(tmp_path, tmp_path, tmp_path)._stand_in() == {}
    monkeypatch.setattr("bench.load.client.find_spec", lambda name: None)
    environment = {**os.environ, **Client(tmp_path, tmp_path, tmp_path)._stand_in()}
    command = [sys.executable, "-c", "from datasets import load_dataset; print(load_dataset)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_prompts_are_as_long_for_the_server_as_for_the_client(tmp_path: Path) -> None:
    write_printable_tokenizer(tmp_path / "client")
    make_dummy("qwen3-8b", tmp_path / "server")
    client, server = (
        AutoTokenizer.from_pretrained(tmp_path / name) for name in ("client", "server")
    )
    text = client.decode(sorted(client.get_vocab().values()))
    assert len(text) == len(client.get_vocab()) == len(client(text).input_ids)
    assert len(server(text).input_ids) == len(text)
    assert server.decode([LARGE_VOCABULARY - 1])


def test_bytes_of_a_step(tmp_path: Path) -> None:
    model = make_model("qwen3", tmp_path / "model")
    with safe_open(model / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    traffic = traffic_of(model)
    assert traffic.weights == sum(sizes.values()) - sizes["model.embed_tokens.weight"]
    assert traffic.slot == 2 * 4 * 2 * 32 * 4
    assert traffic.bandwidth > 1e8


def test_bytes_of_an_8b_model(tmp_path: Path) -> None:
    """Its published sizes: 8.19 billion parameters, 0.62 of them embeddings; 144 KiB a token."""
    traffic = traffic_of(make_dummy("qwen3-8b", tmp_path))
    assert traffic.slot == 144 * 1024
    assert traffic.weights / 2e9 == pytest.approx(8.19 - 0.62, abs=0.01)


def test_a_step_takes_as_long_as_its_bytes() -> None:
    assert BANDWIDTH.tokens_per_second(4, 200) == 4 * 1e6 / 3000


def test_pools_have_room_for_as_many_as_they_are_named_for() -> None:
    pools = TINY.all_pools()
    assert [pool.name for pool in pools] == ["4", "8", "16", "32", RICH]
    one = 2 + TINY.question + TINY.outputs[0]
    room = [pool.slots - TINY.systems[0] for pool in pools]
    assert room == [count * one for count in (4, 8, 16, 32, TINY.sent[RICH])]
    assert [len(pool.workloads) for pool in pools] == [1, 1, 1, 1, 4]
    assert all(pool.workloads[0].requests == TINY.sent[pool.name] for pool in pools)
    assert len(replace(TINY, systems=[1, 2], outputs=[3, 4]).all_pools()) == 4 * len(TINY.sent)


def test_arms_have_the_same_pool() -> None:
    """And differ in nothing but what they are named for."""
    names = [PRODUCTION, "clip 64", CONSTRAINED, POLICY, WAITING]
    preset = replace(TINY, stats="file", server=[*TINY.server, "--page-size", "4"])
    arms = [make_arm(name, 1000, preset) for name in names]
    common = arms[0].arguments
    pairs = dict(pairwise(common))
    assert (pairs["--max-total-tokens"], pairs["--max-running-requests"]) == ("1000", "64")
    assert {"--page-size", "--enable-metrics"} <= set(common)
    policy = ["--kv-policy", POLICY, "--kv-stats", "file", "--kv-budget", str(TINY.budget)]
    policy += ["--kv-interval", str(TINY.interval)]
    clipped = {**STOCK_ENVIRONMENT, CLIP_VARIABLE: "64"}
    plain = ["--disable-radix-cache", "--disable-overlap-schedule"]
    assert arms == [
        Arm(PRODUCTION, common, STOCK_ENVIRONMENT),
        Arm("clip 64", common, clipped),
        Arm(CONSTRAINED, [*common, *plain], STOCK_ENVIRONMENT),
        Arm(POLICY, [*common, *policy]),
        Arm(WAITING, [*common, *policy], {WAIT: "1"}),
    ]


def test_rows_are_medians_beside_production() -> None:
    """Also where memory decided, and the arms' pools differ a little."""
    policy = RUN | {"arm": POLICY, "running": 16.0, "read": 400.0, "slots": 99, "rounds": 2}
    runs = [
        policy | {RATE: 100.0, "peak_slots": 95},
        RUN | {RATE: 40.0},
        RUN | {RATE: 90.0},
        policy | {RATE: 150.0},
        RUN | {RATE: 50.0},
        policy | {RATE: 110.0},
    ]
    lonely = RUN | {"workload": "random 1+1", "arm": POLICY}
    ours, stock = compare([*runs, lonely], BANDWIDTH)
    assert (stock["arm"], stock["ratio"], stock["allowed"]) == (PRODUCTION, 1.0, 1.0)
    assert (stock["least"], stock["most"], stock["interval"]) == (1.0, 1.0, "")
    assert (ours["arm"], ours["ratio"], ours[RATE]) == (POLICY, 110 / 50, 110.0)
    assert (ours["least"], ours["most"]) == (150 / 90, 100 / 40)
    assert (ours["peak_slots"], ours["rounds"], ours["rounds_in_all"]) == (95, 2, 6)
    limit = 16 * 1e6 / 5000
    assert ours["share"] == pytest.approx(110 / limit)
    assert ours["allowed"] == pytest.approx((16 / 5000) / (4 / 3000))


def test_an_interval_holds_the_mean_of_what_was_repeated() -> None:
    """Its ends for two repeats: Student's t has a cumulative 0.975 at 12.706 with one degree."""
    policy = RUN | {"arm": POLICY}
    runs = [RUN, policy | {RATE: 50.0}, RUN, policy | {RATE: 50.0 * math.e**0.2}]
    interval = compare(runs, BANDWIDTH)[1]["interval"]
    low, high = (math.log(float(end)) for end in interval.split("-"))
    assert (low, high) == pytest.approx((0.1 - 1.2706, 0.1 + 1.2706), abs=0.02)


def made(
    ratio: float, cached: int, pool: str, share: float = 0.7, name: str = "reasoning 10+20"
) -> list[Run]:
    """Runs in which production reaches this share of its limit, and bytes allow a ratio of 2."""
    arms = {PRODUCTION: 1.0, "clip 9": 1.5, "clip 8": 0.9, POLICY: ratio}
    # The bandwidth's limit is 1e6 / 1000 for each request where no slots are read.
    running = {POLICY: 0.1 / share}
    runs = []
    for arm, speed in arms.items():
        run = RUN | {"arm": arm, "pool": pool, "workload": name, "read": 0.0, RATE: 50.0 * speed}
        run |= {"running": running.get(arm, 0.05 / share), "cached": 30}
        runs.append(run | ({"cached": cached} if arm == POLICY else {}))
    return runs


def rows_of(*loads: list[Run]) -> list[Row]:
    return compare([run for load in loads for run in load], BANDWIDTH)


def test_goals() -> None:
    def verdicts(runs: list[Run]) -> list[bool | None]:
        return [goal.met for goal in judge(rows_of(runs), least=1.2)]

    assert verdicts(made(1.7, 30, "4")) == [True, True, True]
    assert verdicts(made(1.1, 29, "4")) == [False, False, False]
    assert verdicts(made(1.1, 30, "4", share=0.1)) == [False, None, True]
    assert verdicts(made(0.98, 30, RICH)) == [True, True]
    assert verdicts(made(0.97, 31, RICH)) == [False, True]
    assert verdicts(made(1.0, 0, RICH, name="random 1+1")) == [True]
    assert verdicts(made(0.5, 0, "4", name="random 1+1")) == []
    assert verdicts(made(0.99, 0, "4", name=f"{NEVER} 1+1")) == [True, True]
    assert verdicts(made(0.98, 0, RICH, name=f"{NEVER} 1+1")) == [True, False]
    goals = judge(rows_of(made(1.1, 29, "4")), 1.2)
    assert [goal.failed for goal in goals] == [False, False, True]


def test_a_round_where_none_is_due_is_an_error() -> None:
    """Whatever the speed, and in whichever repeat."""
    never = made(1.5, 0, "4", name=f"{NEVER} 1+1")
    goals = judge(rows_of(never, never, [*never[:-1], never[-1] | {"rounds": 1}]), least=1.2)
    assert [(goal.met, goal.failed) for goal in goals] == [(False, True), (None, False)]


def test_table_and_picture() -> None:
    runs = made(3.0, 30, "4")
    head, stock, *_, policy = show(rows_of(runs)).splitlines()
    for text in ("reasoning 10+20", "50 (50-50)", "torch_native", "100/200/300", "10/20/30"):
        assert text in stock
    assert "70.0%" not in policy
    assert "70.0%" in stock
    # To production: 3, as it was in each repeat; to "clip 9": 2, which bytes allow, too.
    assert head.index("of repeats") < head.index("to best") < head.index("bytes allow")
    assert re.search(r"150 \(150-150\) +3\.00 +3\.00-3\.00 +2\.00 +2\.00 ", policy)
    figure = draw([*runs, *(run | {"pool": "8"} for run in runs)])
    assert [len(axes.get_lines()) for axes in figure.axes] == [4, 4, 4, 4]
    assert [list(line.get_ydata()) for line in figure.axes[1].get_lines()] == [[50.0, 40.0]] * 4
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == [0.0, 1.0]


def test_arms_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way round the second time, on servers that stand once."""
    events, room = [], 10**6

    def measured(_: Client, server: Any, workload: Workload, arm: str, pool: str) -> Run:
        assert server.name == arm
        return RUN | {"arm": arm, "pool": pool, "workload": workload.name}

    class FakeServer:
        log = tmp_path / "log"

        def __init__(self, arm: Arm) -> None:
            self.name = arm.name

        def internal_state(self) -> dict[str, Any]:
            return {"memory_usage": {"token_capacity": room}}

        def generate(self, **body: Any) -> None:
            assert body["sampling_params"]["max_new_tokens"] > QUICK.budget + QUICK.interval

    @contextmanager
    def start(arms: list[Arm], *_: Any) -> Iterator[dict[str, FakeServer]]:
        for arm in arms:
            pairs = dict(pairwise(arm.arguments))
            events.append((arm.name, pairs["--max-total-tokens"]))
        yield {arm.name: FakeServer(arm) for arm in arms}

    monkeypatch.setattr(sweep, "running", start)
    monkeypatch.setattr(Client, "measure", measured)
    preset = replace(QUICK, clips=(7,), workloads=("reasoning",))
    (pool,) = preset.all_pools()
    names = pool.arms
    assert names == [PRODUCTION, "clip 7", POLICY]
    runs: list[Run] = []
    client = Client(tmp_path, tmp_path, tmp_path)
    measure(pool, preset, client, Clock(), runs.append)
    assert events == [(name, str(pool.slots)) for name in names]
    assert [run["arm"] for run in runs] == [*names, *names[::-1]]
    room = 500
    with pytest.raises(LoadFailed, match=f"room for 500 slots, not for {pool.slots}"):
        measure(replace(pool, name="small"), preset, client, Clock(), runs.append)


def pairs_of(workload: Workload) -> dict[str, str]:
    return dict(pairwise(workload.arguments))


def test_a_workload_in_the_words_of_the_client() -> None:
    workload = Workload("name", 6, system=10, question=4, output=5, groups=2)
    assert workload.pool_for(7) == 2 * 10 + 7 * (2 + 4 + 5)
    pairs = pairs_of(workload)
    assert pairs["--gsp-num-groups"] == "2"
    assert pairs["--gsp-prompts-per-group"] == "3"
    assert pairs["--gsp-output-len"] == "5"
    assert "--max-concurrency" not in pairs


def test_more_requests_are_sent_one_after_another() -> None:
    workload = Workload("name", 6, system=10, question=4, output=5, groups=2)
    assert workload.times(1) == workload
    longer = workload.times(4)
    pairs = pairs_of(longer)
    assert pairs["--gsp-prompts-per-group"] == "12"
    assert pairs["--max-concurrency"] == "6"
    assert longer.requests == 24
    assert longer.pool_for(7) == workload.pool_for(7)
    assert pairs_of(longer.times(2))["--max-concurrency"] == "6"
    assert longer.times(2).requests == 48
    twice = Workload("random", 9, system=0, question=100, output=1).times(2)
    assert pairs_of(twice)["--num-prompts"] == "18"


def test_some_workloads_only() -> None:
    chosen = replace(TINY, workloads=("shared", "random"), times=3)
    (pool,) = chosen.all_pools()
    assert (pool.name, pool.slots) == (RICH, TINY.all_pools()[-1].slots)
    assert [w.requests for w in pool.workloads] == [3 * w.requests for w in TINY.others]
