"""The accuracy bench from the command line, over both models that ship."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from bench.accuracy import __main__ as accuracy
from bench.accuracy.evaluation import plan, recall, reconstruction
from bench.accuracy.reference_model import DIFFUSE, FOLDER


@pytest.mark.full
def test_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reports on each and on both, and goes on from the outcomes that are there."""
    monkeypatch.setattr(plan, "SHARES", (0.25, accuracy.AT))
    for module in (recall, reconstruction):
        monkeypatch.setattr(module, "INSTANCES", 1)
    arguments = f"accuracy --models {FOLDER} {DIFFUSE} --methods random triattention --tasks tree"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--out", str(tmp_path), "--within", "50"])
    sys.argv += ["--instances", "2"]
    accuracy.main()
    said = capsys.readouterr().out
    assert said.count("tree, depth 14, progress") == 2
    assert re.search(r"R 0\.68 +R 1\.00", said)
    assert all((tmp_path / name / "budget.png").exists() for name in ("concentrated", "diffuse"))
    assert (tmp_path / "concentration.png").exists()
    outcomes = tmp_path / "concentrated" / "outcomes.jsonl"
    lines = outcomes.read_text().splitlines()
    cells = {json.dumps(json.loads(line)["cell"]) for line in lines}
    # Two methods, each at two budgets, and at three more depths.
    assert (len(cells), len(lines)) == (10, 20)
    accuracy.main()
    assert outcomes.read_text().splitlines() == lines
    assert capsys.readouterr().out == said


def test_a_method_that_there_is_not_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", "--methods", "published", "snapvk"])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert "--methods snapvk: published, ablations" in capsys.readouterr().err


def test_one_instance_has_no_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", "--instances", "1"])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert "--instances 1: 2 or more" in capsys.readouterr().err
