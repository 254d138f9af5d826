"""`--kv-stats auto`: statistics of the loaded model, measured once and kept."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from sglang_tri import __version__
from sglang_tri.patches import capture
from sglang_tri.patches import engine_0517 as engine
from sglang_tri.statistics import cache, identity
from sglang_tri.statistics import calibration_text as text
from sglang_tri.statistics.moments import Moments

if TYPE_CHECKING:
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_tri.config import KvPolicyConfig
    from sglang_tri.statistics import Statistics
    from sglang_tri.statistics.rope import Rope

logger = logging.getLogger(__name__)


def automatic(
    scheduler: Scheduler, settings: KvPolicyConfig, module: RotaryEmbedding, rope: Rope
) -> Statistics:
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
    statistics = _measure(scheduler, sequences, module, rope, metadata)
    took = time.monotonic() - began
    logger.info("Query statistics: measured with %d tokens in %.1f s", sequences.tokens, took)
    return cache.keep(statistics, path)


def _sequences(scheduler: Scheduler, settings: KvPolicyConfig) -> text.Sequences:
    return text.tokenize(
        text.Source(settings.calibration_text),
        engine.tokenizer(scheduler),
        settings.calibration_tokens,
        min(engine.longest_prefill(scheduler), text.LONGEST),
    )


def _metadata(
    scheduler: Scheduler, settings: KvPolicyConfig, rope: Rope, sequences: text.Sequences
) -> dict[str, Any]:
    model = engine.describe_model(scheduler)
    identified = {
        **model,
        "rope": [rope.frequencies.tolist(), rope.factor, rope.style, rope.head_dim],
        "weights": identity.weights(scheduler.tp_worker.model_runner.model.state_dict().items()),
        "text": sequences.sha256,
        "version": __version__,
    }
    return {
        **model,
        "model_name": scheduler.server_args.model_path,
        "fingerprint": identity.fingerprint(identified),
        "tokens": sequences.tokens,
        "sequences": len(sequences.ids),
        "text": settings.calibration_text or "pydoc_data.topics",
        "text_sha256": sequences.sha256,
        "version": __version__,
    }


def _measure(
    scheduler: Scheduler,
    sequences: text.Sequences,
    module: RotaryEmbedding,
    rope: Rope,
    metadata: dict[str, Any],
) -> Statistics:
    runner = scheduler.tp_worker.model_runner
    layers = capture.attention_layers(runner.model, runner.model_config.num_hidden_layers)
    heads = layers[0].tp_q_head_num, layers[0].tp_k_head_num
    # Read at each use: the engine may replace the table at its first.
    moments = Moments(len(layers), *heads, rope, lambda: module.cos_sin_cache)
    bar = tqdm(
        desc="Query statistics",
        total=sequences.tokens * len(layers),
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        mininterval=1,
    )
    try:
        with (
            bar,
            torch.no_grad(),
            engine.every_core(),
            engine.eager_prefill(runner),
            capture.captured(layers, moments, bar.update),
        ):
            for ids in sequences.ids:
                engine.prefill(scheduler, ids)
        return moments.statistics(sequences.tokens, metadata)
    finally:
        engine.empty_pool(scheduler)
