"""The serving benchmark: SGLang's client on real servers, and what is made of its figures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from bench.arms import Arm
from bench.load import sweep
from bench.load.arms import (
    CLIP_VARIABLE,
    CONSTRAINED,
    POLICY,
    PRODUCTION,
    WAITING,
    clip,
    make_arms,
)
from bench.load.cells import Cell, Group, group
from bench.load.client import Client, Load, LoadFailed
from bench.load.goals import judge
from bench.load.picture import draw
from bench.load.presets import FULL, PRESETS, RICH
from bench.load.report import group_table
from bench.load.run import Run, measure
from bench.load.sweep import DoesNotFit, Sweep
from bench.load.traffic import Traffic, traffic_of
from bench.load.workloads import (
    NEVER,
    Workload,
    never_evicted,
    random_lengths,
    reasoning,
    shared_prefix,
)
from bench.models.dummy import make_dummy
from bench.models.tiny import make_model
from bench.models.tokenizer import write_printable_tokenizer
from bench.server import STOCK_ENVIRONMENT
from sglang_tri.patches.scheduler import WAIT
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL

LARGE_VOCABULARY = 151936
TINY, LARGE = PRESETS["tiny"], PRESETS["qwen3-8b"]
LOAD = Load(
    began=0.0,
    seconds=2.0,
    output_rate=50.0,
    request_rate=1.0,
    first_token=(0.1, 0.2, 0.3),
    between_tokens=(0.01, 0.02, 0.03),
    cached=30,
)
RUN = Run(
    arm=PRODUCTION,
    pool="4",
    workload="reasoning 10+20",
    slots=100,
    load=LOAD,
    retracted=0,
    rounds=0,
    peak_slots=90,
    running=4.0,
    read=200.0,
    over_time=[(0.0, 4, 50.0), (1.0, 3, 40.0)],
    attention="torch_native",
    wall=3.0,
)
BANDWIDTH = Traffic(weights=1000, slot=10, bandwidth=1e6)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("client")
    write_printable_tokenizer(folder / "tokenizer")
    model = make_model("qwen3", folder / "model")
    with Client(folder, model, folder / "tokenizer") as client:
        yield client


@pytest.mark.parametrize("server", ["stock", "page1-overlap"], indirect=True)
def test_a_run(server: Running, client: Client) -> None:
    """All counts are those that follow from the workload."""
    requests, system, question, output = 5, 40, 8, 3 * (BUDGET + INTERVAL) - 16
    workload = reasoning(requests, system, question, output)
    run = measure(client, server.server, workload, "arm", "pool", shares=True)
    assert (run.workload, run.arm, run.pool) == (workload.name, "arm", "pool")
    assert run.slots == 8192
    assert run.attention == "torch_native"
    assert run.load.seconds < run.wall < run.load.seconds + 60
    assert run.load.output_rate * run.load.seconds == pytest.approx(requests * output)
    assert run.load.request_rate * run.load.seconds == pytest.approx(requests)
    # The first request is known, from the client's warm-up, up to its last token.
    prompt = system + 2 + question
    known = (requests - 1) * (system + 2) + prompt - 1
    assert known <= run.load.cached <= requests * (prompt - 1)
    assert run.retracted == 0
    policy = server.setup.policy
    # However early the first of them is, by up to 8 tokens.
    rounds = (output - BUDGET - 1) // INTERVAL
    assert rounds == (output - BUDGET - 1 + 8) // INTERVAL
    assert run.rounds in ((requests * rounds, requests * (rounds - 1)) if policy else (0,))
    most = BUDGET + INTERVAL if policy else output
    held = system + requests * (2 + question + most)
    assert held - 25 * requests <= run.peak_slots <= held + 1
    assert max(running for _, running, _ in run.over_time) == requests
    assert 1 <= run.running <= requests
    # On average a request holds its prompt and half of its output, or most of its budget.
    low, high = (BUDGET // 2, most) if policy else (output / 3, 2 * output / 3)
    assert run.running * (prompt + low) <= run.read <= run.running * (prompt + high)
    assert all(0 <= time <= run.load.seconds + 1 for time, _, _ in run.over_time)
    assert 0 < run.load.first_token[0] <= run.load.first_token[-1] < run.load.seconds
    assert 0 < run.load.between_tokens[0] <= run.load.between_tokens[-1] < run.load.seconds


@pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
def test_a_run_without_rounds(server: Running, client: Client) -> None:
    workload = never_evicted(6, system=40, question=8, budget=BUDGET).times(2)
    run = measure(client, server.server, workload, "arm", "pool", shares=True)
    assert run.load.output_rate * run.load.seconds == pytest.approx(12 * 45)
    assert run.rounds == 0


@pytest.mark.parametrize("server", ["stock"], indirect=True)
def test_random_prompts_share_little(server: Running, client: Client) -> None:
    workload = random_lengths(6, prompt=200, output=40)
    run = measure(client, server.server, workload, "arm", "pool", shares=True)
    assert run.load.cached < 400
    assert run.read <= run.peak_slots


@pytest.mark.parametrize("server", ["stock"], indirect=True)
def test_no_more_at_once(server: Running, client: Client) -> None:
    workload = shared_prefix("name", 1, 3, system=10, question=4, output=60).times(3)
    run = measure(client, server.server, workload, "arm", "pool", shares=True)
    assert run.load.output_rate * run.load.seconds == pytest.approx(9 * 60)
    assert max(running for _, running, _ in run.over_time) == 3


@pytest.mark.parametrize("server", ["stock"], indirect=True)
def test_a_refused_request_is_an_error(server: Running, client: Client) -> None:
    too_long = reasoning(1, system=40_000, question=1, output=4)
    with pytest.raises(LoadFailed, match="1 requests got no token"):
        measure(client, server.server, too_long, "arm", "pool", shares=False)


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
    pools = TINY.pools()
    assert [pool.name for pool in pools] == ["4", "8", "16", "32", RICH]
    one = 2 + TINY.question + TINY.outputs[0]
    room = [(pool.slots or 0) - TINY.systems[0] for pool in pools]
    assert room == [count * one for count in (4, 8, 16, 32, TINY.sent[RICH])]
    assert [len(pool.workloads) for pool in pools] == [1, 1, 1, 1, 4]
    assert all(pool.workloads[0].requests == TINY.sent[pool.name] for pool in pools)
    large = LARGE.pools()
    assert [pool.name for pool in large] == [*LARGE.sent]
    assert [pool.slots for pool in large if pool.name == FULL] == [None]
    assert len(replace(LARGE, systems=[1, 2], outputs=[3, 4]).pools()) == 4 * len(LARGE.sent)


def test_arms_have_the_same_pool() -> None:
    """And differ in nothing but what they are named for."""
    names = [PRODUCTION, clip(64), CONSTRAINED, POLICY, WAITING]
    arms = make_arms(TINY, names, 1000, "file", ["--page-size", "4"])
    common = arms[0].arguments
    pairs = dict(zip(common[::2], common[1::2], strict=False))
    assert (pairs["--max-total-tokens"], pairs["--max-running-requests"]) == ("1000", "64")
    assert "--page-size" in common
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
    assert "--max-total-tokens" not in make_arms(LARGE, names, None, "auto", [])[0].arguments
    assert make_arms(TINY, [POLICY, PRODUCTION], 1000, "file", ["--page-size", "4"]) == [
        arms[3],
        arms[0],
    ]


def with_rate(run: Run, rate: float) -> Run:
    return replace(run, load=replace(run.load, output_rate=rate))


def test_groups_are_medians_beside_production() -> None:
    """Also where memory decided, and the arms' pools differ a little."""
    policy = replace(RUN, arm=POLICY, running=16.0, read=400.0, slots=99)
    rates = [
        (policy, 100.0),
        (RUN, 40.0),
        (RUN, 90.0),
        (policy, 150.0),
        (RUN, 50.0),
        (policy, 110.0),
    ]
    lonely = replace(RUN, workload="random 1+1")
    (found,) = group([*(with_rate(run, rate) for run, rate in rates), lonely], BANDWIDTH)
    stock, ours = found.cells
    assert (stock.arm, stock.ratio, stock.allowed) == (PRODUCTION, 1.0, 1.0)
    assert (ours.arm, ours.ratio, ours.rate) == (POLICY, 110 / 50, 110.0)
    assert ours.ratios == [100 / 40, 150 / 90, 110 / 50]
    assert ours.limit == 16 * 1e6 / 5000
    assert ours.allowed == pytest.approx((16 / 5000) / (4 / 3000))
    assert found.best_stock is stock


