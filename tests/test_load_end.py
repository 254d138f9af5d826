"""The serving benchmark ends early: by a signal, or because its time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.arms import Arm, running
from bench.cutoff import CLOSING_S, Clock, Interrupted, TimeUp, cut_off
from bench.load import sweep
from bench.load.client import Client, LoadFailed, Run
from bench.load.workloads import POLICY, PRODUCTION, Workload
from bench.server import Server
from bench.serving import main
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL
from tests.test_load import BANDWIDTH, RUN

ROOT = Path(__file__).parents[1]
OUTPUT = 120
EVICTED, UNTOUCHED = f"reasoning 128+{OUTPUT}", "never evicted 128+30"
SIZES = [
    *("--arms", PRODUCTION, POLICY, "--pools", "4", "--others-in", "4", "--outputs", str(OUTPUT)),
    *("--workloads", "reasoning", "never"),
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_block_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    closed = []

    def measure() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), number)
            closed.append(True)

    with pytest.raises(Interrupted, match=number.name), cut_off(Clock()):
        measure()
    assert closed
    assert signal.getsignal(number) is before


def test_time_is_up() -> None:
    began = time.monotonic()
    with pytest.raises(TimeUp, match="--limit"), cut_off(Clock(CLOSING_S + 0.2)):
        time.sleep(10)
    assert 0.1 < time.monotonic() - began < 5
    with pytest.raises(TimeUp), cut_off(Clock(1.0)):
        time.sleep(10)
    with cut_off(Clock()):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_signal_while_servers_end_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    class FakeServer:
        def __init__(self, model: Path, arguments: Any, log: Path, *_: Any) -> None:
            self.name = log.stem

        def wait_until_ready(self) -> None:
            pass

        def ask_to_end(self) -> None:
            pass

        def kill(self, patience: float) -> None:
            if not ended:
                ended.append("a signal")
                raise Interrupted
            ended.append(self.name)

    monkeypatch.setattr("bench.arms.Server", FakeServer)
    arms = [Arm("a", []), Arm("b", [])]
    with pytest.raises(Interrupted), running(arms, tmp_path, tmp_path, lambda: None):
        pass
    assert ended == ["a signal", "a", "b"]


def test_a_signal_while_a_server_starts_leaves_it_not_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even in the moment between the process and the object that knows it."""
    ended = []

    class FakeServer:
        def __init__(self, model: Path, arguments: Any, log: Path, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            self.name = log.stem

        def ask_to_end(self) -> None:
            pass

        def kill(self, patience: float) -> None:
            ended.append(self.name)

    monkeypatch.setattr("bench.arms.Server", FakeServer)
    arms = [Arm("a", []), Arm("b", [])]
    starting = running(arms, tmp_path, tmp_path, lambda: None)
    with pytest.raises(Interrupted), cut_off(Clock()), starting:
        pass
    assert ended == ["a"]


class FakeServer:
    def internal_state(self) -> dict[str, Any]:
        return {"memory_usage": {"token_capacity": 10**6}}

    def generate(self, **_: Any) -> None:
        pass


@contextmanager
def start_none(arms: list[Arm], *_: Any) -> Iterator[dict[str, FakeServer]]:
    yield {arm.name: FakeServer() for arm in arms}


def measured(_: Client, __: Any, workload: Workload, arm: str, pool: str) -> Run:
    """Reasoning takes a minute."""
    wall = 60.0 if workload.name == EVICTED else 5.0
    return RUN | {"arm": arm, "pool": pool, "workload": workload.name, "wall": wall}


@pytest.fixture
def no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "running", start_none)
    monkeypatch.setattr(Client, "measure", measured)
    monkeypatch.setattr("bench.serving.traffic_of", lambda model: BANDWIDTH)


