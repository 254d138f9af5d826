"""Memory that the policy takes before SGLang sizes its KV pool by what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_tri.kernels.workspace import Workspace
from sglang_tri.parts import WORKSPACE_BYTES

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

_workspace: Workspace | None = None


def reserve(runner: ModelRunner, memory_pool_config: Any = None) -> None:
    """BEFORE alloc_memory_pool: rounds never take memory that the pool could have had."""
    global _workspace
    _workspace = Workspace(WORKSPACE_BYTES, runner.device)


def reserved() -> Workspace:
    """What was reserved in this process."""
    if _workspace is None:
        raise RuntimeError("the KV pool was allocated before the policy's memory was reserved")
    return _workspace
