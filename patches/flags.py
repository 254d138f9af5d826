"""Settings enter SGLang: flags, `ServerArgs(kv_...)`, and the way to the scheduler process."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_tri import config
from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

# A leading underscore: SGLang seals the other attributes once its arguments are resolved.
_ATTRIBUTE = "_kv_policy"


def add_flags(result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ServerArgs.add_cli_args."""
    config.add_arguments(parser)


def parse_flags(
    original: Callable[..., ServerArgs], cls: type[ServerArgs], args: argparse.Namespace
) -> ServerArgs:
    """AROUND ServerArgs.from_cli_args: SGLang drops what it does not know; keep ours."""
    try:
        settings = config.from_namespace(args)
        server_args = original(cls, args)
        attach(server_args, settings)
    except KvPolicyError as error:
        raise SystemExit(f"error: {error}") from error
    return server_args


def take_keywords(
    original: Callable[..., None], self: ServerArgs, *args: Any, **kwargs: Any
) -> None:
    """AROUND ServerArgs.__init__: `sgl.Engine(kv_policy=...)` passes its keywords on to here."""
    ours = {flag.keyword for flag in config.FLAGS} & set(kwargs)
    settings = KvPolicyConfig.from_keywords({name: kwargs.pop(name) for name in ours})
    original(self, *args, **kwargs)
    attach(self, settings)


def attach(server_args: ServerArgs, settings: KvPolicyConfig) -> None:
    """Check the settings against the server's other arguments and let them travel with these.

    Raises:
        KvPolicyError: the policy cannot run with these arguments.
    """
    if not settings.enabled:
        idle = [f.option for f in config.FLAGS if f.name in settings.explicit - {"policy"}]
        if idle:
            logger.warning("%s: no effect without --kv-policy.", ", ".join(idle))
        return
    from sglang_tri.patches import launch  # It names this module.

    launch.prepare(server_args, settings)
    # Plain values: the scheduler process unpickles them before any plugin is loaded.
    object.__setattr__(server_args, _ATTRIBUTE, settings.to_dict())


def attached(server_args: ServerArgs) -> KvPolicyConfig | None:
    """The settings of a server whose policy is on, else None."""
    values = vars(server_args).get(_ATTRIBUTE)
    return None if values is None else KvPolicyConfig.from_dict(values)
