"""The adapter for the SGLang that is installed, chosen once."""

from importlib.metadata import PackageNotFoundError, version

from sglang_tri.patches.versions import v0_5_17
from sglang_tri.patches.versions.interface import Adapter

# The newest last.
FAMILIES = (v0_5_17.ADAPTER,)
TESTED_VERSIONS = tuple(tested for family in FAMILIES for tested in family.versions)


def adapter_for(installed: str) -> Adapter:
    """The adapter for a version; for one that was not tested that for the newest."""
    fitting = [family for family in FAMILIES if installed in family.versions]
    return (fitting or FAMILIES)[-1]


def _installed() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:  # `sglang-tri stats` and `doctor` run all the same.
        return ""


adapter = adapter_for(_installed())
scheduling, loading = adapter.scheduling, adapter.loading
measuring, serving = adapter.measuring, adapter.serving
