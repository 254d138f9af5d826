"""Oracle: a plain decoder with explicit KV lists that imports nothing of the project.

The server's outputs, log-probabilities and eviction choices are checked against it.
"""

from .oracle import Oracle, Replay
from .policies import (
    Candidates,
    NoEviction,
    Policy,
    Ranking,
    Streaming,
    TriAttention,
    make_policy,
)
from .request import Round
from .selection import RoundMismatch
from .stats import Stats, load_stats

__all__ = [
    "Candidates",
    "NoEviction",
    "Oracle",
    "Policy",
    "Ranking",
    "Replay",
    "Round",
    "RoundMismatch",
    "Stats",
    "Streaming",
    "TriAttention",
    "load_stats",
    "make_policy",
]
