"""The policy's hooks on SGLang's classes in this process, and off again."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.plugins import hook_registry
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_parallel, reset_context

from sglang_tri.patches import hooks, scheduler, table


@contextmanager
def hooked() -> Iterator[None]:
    """Inside, this process is a scheduler process of its own; afterwards it is none."""
    installed = table.stage(table.SCHEDULER)
    before = {hook.target: _find(hook.target) for hook in installed}
    hooks.install(installed)
    try:
        with get_parallel().override(moe_ep_size=1):
            yield
    finally:
        for target, (owner, raw) in before.items():
            _restore(target, owner, raw)
        reset_context()
        scheduler.activate(None)
        assert not any(hooks.is_installed(hook) for hook in installed)


def _find(target: str) -> tuple[Any, Any]:
    """What holds `target`, and what it holds: of a class method the descriptor."""
    path, name = target.rsplit(".", 1)
    owner = pkgutil.resolve_name(path)
    return owner, inspect.getattr_static(owner, name)


def _restore(target: str, owner: Any, raw: Any) -> None:
    """SGLang's registry knows no way back. It patches modules that imported a function as well."""
    name = target.rsplit(".", 1)[1]
    patched = inspect.getattr_static(owner, name)
    setattr(owner, name, raw)
    hook_registry._propagate_patch(patched, raw, owner)
    HookRegistry._hooks.pop(target)
    HookRegistry._patched.discard(target)
