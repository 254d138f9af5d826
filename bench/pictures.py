"""Whether pictures can be drawn."""

from __future__ import annotations

from importlib.util import find_spec


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None
