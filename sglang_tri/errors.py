"""The one exception that a user of the command line or the Python API should see."""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60


class KvPolicyError(ValueError):
    """A setting that cannot work; the message names the flag, the value and what would work."""


def shown(value: object) -> str:
    """`value` as a message shows it: what a client sends may be of any size."""
    return _SHORT.repr(value)
