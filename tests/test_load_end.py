"""The serving benchmark ends early: by a signal, or because its time is up."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.arms import Arm, running
from bench.cutoff import CLOSING_S, Clock, Interrupted, TimeUp, cut_off
from bench.load import report, sweep
from bench.load.absent import stand_in
from bench.load.arms import POLICY, PRODUCTION
from bench.load.plan import all_measured, left_out
from bench.load.presets import PRESETS
from bench.load.run import Run
from bench.load.sweep import Sweep
from bench.load.workloads import Workload
from bench.server import Server
from bench.serving import main
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL
from tests.test_load import RUN

ROOT = Path(__file__).parents[1]
OUTPUT = 120
EVICTED = f"reasoning 128+{OUTPUT}"
SIZES = [
    *("--arms", PRODUCTION, POLICY, "--pools", "4", "--others-in", "4", "--outputs", str(OUTPUT)),
    *("--workloads", "reasoning", "never"),
]
TINY = replace(
    PRESETS["tiny"], arms=[PRODUCTION, POLICY], sent={"4": 20}, others=[], others_in=["4"]
)


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


def test_what_was_left_out() -> None:
    policy = replace(RUN, arm=POLICY)
    key = RUN.pool, RUN.workload
    planned = Counter({(*key, PRODUCTION): 2, (*key, POLICY): 2})
    assert left_out(planned, [RUN, policy, RUN, policy]) == []
    assert left_out(planned, [RUN, policy, RUN]) == [
        "reasoning 10+20, pool 4, triattention: 1 of 2 runs"
    ]
    assert all_measured(planned, [RUN, policy])
    assert not all_measured(planned, [RUN, RUN])


def test_a_repeat_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all arms alike; a shorter one still runs."""

    class FakeServer:
        def internal_state(self) -> dict[str, Any]:
            return {"memory_usage": {"token_capacity": 10**6}}

        def generate(self, **_: Any) -> None:
            pass

    @contextmanager
    def start(arms: list[Arm], *_: Any) -> Iterator[dict[str, FakeServer]]:
        yield {arm.name: FakeServer() for arm in arms}

    def measured(_: Any, __: Any, workload: Workload, arm: str, pool: str, ___: bool) -> Run:
        wall = 60.0 if workload.name.startswith("reasoning") else 5.0
        return replace(RUN, arm=arm, pool=pool, workload=workload.name, wall=wall)

    monkeypatch.setattr(sweep, "running", start)
    monkeypatch.setattr(sweep, "measure", measured)
    fake: Any = None
    arguments = argparse.Namespace(repeats=2, stats="auto", server_arguments=[])
    (pool,) = TINY.pools()
    evicted, never = (workload.name for workload in pool.workloads)
    for left, skipped in ((130, []), (110, [evicted]), (9, [evicted, never])):
        clock = Clock(CLOSING_S + left)
        benched = Sweep(TINY, arguments, tmp_path, fake, tmp_path, len, list, clock)
        runs = list(benched.measure(pool))
        missing = left_out(benched.planned(pool), runs)
        assert missing == [
            f"{name}, pool 4, {arm}: 1 of 2 runs" for name in skipped for arm in TINY.arms
        ]
        assert all_measured(benched.planned(pool), runs)


def test_a_package_that_is_not_there() -> None:
    with stand_in("no_such_package", "name"):
        found = importlib.import_module("no_such_package")
        assert found.name is None
    assert "no_such_package" not in sys.modules
    with stand_in("json", "name"):
        assert importlib.import_module("json") is json


def test_no_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = [object()]
    monkeypatch.setattr(report.pictures, "available", lambda: False)
    assert "matplotlib" in report._draw(found, tmp_path / "serving.json")
    assert list(tmp_path.iterdir()) == []


def commands_with(word: str) -> list[str]:
    """Commands of processes that have `word` in them."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [command for command in commands if word in command]


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
    assert (found["failures"], found["groups"]) == (["ended by SIGTERM"], [])
    assert f"{EVICTED}, pool 4, production: 2 of 2 runs" in found["left_out"]


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
    evicted, never = found["groups"]
    for group, rounds in ((evicted, 20 * ((OUTPUT - BUDGET) // INTERVAL - 1)), (never, 0)):
        (stock,), (policy,) = (cell["runs"] for cell in group["cells"])
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
    assert f"left out: {EVICTED}, pool 4, production: 1 of 2 runs" in text