def made(
    ratio: float, cached: int, pool: str, share: float = 0.7, name: str = RUN.workload
) -> Group:
    """A group whose production reaches this share of its limit."""
    arms = {
        PRODUCTION: (1.0, 30),
        "clip 9": (1.5, 30),
        "clip 8": (0.9, 30),
        POLICY: (ratio, cached),
    }
    cells = []
    for arm, (speed, hits) in arms.items():
        load = replace(LOAD, cached=hits)
        run = replace(RUN, arm=arm, load=load, pool=pool, workload=name)
        cells.append(Cell([run], speed, [speed], LOAD.output_rate / share, 2.0))
    return Group(cells)


def test_goals() -> None:
    def verdicts(group: Group) -> list[bool | None]:
        return [goal.met for goal in judge([group], least=1.2)]

    assert verdicts(made(1.7, 30, "4")) == [True, True, True]
    assert verdicts(made(1.1, 29, "4")) == [False, False, False]
    assert verdicts(made(1.1, 30, "4", share=0.1)) == [False, None, True]
    assert verdicts(made(0.98, 30, RICH)) == [True, True]
    assert verdicts(made(0.97, 31, RICH)) == [False, True]
    assert verdicts(made(1.0, 0, RICH, name="random 1+1")) == [True]
    assert verdicts(made(0.5, 0, "4", name="random 1+1")) == []
    assert verdicts(made(0.99, 0, "4", name=f"{NEVER} 1+1")) == [True, True]
    assert verdicts(made(0.98, 0, RICH, name=f"{NEVER} 1+1")) == [True, False]
    assert [goal.failed for goal in judge([made(1.1, 29, "4")], 1.2)] == [False, False, True]


