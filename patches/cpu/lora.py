"""SGLang's LoRA layers on a machine without an accelerator: nothing there can pin memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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


def unpin(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND LoRAManager's methods that make pinned tensors, themselves or in what they call."""
    with Unpinned():
        return original(manager, *args, **kwargs)
