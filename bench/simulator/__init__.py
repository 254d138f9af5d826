"""Oracle: a plain decoder with explicit KV lists that imports nothing of the project.

The server's outputs, log-probabilities and eviction choices are checked against it.
"""

from .conversation import Conversation, Restart
from .oracle import Oracle
from .policies import (
    Candidates,
    NoEviction,
    Policy,
    Ranking,
    Streaming,
    TriAttention,
)
from .registry import make_policy
from .request import Request, Round
from .selection import RoundMismatch
from .stats import Stats, load_stats
from .trace import Replay

__all__ = [
    "Candidates",
    "Conversation",
    "NoEviction",
    "Oracle",
    "Policy",
    "Ranking",
    "Replay",
    "Request",
    "Restart",
    "Round",
    "RoundMismatch",
    "Stats",
    "Streaming",
    "TriAttention",
    "load_stats",
    "make_policy",
]
