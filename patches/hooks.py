"""What a hook is, and how hooks are put in place and verified."""

from __future__ import annotations

import functools
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_tri.errors import KvPolicyError

_PACKAGE = __name__.rpartition(".")[0]

BEFORE, AFTER, AROUND = "BEFORE", "AFTER", "AROUND"


@dataclass(frozen=True)
class Hook:
    """One hook.

    Attributes:
        stage: when it is installed, see `table`.
        target: dotted path of the hooked function.
        kind: a member of SGLang's `HookType`.
        function: the hook, as "module.name" in this package.
        parameters: leading parameters of the target that the hook counts on.
        purpose: what it is for.
    """

    stage: str
    target: str
    kind: str
    function: str
    parameters: tuple[str, ...]
    purpose: str

    def load(self) -> Callable[..., Any]:
        """The hook itself; what it imports is not needed before."""
        found: Callable[..., Any] = pkgutil.resolve_name(f"{_PACKAGE}.{self.function}")
        return found


def install(hooks: Sequence[Hook]) -> None:
    """Install `hooks` through SGLang's registry and verify each of them.

    Raises:
        KvPolicyError: a target is missing, has another signature, or was not replaced.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    register([hook for hook in hooks if not is_installed(hook)])
    HookRegistry.apply_hooks()
    verify(hooks)


def register(hooks: Sequence[Hook]) -> None:
    """Hand `hooks` to SGLang's registry, which applies them when all plugins are loaded.

    Raises:
        KvPolicyError: a target is missing or has another signature.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    _refuse([problem for hook in hooks if (problem := probe(hook))])
    source = HookSource("sglang_tri", "sglang-tri")
    for hook in hooks:
        HookRegistry.register(hook.target, hook.load(), HookType[hook.kind], source=source)


def wrap(hooks: Sequence[Hook]) -> None:
    """Put AROUND hooks in place at once, where SGLang's registry still waits for all plugins.

    A target that this SGLang does not have is left out: nothing calls it.
    """
    for row in hooks:
        if not probe(row) and not is_installed(row):
            path, name = row.target.rsplit(".", 1)
            setattr(pkgutil.resolve_name(path), name, _wrapped(_resolve(row.target), row.load()))


def _wrapped(function: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return hook(function, *args, **kwargs)

    return call


def verify(hooks: Sequence[Hook]) -> None:
    """Raise `KvPolicyError` unless every hook is in place: SGLang only logs what goes wrong."""
    _refuse([f"{h.target}: was not replaced" for h in hooks if not is_installed(h)])


def _refuse(problems: list[str]) -> None:
    if problems:
        raise KvPolicyError(
            "--kv-policy cannot hook into this SGLang: " + "; ".join(problems) + ". "
            "Run `sglang-tri doctor`, and install a tested version of SGLang."
        )


def probe(hook: Hook) -> str:
    """Why `hook` cannot be applied to the installed SGLang, or "" if it can."""
    try:
        function = _resolve(hook.target)
    except (ImportError, AttributeError) as error:
        return f"{hook.target}: {error}"
    parameters = tuple(inspect.signature(function).parameters)
    if parameters[: len(hook.parameters)] != hook.parameters:
        return f"{hook.target}: takes {parameters}, expected {hook.parameters}"
    return ""


def _resolve(target: str) -> Callable[..., Any]:
    """The plain function behind `target`."""
    path, name = target.rsplit(".", 1)
    owner = pkgutil.resolve_name(path)
    found = inspect.getattr_static(owner, name)
    return getattr(found, "__func__", found)


def is_installed(hook: Hook) -> bool:
    """Whether calling the target reaches the hook: SGLang's wrapper closes over it."""
    function: Any = _resolve(hook.target)
    wanted = hook.load()
    while function is not None:
        cells = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        if cells.get("hook") is wanted:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