def test_a_round_where_none_is_due_is_an_error() -> None:
    """Whatever the speed."""
    never = made(1.5, 0, "4", name=f"{NEVER} 1+1")
    runs = [replace(run, rounds=1) for run in never.policy.runs]
    never.cells[-1] = replace(never.policy, runs=runs)
    goals = judge([never], least=1.2)
    assert [(goal.met, goal.failed) for goal in goals] == [(False, True), (None, False)]


def test_table_and_picture() -> None:
    shown = made(3.0, 30, "4")
    text = group_table(shown)
    assert "50 (50-50)" in text
    assert "3.00-3.00" in text
    assert "70.0%" in text
    assert "attention: torch_native" in text
    assert "0.10/0.20/0.30 s" in text
    assert "10/20/30 ms" in text
    assert "to the best stock arm (clip 9): 2.00 x" in text
    figure = draw([shown, shown])
    assert [len(axes.get_lines()) for axes in figure.axes] == [4, 4, 4, 4]
    assert [list(line.get_ydata()) for line in figure.axes[1].get_lines()] == [[50.0, 40.0]] * 4
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == [0.0, 1.0]


def test_one_server_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: every arm alone, the other way round the second time; memory gives the pool."""
    room, events, shared = 500, [], set()

    def measured(_: Any, __: Any, workload: Workload, arm: str, pool: str, shares: bool) -> Run:
        shared.update([arm] if shares else [])
        return replace(RUN, arm=arm, pool=pool, workload=workload.name)

    class FakeServer:
        def internal_state(self) -> dict[str, Any]:
            return {"memory_usage": {"token_capacity": room}}

        def generate(self, **body: Any) -> None:
            assert body["sampling_params"]["max_new_tokens"] > LARGE.budget + LARGE.interval

    @contextmanager
    def start(arms: list[Arm], *_: Any) -> Iterator[dict[str, FakeServer]]:
        (arm,) = arms
        pairs = list(pairwise(arm.arguments))
        events.append((arm.name, [size for flag, size in pairs if flag == "--max-total-tokens"]))
        yield {arm.name: FakeServer()}

    monkeypatch.setattr(sweep, "running", start)
    monkeypatch.setattr(sweep, "measure", measured)
    names = [POLICY, clip(7), CONSTRAINED, PRODUCTION]
    preset = replace(LARGE, arms=names, sent={FULL: 3, "4": 2})
    arguments = argparse.Namespace(repeats=2, stats="auto", server_arguments=[])
    fake: Any = None
    full, four = preset.pools()
    benched = Sweep(preset, arguments, tmp_path, fake, tmp_path, len, list)
    runs = list(benched.measure(full))
    assert events == [(PRODUCTION, []), *((name, ["500"]) for name in [*names, *names[::-1]])]
    assert [(run.arm, run.pool) for run in runs] == [(a, FULL) for a in [*names, *names[::-1]]]
    assert shared == {PRODUCTION, clip(7), POLICY}
    with pytest.raises(DoesNotFit, match=f"room for 500 slots, not for {four.slots}"):
        list(benched.measure(four))


def test_a_workload_in_the_words_of_the_client() -> None:
    workload = shared_prefix("name", 2, 3, system=10, question=4, output=5)
    assert workload.requests == 6
    assert workload.pool_for(7) == 2 * 10 + 7 * (2 + 4 + 5)
    pairs = dict(zip(workload.arguments[::2], workload.arguments[1::2], strict=True))
    assert pairs["--gsp-num-groups"] == "2"
    assert pairs["--gsp-prompts-per-group"] == "3"
    assert workload.output == 6 * 5


def test_more_requests_are_sent_one_after_another() -> None:
    workload = shared_prefix("name", 2, 3, system=10, question=4, output=5)
    assert workload.times(1) == workload
    longer = workload.times(4)
    pairs = dict(zip(longer.arguments[::2], longer.arguments[1::2], strict=True))
    assert pairs["--gsp-prompts-per-group"] == "12"
    assert pairs["--max-concurrency"] == "6"
    assert (longer.requests, longer.output) == (24, 24 * 5)
    assert longer.pool_for(7) == workload.pool_for(7)
    assert longer.times(2).sizes["max-concurrency"] == 6
    assert longer.times(2).requests == 48
    assert random_lengths(9, 100, 1).times(2).sizes["num-prompts"] == 18


def test_some_workloads_only() -> None:
    chosen = replace(TINY, kinds=("shared", "random"), times=3)
    (pool,) = chosen.pools()
    assert (pool.name, pool.slots) == (RICH, TINY.pools()[-1].slots)
    assert [w.requests for w in pool.workloads] == [3 * w.requests for w in TINY.others]


def test_what_requests_share_is_read_again_for_each() -> None:
    assert reasoning(9, 100, 1, 1).read_twice(5) == 400
    assert random_lengths(9, 100, 1).read_twice(5) == 0
    halves = shared_prefix("name", 2, 9, system=100, question=1, output=1)
    assert halves.read_twice(1) == 0
    assert halves.read_twice(2) == pytest.approx(50)  # They are of one group half of the time.
