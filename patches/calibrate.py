"""`sglang-tri calibrate`: what a server does with `--kv-stats auto`, without serving."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sglang_tri import stats
from sglang_tri.calibration import cache
from sglang_tri.config import AUTO
from sglang_tri.errors import KvPolicyError

# The measuring is eager, and nothing is served.
_SETTINGS = ("--kv-policy", "triattention", "--kv-stats", AUTO, "--disable-cuda-graph")


def run(output: Path, server_flags: list[str]) -> None:
    """Load the engine, measure its model anew, write the statistics to `output`.

    Raises:
        KvPolicyError: the suffix of `output`, or what the server would refuse.
    """
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    if output.suffix not in (".pt", ".safetensors"):
        raise KvPolicyError(f"-o {output} must end in .safetensors or .pt.")
    load_plugins()
    with tempfile.TemporaryDirectory(prefix="sglang-tri-") as folder:
        os.environ[cache.FOLDER] = folder  # The scheduler process takes it from here.
        engine = Engine(server_args=prepare_server_args([*server_flags, *_SETTINGS]))
        engine.shutdown()
        (measured,) = Path(folder).glob("*.safetensors")
        stats.save_as(stats.load(measured), output)
