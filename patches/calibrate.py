"""`sglang-tri calibrate`: what a server does with `--kv-stats auto`, without serving."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sglang_tri import statistics as stats
from sglang_tri.config import AUTO
from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics import cache, files

# The measuring is eager, and nothing is served.
_SETTINGS = ("--kv-policy", "triattention", "--kv-stats", AUTO, "--disable-cuda-graph")


def run(output: Path, server_flags: list[str]) -> None:
    """Load the engine, measure its model anew, write the statistics to `output`.

    Raises:
        KvPolicyError: `output` or a flag that cannot be, or what the server would refuse.
    """
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    _check(output, server_flags)
    load_plugins()
    with tempfile.TemporaryDirectory(prefix="sglang-tri-") as folder:
        os.environ[cache.FOLDER] = folder  # The scheduler process takes it from here.
        engine = Engine(server_args=prepare_server_args([*server_flags, *_SETTINGS]))
        engine.shutdown()
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
