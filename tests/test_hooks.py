"""Hooks: one table, verified when installed, and nothing but the flags without a policy."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import arrival, cli, hooks, server, table
from sglang_tri.patches.hooks import BEFORE, Hook
from sglang_tri.patches.server import KEY, READY

TARGET = "sglang.srt.managers.schedule_batch.ScheduleBatch.check_decode_mem"


def hook(target: str = TARGET, parameters: tuple[str, ...] = ("self",)) -> Hook:
    return Hook("test", target, BEFORE, "scheduler.plan_rounds", parameters, "test")


@pytest.mark.parametrize("row", table.TABLE, ids=lambda row: row.target.rsplit(".", 1)[-1])
def test_every_hook_fits_this_sglang(row: Hook) -> None:
    assert hooks.probe(row) == ""
    assert callable(row.load())


def test_a_missing_or_changed_target_is_named() -> None:
    assert "no_such_method" in hooks.probe(
        hook(TARGET.replace("check_decode_mem", "no_such_method"))
    )
    assert "no_such_module" in hooks.probe(hook("sglang.srt.no_such_module.f"))
    assert "expected ('self', 'renamed')" in hooks.probe(hook(parameters=("self", "renamed")))
    with pytest.raises(KvPolicyError, match="sglang-tri doctor"):
        hooks.install([hook(parameters=("renamed",))])


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_what_is_installed_when(servers: object) -> None:
    """Without a policy the flags, and what the CPU platform needs; and a hook that SGLang skips
    does not go unnoticed.
    """
    model = servers.model("qwen3")  # type: ignore[attr-defined]
    code = f"""
import json
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import prepare_server_args
load_plugins()
args = prepare_server_args(["--model-path", {str(model)!r}, "--kv-policy", "none"])
from sglang_tri.patches import hooks, table
installed = [hook.stage for hook in table.TABLE if hooks.is_installed(hook)]
attributes = [name for name in vars(args) if "kv_policy" in name]
# Another plugin patches a target first: SGLang then ignores later hooks on it, without an error.
HookRegistry.register({TARGET!r}, lambda *a, **k: None, HookType.BEFORE)
HookRegistry.apply_hooks()
try:
    hooks.install(table.stage(table.SCHEDULER))
except ValueError as error:
    said = str(error)
print(json.dumps([sorted(set(installed)), len(installed), attributes, said]))
"""
    stages, count, attributes, said = json.loads(run(code))
    assert stages == [table.CPU, table.ENTRY]
    assert count == len(table.stage(table.CPU)) + len(table.stage(table.ENTRY))
    assert attributes == []
    assert "check_decode_mem: was not replaced" in said


def test_a_scheduler_without_the_policy_is_noticed() -> None:
    server_args = SimpleNamespace()
    info = {"status": "ready"}
    launched = (None, None, None, SimpleNamespace(scheduler_infos=[info]))
    server.confirm(launched, object, server_args)  # type: ignore[arg-type]
    vars(server_args)[server._ATTRIBUTE] = KvPolicyConfig(policy="streaming").to_dict()
    with pytest.raises(RuntimeError, match="not active in the scheduler"):
        server.confirm(launched, object, server_args)  # type: ignore[arg-type]
    info[READY] = "streaming"
    server.confirm(launched, object, server_args)  # type: ignore[arg-type]
    assert info == {"status": "ready"}


def test_an_engine_without_a_policy_beside_one_with() -> None:
    """The hooks of one process are those of all engines in it."""
    manager: Any = SimpleNamespace()
    arrival.refused(manager, "r", "no")

    async def states(_: Any) -> list[dict[str, Any]]:
        return [{}, {KEY: {"requests_refused": 2}}]

    found = asyncio.run(arrival.add_refused(states, manager))
    assert found == [{}, {KEY: {"requests_refused": 3}}]


def test_a_copy_that_lost_the_policy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_prepared", True)
    launched = (None, None, None, SimpleNamespace(scheduler_infos=[{"status": "ready"}]))
    with pytest.raises(RuntimeError, match="does not have it"):
        server.confirm(launched, object, SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.slow
def test_doctor_says_that_it_would_run() -> None:
    doctor = [str(Path(sys.executable).with_name("sglang-tri")), "doctor"]
    environment = {**os.environ, "SGLANG_PLATFORM": ""}
    well = subprocess.run(
        doctor, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert well.returncode == 0, well.stdout + well.stderr
    assert "sglang 0.5.17" in well.stdout
    assert "TorchCpuPlatform" in well.stdout
    assert well.stdout.count("ok ") == len(table.TABLE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kv-policy", "triattention", "--kv-calibration-text", "absent.txt"], "absent.txt"),
        (["--kv-policy", "triattention", "--kv-stats", "absent.pt"], "absent.pt"),
        (["--model-path", "no/such/model"], "no/such/model"),
    ],
)
def test_doctor_says_why_not(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "would not run" in printed
    assert said in printed
