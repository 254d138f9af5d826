"""What keeps the cached prefixes of requests apart: salt, key and adapter, and none for another.

SGLang joins `cache_salt` and `extra_key` without a separator, and the id of a LoRA adapter behind
them, so that different pairs can give one string. Here they travel as a JSON array, which no other
pair gives, and which an adapter's id cannot continue to another one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sglang_tri.errors import KvPolicyError, shown


class SaltedKey(str):
    """Salt and key as SGLang joins them, which also remembers both."""

    salt: str | None
    key: str | None


def join(original: Callable[..., str | None], endpoint: Any, request: Any) -> str | None:
    """What `original` makes of a request's salt and key, as a string that goes on knowing both.

    Raises:
        KvPolicyError: one of them is no string.
    """
    salt, key = (_part(request, name) for name in ("cache_salt", "extra_key"))
    joined = original(endpoint, request)
    if joined is None:
        return None
    salted = SaltedKey(joined)
    salted.salt, salted.key = salt, key
    return salted


def _part(request: Any, name: str) -> str | None:
    value = getattr(request, name, None)
    if value and not isinstance(value, str):
        raise KvPolicyError(f"{name} {shown(value)} does not work: send one string.")
    return value or None


def separated(extra_key: str | None) -> str | None:
    """What stands for salt and key in the scheduler; `/generate` knows no salt."""
    if extra_key is None:
        return None
    if isinstance(extra_key, SaltedKey):
        return json.dumps([extra_key.salt, extra_key.key])
    return json.dumps([None, extra_key])
