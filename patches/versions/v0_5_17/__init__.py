"""SGLang 0.5.17."""

from sglang_tri.patches.versions.interface import Adapter
from sglang_tri.patches.versions.v0_5_17 import loading, measuring, scheduling, serving

ADAPTER = Adapter(("0.5.17",), scheduling, loading, measuring, serving)
