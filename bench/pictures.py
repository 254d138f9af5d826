"""Whether pictures can be drawn."""

from __future__ import annotations

import importlib


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        return False
    return True
