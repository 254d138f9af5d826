"""`python -m bench.gpu`: its steps run, and one that fails stops no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu import Step
from tests.interpreted import ON_GPU


def test_what_a_gpu_runs_fits_into_its_limit() -> None:
    plan = gpu.steps(Path("results/h100"), False)
    # The steps of a group run at once.
    assert sum(max(step.limit_s for step in group) for group in plan) <= gpu.LIMIT_S
    [serving] = [step for group in plan for step in group if step.name == "serving"]
    limit_s = float(serving.arguments[serving.arguments.index("--limit") + 1])
    assert limit_s + gpu.GRACE_S < serving.limit_s


def test_servers_get_further_arguments() -> None:
    more = ["--attention-backend", "flashinfer"]
    for group in gpu.steps(Path("results/h100"), False, more):
        for step in group:
            serves = step.name in ("exact", "serving")
            assert (step.arguments[-3:] == ["--", *more]) is serves


def test_a_step_runs_and_leaves_its_figures(tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--steps", "kernels", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(step["name"], step["status"]) for step in summary["steps"]] == [("kernels", 0)]
    figures = json.loads((tmp_path / "kernels" / "kernels.json").read_text())
    assert {"score", "score, 2 buffers"} <= {row["operation"] for row in figures["results"]}
    assert "these times mean nothing" in (tmp_path / "kernels.log").read_text()


def test_a_failure_stops_no_other_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = [
        Step("kernel tests", ["-c", "import sys; sys.exit(3)"], 60),
        Step("exact", ["-c", "import time; time.sleep(60)"], 0.5),
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


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err
