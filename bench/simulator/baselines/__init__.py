"""Published eviction policies to compare with: formulas from the papers, code our own."""

from .adakv import AdaKV
from .chance import Chance
from .future_attention import FutureAttention, Spliced
from .h2o import H2O
from .rkv import RKV
from .snapkv import SnapKV

__all__ = ["H2O", "RKV", "AdaKV", "Chance", "FutureAttention", "SnapKV", "Spliced"]
