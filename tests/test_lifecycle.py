"""What only a loaded engine shows is checked before the server is ready."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import lifecycle


class OtherCache:
    pass


def scheduler(**values: Any) -> Any:
    return SimpleNamespace(**values)


def test_another_prefix_cache() -> None:
    with pytest.raises(KvPolicyError, match="OtherCache"):
        lifecycle._check_tree(scheduler(tree_cache=OtherCache()))


def test_another_pool() -> None:
    allocator = SimpleNamespace(get_kvcache=OtherCache)
    with pytest.raises(KvPolicyError, match="OtherCache"):
        lifecycle._read_pool(scheduler(token_to_kv_pool_allocator=allocator))


def test_a_window_in_one_layer() -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    def layer(number: int, window: int) -> RadixAttention:
        return RadixAttention(2, 16, 1.0, 1, layer_id=number, sliding_window_size=window)

    lifecycle._check_windows(torch.nn.ModuleList([layer(0, -1), layer(1, -1)]))
    with pytest.raises(KvPolicyError, match=r"window of 128 tokens \(layer 1\)"):
        lifecycle._check_windows(torch.nn.ModuleList([layer(0, -1), layer(1, 128)]))
