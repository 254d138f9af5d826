"""`python -m bench.gpu`: its steps run, and one that fails stops no other."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench import gpu
from bench.gpu import Step
from tests.interpreted import ON_GPU

# A step that hangs, with a server in a session of its own that would outlive it.
DEAF = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleep, start_new_session=True)
with open("{0}.new", "w") as file:
    print(os.getpid(), child.pid, file=file)
os.rename("{0}.new", "{0}")
time.sleep(600)
"""


def lives(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_gpu_runs_fits_into_its_limit() -> None:
    plan = gpu.steps(Path("results/h100"), False)
    # The steps of a group run at once.
    assert sum(max(step.limit_s for step in group) for group in plan) <= gpu.LIMIT_S
    names = {step.name: step for group in plan for step in group}
    command = names["serving"].command(200)
    assert command[:4] == ["-m", "bench.serving", "--limit", "200"]
    assert "--limit" not in names["kernels"].command(200)


def test_servers_get_further_arguments() -> None:
    more = ["--attention-backend", "flashinfer"]
    for group in gpu.steps(Path("results/h100"), False, more):
        for step in group:
            serves = step.name in ("exact", "serving")
            assert (step.command(100)[-3:] == ["--", *more]) is serves


def test_a_step_runs_and_leaves_its_figures(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--steps", "kernels", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(step["name"], step["status"]) for step in summary["steps"]] == [("kernels", 0)]
    figures = json.loads((tmp_path / "kernels" / "kernels.json").read_text())
    assert {"score", "score, 2 buffers"} <= {row["operation"] for row in figures["results"]}
    assert "these times mean nothing" in (tmp_path / "kernels.log").read_text()


@pytest.mark.slow
def test_a_failure_stops_no_other_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 1.0)
    group = [
        Step("kernel tests", ["-c", "import sys; sys.exit(3)"], 60),
        Step("exact", ["-c", DEAF.format(tmp_path / "pids")], 12),
    ]
    last = Step("serving", ["-c", "print('here')"], 60)
    monkeypatch.setattr(gpu, "steps", lambda *_: [group, [last]])
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["status"] for step in summary["steps"]] == [3, None, 0]
    assert (tmp_path / "serving.log").read_text() == "here\n"
    printed = capsys.readouterr().out
    assert "FAILED (3)" in printed
    assert "too long" in printed
    assert not any(map(lives, (tmp_path / "pids").read_text().split()))


def test_a_signal_ends_all_that_runs(tmp_path: Path) -> None:
    program = f"""
import sys
from bench import gpu
gpu.GRACE_S = 1.0
step = gpu.Step("exact", ["-c", {DEAF.format(tmp_path / "pids")!r}], 300)
gpu.steps = lambda *_: [[step]]
sys.exit(gpu.main(["--device", "cpu", "--out", {str(tmp_path)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert "SIGTERM" in said
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    assert not any(map(lives, pids))


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err
