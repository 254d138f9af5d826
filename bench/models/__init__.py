"""Models for tests and benches: pretrained ones from packages, tiny random ones, bare shapes."""

from bench.models.catalogue import CATALOGUE, Packaged
from bench.models.download import ModelUnavailable, get

__all__ = ["CATALOGUE", "ModelUnavailable", "Packaged", "get"]
