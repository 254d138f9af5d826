"""The serving benchmark: SGLang's client on real servers, and what is made of its figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from bench.dummy_models import make_dummy
from bench.load.arms import CLIP_VARIABLE, CONSTRAINED, POLICY, PRODUCTION, make_arms
from bench.load.cells import Cell, best_clip, cells
from bench.load.client import Client, LoadFailed
from bench.load.goals import judge
from bench.load.picture import draw
from bench.load.presets import FULL, PRESETS, RICH
from bench.load.report import group_table
from bench.load.run import Run, measure
from bench.load.traffic import Traffic, traffic_of
from bench.load.workloads import reasoning, shared_prefix
from bench.tiny_models import make_model
from bench.tiny_tokenizer import write_printable_tokenizer
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL

LARGE_VOCABULARY = 151936
TINY, LARGE = PRESETS["tiny"], PRESETS["qwen3-8b"]
RUN = Run(
    arm=PRODUCTION,
    pool="4",
    workload="reasoning 10+20",
    slots=100,
    seconds=2.0,
    output_rate=50.0,
    request_rate=1.0,
    first_token=(0.1, 0.2, 0.3),
    between_tokens=(0.01, 0.02, 0.03),
    cached=30,
    retracted=0,
    rounds=0,
    peak_slots=90,
    running=4.0,
    read=200.0,
    over_time=[(0.0, 4, 50.0), (1.0, 3, 40.0)],
)
BANDWIDTH = Traffic(weights=1000, slot=10, bandwidth=1e6)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("client")
    write_printable_tokenizer(folder / "tokenizer")
    with Client(folder, folder / "tokenizer") as client:
        yield client


@pytest.mark.parametrize("server", ["stock", "page1-overlap"], indirect=True)
def test_a_run(server: Running, client: Client) -> None:
    """All counts are those that follow from the workload."""
    requests, system, question, output = 5, 40, 8, 3 * (BUDGET + INTERVAL)
    workload = reasoning(requests, system, question, output)
    run = measure(client, server.server, workload, "arm", "pool", shares=True)
    assert (run.workload, run.arm, run.pool) == (workload.name, "arm", "pool")
    assert run.slots == 8192
    assert run.output_rate * run.seconds == pytest.approx(requests * output)
    assert run.request_rate * run.seconds == pytest.approx(requests)
    # The first request is known, from the client's warm-up, up to its last token.
    prompt = system + 2 + question
    assert (requests - 1) * (system + 2) + prompt - 1 <= run.cached <= requests * (prompt - 1)
    assert run.retracted == 0
    policy = server.setup.policy
    assert (run.rounds >= requests * (output - BUDGET) // INTERVAL - requests) == policy
    held = BUDGET + INTERVAL if policy else output
    assert run.peak_slots <= system + requests * (2 + question + held) + 1
    assert run.peak_slots >= system + requests * (2 + question + held) - requests * 20
    assert max(running for _, running, _ in run.over_time) == requests
    assert 1 <= run.running <= requests
    assert run.read > run.running * prompt
    assert all(0 <= time <= run.seconds + 1 for time, _, _ in run.over_time)
    assert 0 < run.first_token[0] <= run.first_token[-1] < run.seconds
    assert 0 < run.between_tokens[0] <= run.between_tokens[-1] < run.seconds


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
    assert [len(pool.workloads) for pool in pools] == [1, 1, 1, 1, 3]
    assert all(pool.workloads[0].requests == TINY.sent[pool.name] for pool in pools)
    large = LARGE.pools()
    assert len(large) == 2 * 2 * len(LARGE.sent)
    assert [pool.slots for pool in large if pool.name == FULL] == [None] * 4


def test_arms_have_the_same_pool() -> None:
    arms = make_arms(TINY, 1000, [64], "auto", ["--page-size", "4"])
    assert [arm.name for arm in arms] == [PRODUCTION, "clip 64", CONSTRAINED, POLICY]
    stock = arms[0].arguments
    assert all(arm.arguments[: len(stock)] == stock for arm in arms)
    assert "--page-size" in stock
    assert arms[1].environment == {**arms[0].environment, CLIP_VARIABLE: "64"}
    assert arms[3].environment == {}
    assert "--max-total-tokens" not in make_arms(LARGE, None, [], "auto", [])[0].arguments


def test_cells_are_medians_beside_production() -> None:
    policy = replace(RUN, arm=POLICY, running=16.0, read=400.0)
    speeds = [
        (RUN, 40.0),
        (RUN, 50.0),
        (policy, 100.0),
        (RUN, 90.0),
        (policy, 150.0),
        (policy, 110.0),
    ]
    runs = [replace(run, output_rate=rate) for run, rate in speeds]
    other = replace(RUN, workload="random 1+1")
    (stock, ours), (alone,) = cells([*runs[::-1], other], BANDWIDTH)
    assert (stock.first.arm, stock.ratio, stock.allowed) == (PRODUCTION, 1.0, 1.0)
    assert ours.ratio == 110 / 50
    assert ours.allowed == pytest.approx((16 / 5000) / (4 / 3000))
    assert alone.first.workload == "random 1+1"
    assert best_clip([stock, ours]) is None


def group(ratio: float, cached: int, pool: str, workload: str = RUN.workload) -> list[Cell]:
    arms = {
        PRODUCTION: (1.0, 30),
        "clip 9": (1.5, 30),
        "clip 8": (1.2, 30),
        POLICY: (ratio, cached),
    }
    return [
        Cell([replace(RUN, arm=arm, cached=hits, pool=pool, workload=workload)], speed, 2.0)
        for arm, (speed, hits) in arms.items()
    ]


def test_goals() -> None:
    verdicts = [goal.met for goal in judge([group(1.7, 30, "4")], least=1.2)]
    assert verdicts == [True, True, True]
    missed = judge([group(1.1, 29, "4")], least=1.2)
    assert [goal.met for goal in missed] == [False, False, False]
    assert [goal.failed for goal in missed] == [False, False, True]
    assert [goal.met for goal in judge([group(0.98, 30, RICH)], 1.2)] == [True, True]
    assert [goal.met for goal in judge([group(0.97, 31, RICH)], 1.2)] == [False, True]
    assert [goal.met for goal in judge([group(1.0, 0, RICH, "random 1+1")], 1.2)] == [True]
    assert not judge([group(0.5, 0, "4", "random 1+1")], 1.2)


def test_table_and_picture(tmp_path: Path) -> None:
    shown = group(3.0, 30, "4")
    text = group_table(shown)
    assert "50 (50-50)" in text
    assert "0.10/0.20/0.30 s" in text
    assert "10/20/30 ms" in text
    assert "to the best clip (clip 9): 2.00 x" in text
    draw([shown, shown], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_workload_in_the_words_of_the_client() -> None:
    workload = shared_prefix("name", 2, 3, system=10, question=4, output=5)
    assert workload.requests == 6
    assert workload.pool_for(7) == 2 * 10 + 7 * (2 + 4 + 5)
    pairs = dict(zip(workload.arguments[::2], workload.arguments[1::2], strict=True))
    assert pairs["--gsp-num-groups"] == "2"
    assert pairs["--gsp-prompts-per-group"] == "3"
