"""Load the project's kernels for Triton's interpreter, where there is no GPU to run them.

Triton decides when a kernel is defined how it will run, so this comes before all other imports.
"""

from __future__ import annotations

import importlib
import os

import torch

ON_GPU = torch.cuda.is_available()
INTERPRET = "TRITON_INTERPRET"

if not ON_GPU:
    os.environ[INTERPRET] = "1"
    for name in ("score", "select", "compact"):
        importlib.import_module(f"sglang_tri.kernels.{name}_triton")
    # Servers and other programs that the tests start have nothing to do with it.
    del os.environ[INTERPRET]
