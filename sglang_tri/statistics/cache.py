"""Statistics that were made once, in a folder of the user's."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from sglang_tri import statistics as stats
from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics import Statistics

logger = logging.getLogger(__name__)

FOLDER = "SGLANG_KV_POLICY_CACHE"


def folder() -> Path:
    """$SGLANG_KV_POLICY_CACHE, or `sglang-tri` in the user's cache folder by the XDG rules.

    Raises:
        KvPolicyError: there is no home folder, and none of the variables is set.
    """
    if chosen := os.environ.get(FOLDER):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "sglang-tri"
    try:
        return Path.home() / ".cache" / "sglang-tri"
    except RuntimeError as error:
        raise KvPolicyError(
            f"--kv-stats auto keeps its result in the home folder, and there is none ({error}): "
            f"set {FOLDER} to a folder."
        ) from error


def path_of(architecture: str, fingerprint: str) -> Path:
    """Where statistics with this fingerprint are kept; the architecture is for people."""
    return folder() / f"{architecture}-{fingerprint[:16]}.safetensors"


def find(path: Path, fingerprint: str) -> Statistics | None:
    """Statistics kept at `path`; None where there are none, or other or damaged ones."""
    try:
        if not path.exists():
            return None
        found = stats.load(path)
    except (KvPolicyError, OSError) as error:
        logger.warning("Kept query statistics cannot be used, they are made anew: %s", error)
        return None
    if found.metadata.get("fingerprint") != fingerprint:
        logger.warning("%s was made for another model or text, it is made anew.", path)
        return None
    return found


def keep(statistics: Statistics, path: Path) -> Statistics:
    """Write the file, or warn that the next start has to calibrate again.

    Returns:
        `statistics`, with their path if they have one now.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stats.save_as(statistics, path)
    except OSError as error:
        logger.warning(
            "Query statistics cannot be kept (%s): the next start calibrates again. "
            "Set %s to a folder that can be written to.",
            error,
            FOLDER,
        )
        return statistics
    return replace(statistics, path=str(path))
