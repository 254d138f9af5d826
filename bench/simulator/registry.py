"""Every policy by name."""

from __future__ import annotations

from collections.abc import Callable

from .baselines import H2O, RKV, AdaKV, Chance, FutureAttention, SnapKV
from .policies import NoEviction, Policy, Streaming, TriAttention

POLICIES: dict[str, Callable[..., Policy]] = {
    "streaming": Streaming,
    "triattention": TriAttention,
    "snapkv": SnapKV,
    "adakv": AdaKV,
    "rkv": RKV,
    "h2o": H2O,
    "random": Chance,
    "future-attention": FutureAttention,
}
"""Those that evict."""


def make_policy(name: str, budget: int = 1, interval: int = 1, **options: object) -> Policy:
    """A policy by name; `none`, `streaming` and `triattention` are the server's names.

    Raises ValueError for a name that is unknown and options that the policy refuses.
    """
    if name == "none":
        return NoEviction()
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: none, {', '.join(POLICIES)}")
    return POLICIES[name](budget, interval, **options)
