"""`--kv-stats auto`: statistics of the loaded model, measured once and kept.

`sglang-tri calibrate` does the same without serving.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sglang_tri import __version__
from sglang_tri import statistics as stats
from sglang_tri.config import AUTO, KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.patches.versions import measuring, serving
from sglang_tri.patches.versions.interface import Scheduler
from sglang_tri.statistics import Statistics, cache, calibration_text, files, identity
from sglang_tri.statistics.rope import Rope

logger = logging.getLogger(__name__)

# The measuring is eager, and nothing is served.
_SETTINGS = ("--kv-policy", "triattention", "--kv-stats", AUTO, "--disable-cuda-graph")


def run(output: Path, server_flags: list[str]) -> None:
    """Load the engine, measure its model anew, write the statistics to `output`.

    Raises:
        KvPolicyError: `output` or a flag that cannot be, or what the server would refuse.
    """
    _check(output, server_flags)
    with tempfile.TemporaryDirectory(prefix="sglang-tri-") as folder:
        os.environ[cache.FOLDER] = folder  # The scheduler process takes it from here.
        with serving.engine([*server_flags, *_SETTINGS]):
            (measured,) = Path(folder).glob("*.safetensors")
            stats.save_as(stats.load(measured), output)


def _check(output: Path, server_flags: list[str]) -> None:
    """What can be known before minutes of loading."""
    files.check_name(output)
    if not os.access(output.parent, os.W_OK):
        raise KvPolicyError(f"-o {output}: its folder cannot be written to.")
    for flag in server_flags:
        if flag.partition("=")[0] in _SETTINGS:
            raise KvPolicyError(f"{flag} is set by `calibrate` itself: leave it out.")


def automatic(scheduler: Scheduler, settings: KvPolicyConfig, rope: Rope) -> Statistics:
    """Statistics of the model that `scheduler` serves, from the cache or measured now.

    Raises:
        KvPolicyError: the text cannot be used, or the model's attention cannot be measured.
    """
    began = time.monotonic()
    sequences = _sequences(scheduler, settings)
    metadata = _metadata(scheduler, settings, rope, sequences)
    path = cache.path_of(metadata["architectures"][0], metadata["fingerprint"])
    found = cache.find(path, metadata["fingerprint"])
    if found is not None:
        logger.info("Query statistics: read from %s in %.1f s", path, time.monotonic() - began)
        return found
    statistics = _measure(scheduler, sequences, rope, metadata)
    took = time.monotonic() - began
    logger.info("Query statistics: measured with %d tokens in %.1f s", sequences.tokens, took)
    return cache.keep(statistics, path)


def _sequences(scheduler: Scheduler, settings: KvPolicyConfig) -> calibration_text.Sequences:
    return calibration_text.tokenize(
        calibration_text.Source(settings.calibration_text),
        measuring.tokenizer(scheduler),
        settings.calibration_tokens,
        min(measuring.longest_prefill(scheduler), calibration_text.LONGEST),
    )


def _metadata(
    scheduler: Scheduler,
    settings: KvPolicyConfig,
    rope: Rope,
    sequences: calibration_text.Sequences,
) -> dict[str, Any]:
    model = measuring.describe_model(scheduler)
    identified = {
        **model,
        "rope": [rope.frequencies.tolist(), rope.factor, rope.style, rope.head_dim],
        "weights": identity.weights(measuring.weights(scheduler)),
        "text": sequences.sha256,
        "version": __version__,
    }
    return {
        **model,
        "model_name": measuring.model_path(scheduler),
        "fingerprint": identity.fingerprint(identified),
        "tokens": sequences.tokens,
        "sequences": len(sequences.ids),
        "text": settings.calibration_text or "pydoc_data.topics",
        "text_sha256": sequences.sha256,
        "version": __version__,
    }


def _measure(
    scheduler: Scheduler,
    sequences: calibration_text.Sequences,
    rope: Rope,
    metadata: dict[str, Any],
) -> Statistics:
    moments = measuring.moments(scheduler, rope)
    bar = tqdm(
        desc="Query statistics",
        total=sequences.tokens * measuring.layers(scheduler),
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        mininterval=1,
    )
    with bar, measuring.measuring(scheduler, moments, bar.update):
        for ids in sequences.ids:
            measuring.prefill(scheduler, ids)
    return moments.statistics(sequences.tokens, metadata)
