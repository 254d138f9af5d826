"""`sglang-tri doctor`: versions, hooks, platform, and whether the policy would run."""

from __future__ import annotations

import dataclasses
import platform as host
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version

from sglang_tri.config import KvPolicyConfig
from sglang_tri.patches import hooks, refusals, server, table
from sglang_tri.patches.versions import serving
from sglang_tri.patches.versions.interface import ServerArgs

_DISTRIBUTIONS = ("sglang-tri", "sglang", "torch", "transformers", "triton", "flashinfer-python")


def run(settings: KvPolicyConfig, model_path: str | None) -> int:
    """Print the report; returns 0 if the policy would run here, else 1.

    Without `--kv-policy` it checks `streaming`, which needs neither a model nor statistics.
    """
    if not settings.enabled:
        settings = dataclasses.replace(settings, policy="streaming")
    print("Versions", f"  python {host.python_version()}", sep="\n")
    for name in _DISTRIBUTIONS:
        print(f"  {name} {_version(name)}")
    print("Platform", f"  {serving.platform()}", sep="\n")
    problems = _print_hooks() + _check(settings, model_path)
    print("Attention", f"  {_attention(model_path)}", sep="\n")
    print(f"Policy {settings.policy}")
    for problem in problems:
        print(f"  FAIL {problem}")
    print("  would not run" if problems else "  would run")
    return 1 if problems else 0


def _print_hooks() -> list[str]:
    print("Hooks")
    problems = []
    for hook in table.TABLE:
        problem = hooks.probe(hook)
        print(f"  {'FAIL' if problem else 'ok':4} {hook.kind:6} {hook.target}: {hook.purpose}")
        problems += [problem] if problem else []
    return problems


def _check(settings: KvPolicyConfig, model_path: str | None) -> list[str]:
    """Problems of the settings on this machine, with this model if one is given."""
    problems = []
    plugins = {entry.value for entry in entry_points(group="sglang.srt.plugins")}
    if "sglang_tri.patches.plugin:load" not in plugins:
        problems.append("SGLang does not see the plugin: install sglang-tri in this environment")
    try:
        refusals.check_version(settings)
        server.read_sources(settings)
        if model_path is not None:
            server.check(_server_args(model_path), settings)
    except Exception as error:  # SGLang also raises AssertionError and others.
        problems.append(str(error))
    return problems


def _attention(model_path: str | None) -> str:
    """What SGLang runs attention with, unless a flag says otherwise."""
    if model_path is None:
        return "depends on the model: give --model-path"
    try:
        prefill, decode = serving.attention_backends(_server_args(model_path))
    except Exception as error:  # SGLang also raises AssertionError and others.
        return f"not known: {error}"
    return f"prefill {prefill}, decode {decode}"


@cache
def _server_args(model_path: str) -> ServerArgs:
    return serving.server_args(model_path)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
