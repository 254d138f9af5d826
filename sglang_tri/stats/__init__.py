"""Query statistics: what they are, the files that hold them, and what they say."""

from sglang_tri.stats.files import load, save_as
from sglang_tri.stats.statistics import Statistics

__all__ = ["Statistics", "load", "save_as"]
