"""An out-of-tree SGLang platform for machines without an accelerator.

Unmodified SGLang serves on a CPU only with kernels built for that. Registered as a platform, this
class steers it to its plain torch paths instead: slow, but the scheduler, the radix tree and the
KV pools are the real ones, so everything built on them runs and can be tested without a GPU.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch
from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)


def activate() -> str | None:
    """Dotted name of the platform class, or None to leave this machine to SGLang.

    None where torch sees an accelerator of any kind, and where the environment asks for SGLang's
    own CPU engine (`SGLANG_USE_CPU_ENGINE=1`).
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if torch.cuda.is_available() or torch.accelerator.is_available():
        return None
    return f"{__name__}.{TorchCpuPlatform.__qualname__}"


class TorchCpuPlatform(CpuSRTPlatform):
    """SGLang on a CPU through torch alone.

    Being out-of-tree (`PlatformEnum.OOT`) makes every SGLang op take its `forward_native` path.
    Device, memory (of the whole host) and gloo answers are those of SGLang's CPU platform.
    """

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        pass

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_device(self, device_id: int | None = None) -> str:
        # SGLang's device detection wants a string and may pass no index.
        return "cpu"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        return MLATokenToKVPool

    def get_paged_allocator_cls(self) -> Callable[..., object]:
        from sglang_tri.patches.cpu_allocator import make_allocator

        return make_allocator
