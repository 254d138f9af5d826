"""SGLang's entry point for plugins; runs once in every SGLang process."""

from __future__ import annotations

from sglang_tri.patches import hooks, table


def load() -> None:
    """Add the flags and wait for a server whose policy is on.

    If a hook cannot be installed, the flags are missing and `--kv-policy` is refused as unknown;
    in the scheduler process, the main process finds out (`server.confirm`).
    """
    hooks.register(table.stage(table.ENTRY))
