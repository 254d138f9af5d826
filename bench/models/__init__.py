"""Pretrained models that anyone can have from the package index; see `bench.models.catalogue`."""

from bench.models.catalogue import CATALOGUE, Packaged
from bench.models.store import ModelUnavailable, get

__all__ = ["CATALOGUE", "ModelUnavailable", "Packaged", "get"]
