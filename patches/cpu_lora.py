"""SGLang's LoRA layers on a machine without an accelerator: nothing there can pin memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from sglang.srt.lora.lora_manager import LoRAManager
from torch.overrides import TorchFunctionMode

# What of the manager makes pinned tensors, itself or in what it calls.
PINNING = ("__init__", "load_lora_adapter", "load_lora_adapter_from_tensors", "prepare_lora_batch")


class Unpinned(TorchFunctionMode):
    """A context in which tensors that were to be pinned are ordinary ones."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` without its `pin_memory`; as a method, that gives the tensor itself."""
        if func is torch.Tensor.pin_memory:
            return args[0]
        given = dict(kwargs or {})
        given.pop("pin_memory", None)
        return func(*args, **given)


def install() -> None:
    """Let SGLang's manager of adapters run `Unpinned`; once, however often it is called."""
    for name in PINNING:
        method = getattr(LoRAManager, name)
        if not hasattr(method, "__wrapped__"):
            setattr(LoRAManager, name, _unpinned(method))


def _unpinned(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with Unpinned():
            return method(*args, **kwargs)

    return run
