"""The programs in docs/examples do what their docstrings say, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_tri.patches.cpu import activation
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
ONE = pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
LONG = 3 * (BUDGET + INTERVAL)
REPORT = re.compile(
    r"^(?P<name>.+): (?P<cached>\d+) of (?P<prompt>\d+) prompt tokens cached, "
    r"(?P<history>\w+) history,.* (?P<evicted>\d+) evicted in (?P<rounds>\d+) rounds$",
    re.MULTILINE,
)


def run(name: str, *arguments: str, **environment: str) -> dict[str, dict[str, Any]]:
    """What an example reports of its requests, by their names."""
    inherited = {name: x for name, x in os.environ.items() if name != activation.VARIABLE}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [match.groupdict() for match in REPORT.finditer(done.stdout)]
    return {
        row["name"]: {key: int(x) if x.isdigit() else x for key, x in row.items()} for row in found
    }


@pytest.mark.server
def test_engine(servers: Any, tmp_path: Path) -> None:
    """On a CPU it asks for the platform itself; it measures the model, and finds its history."""
    turns = run(
        "engine.py",
        *("--model-path", str(servers.model("qwen3")), "--max-tokens", str(LONG)),
        *("--budget", str(BUDGET), "--interval", str(INTERVAL)),
        SGLANG_KV_POLICY_CACHE=str(tmp_path),
    )
    assert list(turns) == ["turn 1", "turn 2"]
    first, second = turns.values()
    assert first["history"] == "exact"
    assert second["history"] == "compressed"
    assert min(first["rounds"], second["rounds"]) >= 5
    assert second["cached"] >= first["prompt"] + LONG - 1
    assert list(tmp_path.iterdir())


@ONE
def test_openai_agent(server: Running) -> None:
    turns = run(
        "openai_agent.py",
        *("--base-url", server.server.url, "--max-tokens", str(LONG)),
        *("--answer-start", "<think>\n"),
    )
    assert list(turns) == ["turn 1", "turn 2", "turn 3"]
    assert [turn["history"] for turn in turns.values()] == ["exact", "compressed", "compressed"]
    for earlier, later in zip(list(turns.values()), list(turns.values())[1:], strict=False):
        assert earlier["rounds"] >= 5
        assert later["cached"] >= earlier["prompt"] + LONG - 1


@ONE
def test_frontend_program(server: Running) -> None:
    found = run("frontend_program.py", "--base-url", server.server.url, "--max-tokens", str(LONG))
    assert set(found) == {"thought", "careful", "quick", "conclusion"}
    thought = found.pop("thought")
    assert thought["history"] == "exact"
    assert thought["rounds"] >= 5
    for later in found.values():
        assert later["history"] == "compressed"
        assert later["cached"] >= thought["prompt"] + LONG - 1
    assert found["conclusion"]["rounds"] >= 5