@pytest.mark.parametrize(
    ("left", "skipped"), [(130, []), (110, [EVICTED]), (9, [EVICTED, UNTOUCHED])]
)
def test_a_repeat_that_does_not_fit_is_left_out(
    left: int,
    skipped: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_servers: None,
) -> None:
    """Of all arms alike; a shorter one still runs. What has run once does not fail the bench."""
    monkeypatch.setattr(Clock, "left", left)
    output = tmp_path / "serving.json"
    assert main([*SIZES, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["left_out"] == [
        f"left out: {name}, pool 4, {arm}: 1 runs"
        for name in skipped
        for arm in (PRODUCTION, POLICY)
    ]


def test_what_has_no_run_at_all_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_servers: None
) -> None:
    """And a pool that fails does not cost what another one shows."""

    def fails_in_pool_4(*arguments: Any) -> Run:
        if arguments[-1] == "4":
            raise LoadFailed("too much")
        return measured(*arguments)

    monkeypatch.setattr(Client, "measure", fails_in_pool_4)
    output = tmp_path / "serving.json"
    assert main([*SIZES, "--pools", "4", "8", "--output", str(output)]) == 1
    found = json.loads(output.read_text())
    assert found["failures"] == ["pool 4: too much"]
    assert {row["pool"] for row in found["rows"]} == {"8"}
    kept = output.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == found["runs"]
    assert found["left_out"][0] == f"left out: {EVICTED}, pool 4, production: 2 runs"


@pytest.mark.parametrize("there", [True, False])
def test_no_picture_without_matplotlib(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_servers: None
) -> None:
    monkeypatch.setattr("bench.pictures.available", lambda: there)
    assert main([*SIZES, "--output", str(tmp_path / "serving.json")]) == 0
    written = {"serving.json", "serving.jsonl", *(["serving.png"] if there else [])}
    assert {path.name for path in tmp_path.iterdir()} == written


def commands_with(word: str) -> list[str]:
    """Commands of processes that have `word` in them."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [command for command in commands if word in command]


@pytest.mark.server
def test_a_signal_while_servers_start(tmp_path: Path) -> None:
    """It ends them, and the results say what there is not."""
    output, said = tmp_path / "serving.json", tmp_path / "said"
    command = [*SIZES, "--budget", "16", "--interval", "16", "--output", str(output)]
    with said.open("w") as file:
        bench = subprocess.Popen(
            [sys.executable, "-m", "bench.serving", *command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
    servers: list[str] = []
    deadline = time.monotonic() + 120
    while len(servers) < 2 and bench.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        servers = [
            command for command in commands_with(str(tmp_path)) if "launch_server" in command
        ]
    bench.send_signal(signal.SIGTERM)
    assert bench.wait(60) == 1, said.read_text()
    assert len(servers) == 2
    assert commands_with(str(tmp_path)) == []
    found = json.loads(output.read_text())
    assert (found["failures"], found["rows"]) == (["ended by SIGTERM"], [])
    assert f"left out: {EVICTED}, pool 4, production: 2 runs" in found["left_out"]


@pytest.mark.full
@pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
def test_a_bench_whose_time_is_up(
    server: Running,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One server stands for both arms; there is time for the first repeat alone."""

    @contextmanager
    def start(arms: list[Arm], *_: Any) -> Iterator[dict[str, Server]]:
        yield {arm.name: server.server for arm in arms}

    monkeypatch.setattr(sweep, "running", start)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Clock, "left", property(lambda clock: 0.1))
    output = tmp_path / "serving.json"
    sizes = [*SIZES, "--budget", str(BUDGET), "--interval", str(INTERVAL)]
    assert main([*sizes, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert (found["failures"], len(found["left_out"])) == ([], 4)
    for name, rounds in (
        (EVICTED, 20 * ((OUTPUT - BUDGET) // INTERVAL - 1)),
        ("never evicted 128+45", 0),
    ):
        stock, policy = (run for run in found["runs"] if run["workload"] == name)
        assert [stock["arm"], policy["arm"]] == [PRODUCTION, POLICY]
        assert (policy["rounds"] >= rounds) if rounds else (policy["rounds"] == 0)
        assert stock["attention"] == policy["attention"] == "torch_native"
        assert found["seconds"] > stock["wall"] + policy["wall"]
    assert found["versions"].keys() == {"sglang", "torch"}
    assert found["command"].startswith("python -m bench.serving --arms production")
    assert found["machine"]
    assert len(output.with_suffix(".jsonl").read_text().splitlines()) == 4
    text = capsys.readouterr().out
    assert "[met] never evicted 128+45, pool 4: no round: 0 rounds" in text
    assert f"left out: {EVICTED}, pool 4, production: 1 runs" in text
