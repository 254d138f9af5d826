"""When SGLang runs on the CPU platform: where it has nothing else to run on, and if asked to.

A process of SGLang chooses its platform once, while SGLang is imported: before it reads any flag.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sglang_tri.errors import KvPolicyError

# SGLang's variable that names a platform, and the name of ours among the entry points.
VARIABLE, NAME = "SGLANG_PLATFORM", "sglang_tri_cpu"
_CLASS = "sglang_tri.patches.cpu.platform.TorchCpuPlatform"
_OPTION, _OFF = "--kv-policy", "none"


def activate() -> str | None:
    """SGLang's entry point: dotted name of the platform's class, or None to stay out of the way.

    None where the platform is not needed, and where nobody asks for it, by `--kv-policy` on the
    command line (which SGLang's child processes see, too) or by `SGLANG_PLATFORM=sglang_tri_cpu`:
    SGLang then runs as if this package were not installed.
    """
    wanted = os.environ.get(VARIABLE) == NAME or _asks_for_policy(sys.argv)
    return _CLASS if wanted and is_needed() else None


def is_needed() -> bool:
    """Whether torch sees no accelerator, and SGLang's own CPU engine is not asked for."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return False
    import torch  # Here, because SGLang loads this module on every start.

    return not (torch.cuda.is_available() or torch.accelerator.is_available())


def environment() -> dict[str, str]:
    """Variables that let SGLang run on this machine without `--kv-policy` on the command line.

    None where the platform is not needed, or where the environment names one already.
    """
    return {} if os.environ.get(VARIABLE) or not is_needed() else {VARIABLE: NAME}


def check_platform() -> None:
    """Refuse a policy that nobody could know of when SGLang chose its platform.

    To be called before SGLang makes its arguments: without a platform they fail, and do not say
    what to do.

    Raises:
        KvPolicyError: the platform is needed, and SGLang has been imported without it.
    """
    if not is_needed():
        return
    from sglang.srt.platforms import current_platform

    if not current_platform.is_out_of_tree():
        raise KvPolicyError(
            f"{_OPTION} needs an accelerator, or the platform for machines without one: set "
            f"{VARIABLE}={NAME} in the environment before sglang is imported."
        )


def _asks_for_policy(arguments: Sequence[str]) -> bool:
    """Whether a command line turns a policy on; of several `--kv-policy`, the last one counts."""
    policy = _OFF
    for argument, following in zip(arguments, [*arguments[1:], _OFF], strict=True):
        if argument == _OPTION:
            policy = following
        elif argument.startswith(f"{_OPTION}="):
            policy = argument.removeprefix(f"{_OPTION}=")
    return policy != _OFF
