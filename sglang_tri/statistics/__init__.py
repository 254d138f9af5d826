"""Query statistics: what they are, the files that hold them, and what they say."""

from sglang_tri.statistics.files import load, save_as
from sglang_tri.statistics.statistics import Statistics

__all__ = ["Statistics", "load", "save_as"]
