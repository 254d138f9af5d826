"""The CPU platform takes over where SGLang has nothing else to run on, and only if asked to."""

from __future__ import annotations

import argparse
import os
import pkgutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from sglang.srt import platforms
from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.interface import SRTPlatform

from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import server
from sglang_tri.patches.cpu import activation
from sglang_tri.patches.cpu.activation import NAME, VARIABLE, activate, check_platform
from sglang_tri.patches.cpu.platform import TorchCpuPlatform

ENGINE = "SGLANG_USE_CPU_ENGINE"
POLICY = ["--kv-policy", "streaming"]
NO_ACCELERATOR = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="needs a machine without accelerator"
)
SAID = f"--kv-policy needs .* set {VARIABLE}={NAME} in the environment before sglang is imported"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine on which torch sees no accelerator, whatever this one has; nothing is asked for."""
    monkeypatch.delenv(ENGINE, raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(sys, "argv", ["launch_server.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return monkeypatch


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], False),
        (["--kv-policy", "streaming"], True),
        (["--model-path", "any", "--kv-policy=streaming", "--port", "1"], True),
        (["--kv-policy", "none"], False),
        (["--kv-policy=none"], False),
        (["--kv-budget", "64"], False),
        (["--kv-policy"], False),
        (["--kv-policy", "none", "--kv-policy=random"], True),
        (["--kv-policy=random", "--kv-policy", "none"], False),
    ],
)
def test_a_policy_asks_for_it(bare: pytest.MonkeyPatch, arguments: list[str], wanted: bool) -> None:
    bare.setattr(sys, "argv", ["launch_server.py", *arguments])
    assert (activate() is not None) == wanted


def test_the_environment_asks_for_it(bare: pytest.MonkeyPatch) -> None:
    bare.setenv(VARIABLE, "another")
    assert activate() is None
    bare.setenv(VARIABLE, NAME)
    found = activate()
    assert found is not None
    assert pkgutil.resolve_name(found) is TorchCpuPlatform


@pytest.mark.parametrize("module", [torch.cuda, torch.accelerator])
def test_gives_way_to_an_accelerator(bare: pytest.MonkeyPatch, module: object) -> None:
    bare.setattr(module, "is_available", lambda: True)
    bare.setattr(sys, "argv", ["launch_server.py", *POLICY])
    assert activation.environment() == {}
    assert activate() is None
    bare.setenv(VARIABLE, NAME)
    assert activate() is None


def test_gives_way_to_the_cpu_engine(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(sys, "argv", ["launch_server.py", *POLICY])
    bare.setenv(ENGINE, "0")
    assert activate() is not None
    bare.setenv(ENGINE, "1")
    assert activation.environment() == {}
    assert activate() is None


def test_what_programs_of_ours_add(bare: pytest.MonkeyPatch) -> None:
    for unset in (None, ""):
        if unset is not None:
            bare.setenv(VARIABLE, unset)
        assert activation.environment() == {VARIABLE: NAME}
    bare.setenv(VARIABLE, "another")
    assert activation.environment() == {}


@pytest.mark.slow
@NO_ACCELERATOR
@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, [], "SRTPlatform False"),
        ({}, POLICY, "TorchCpuPlatform True"),
        ({VARIABLE: NAME}, [], "TorchCpuPlatform True"),
        ({ENGINE: "1"}, POLICY, "CpuSRTPlatform False"),
    ],
)
def test_sglang_resolves_it_through_the_entry_point(
    environment: dict[str, str], arguments: list[str], expected: str
) -> None:
    """Unless it is asked for, SGLang is left with what it has without us: no platform."""
    code = (
        "from sglang.srt.platforms import current_platform as p;"
        "print(type(p).__name__, p.is_out_of_tree())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[-2] == expected


def use(monkeypatch: pytest.MonkeyPatch, platform: SRTPlatform) -> None:
    monkeypatch.setattr(platforms, "_current_platform", platform)


def test_a_policy_that_sglang_learns_of_too_late(bare: pytest.MonkeyPatch) -> None:
    """Before SGLang's own arguments fail, by keyword and by a flag that was not recognised."""
    use(bare, SRTPlatform())

    def original(*_: Any, **__: Any) -> Any:
        raise AssertionError("SGLang was called")

    with pytest.raises(KvPolicyError, match=SAID):
        server.take_keywords(original, object(), kv_policy="streaming")  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match=f"error: {SAID}"):
        server.parse_flags(original, object, argparse.Namespace(kv_policy="streaming"))  # type: ignore[arg-type]
    for policy in ("none", None):
        with pytest.raises(AssertionError, match="SGLang was called"):
            server.take_keywords(original, object(), kv_policy=policy)  # type: ignore[arg-type]


def test_where_a_policy_comes_in_time(bare: pytest.MonkeyPatch) -> None:
    use(bare, TorchCpuPlatform())
    check_platform()
    use(bare, CpuSRTPlatform())
    bare.setenv(ENGINE, "1")
    check_platform()
    bare.delenv(ENGINE)
    use(bare, SRTPlatform())
    bare.setattr(torch.accelerator, "is_available", lambda: True)
    check_platform()


@pytest.mark.server
@NO_ACCELERATOR
def test_an_engine_says_what_to_set(servers: Any) -> None:
    model = str(servers.model("qwen3"))
    code = f"import sglang as sgl; sgl.Engine(model_path={model!r}, kv_policy='streaming')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, VARIABLE: ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "KvPolicyError: --kv-policy needs an accelerator, or the platform" in done.stderr
    assert f"{VARIABLE}={NAME}" in done.stderr.strip().splitlines()[-1]
