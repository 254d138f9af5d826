"""Import a module although one that it imports, and that is not used here, is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


@contextmanager
def stand_in(package: str, *names: str) -> Iterator[None]:
    """In this block, `package` can be imported: where it is not installed, as an empty one.

    Args:
        names: what is imported from it; None there.
    """
    if find_spec(package):
        yield
        return
    module = ModuleType(package)
    module.__spec__ = ModuleSpec(package, None)
    vars(module).update(dict.fromkeys(names))
    sys.modules[package] = module
    try:
        yield
    finally:
        del sys.modules[package]
