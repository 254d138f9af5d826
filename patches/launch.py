"""The main process of a server whose policy is on: refuse early, and confirm that it runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sglang_tri import statistics as stats
from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import engine_0517 as engine
from sglang_tri.patches import flags, hooks, refusals
from sglang_tri.patches.responses import READY
from sglang_tri.policies import POLICIES
from sglang_tri.statistics import Statistics
from sglang_tri.statistics import calibration_text as text

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

# Whether arguments with a policy were made that no server has been started with yet.
_prepared = False


def prepare(server_args: ServerArgs, settings: KvPolicyConfig) -> None:
    """Before anything is started: refuse what cannot work, install the main process's hooks.

    Raises:
        KvPolicyError: what cannot work, by flag, value and reason.
    """
    from sglang_tri.patches import table  # It names this module.

    hooks.verify(table.stage(table.ENTRY))
    refusals.check_version(settings)
    check(server_args, settings)
    hooks.install(table.stage(table.MAIN))
    global _prepared
    _prepared = True


def check(server_args: ServerArgs, settings: KvPolicyConfig) -> None:
    """Refuse arguments, models and statistics that the policy cannot run with."""
    refusals.check_server_args(server_args)
    check_reuse(server_args, settings)
    model = server_args.get_model_config()
    refusals.check_model_config(model)
    check_statistics(settings, model)


def check_reuse(server_args: ServerArgs, settings: KvPolicyConfig) -> None:
    """Refuse reuse that was asked for where there is no prefix cache."""
    if server_args.disable_radix_cache and settings.continues and "reuse" in settings.explicit:
        raise KvPolicyError(
            "--kv-reuse continuation does not work with --disable-radix-cache: there is nothing "
            "that a later request could find history in. Leave one of them out."
        )


def read_statistics(settings: KvPolicyConfig) -> Statistics | None:
    """Statistics in the file that the settings name, if they name one.

    Raises:
        KvPolicyError: the file cannot be read.
    """
    if settings.stats_file is None:
        return None
    with naming_statistics():
        return stats.load(settings.stats_file)


def read_sources(settings: KvPolicyConfig) -> Statistics | None:
    """As `read_statistics`; refuses a text that statistics cannot be made with later, too."""
    if settings.calibrates:
        text.Source(settings.calibration_text).read()
    return read_statistics(settings)


@contextmanager
def naming_statistics() -> Iterator[None]:
    """Inside, errors of a file become those of the flag that names it."""
    try:
        yield
    except KvPolicyError as error:
        raise KvPolicyError(f"--kv-stats {error} (--kv-stats auto makes new ones.)") from error


def check_statistics(settings: KvPolicyConfig, model: Any) -> None:
    """Refuse unreadable statistics, and those of another geometry or RoPE."""
    found = read_sources(settings)
    if found is None:
        return
    with naming_statistics():
        found.check_geometry(model.num_hidden_layers, model.num_attention_heads, model.head_dim)
        found.check_rope_settings(engine.rope_settings(model))
        if settings.enabled and POLICIES[settings.policy].needs_second_moments:
            found.check_second_moments(settings.policy)
    served = model.model_path.rstrip("/").rsplit("/", 1)[-1]
    named = (found.model_name or served).rstrip("/").rsplit("/", 1)[-1]
    if named != served:
        logger.warning("--kv-stats %s was made for %s, serving %s.", found.path, named, served)


def confirm(
    result: tuple[Any, ...],
    cls: type[Engine],
    server_args: ServerArgs,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AFTER Engine._launch_subprocesses: the scheduler has said that its hooks are in place.

    SGLang logs errors of plugins and goes on; a server that silently keeps every token would look
    like one that works.
    """
    global _prepared
    settings = flags.attached(server_args)
    if settings is None:
        if _prepared:
            raise RuntimeError(
                "--kv-policy was set, but a copy of the server's arguments is served that does not "
                "have it (made by dataclasses.asdict, for example): pass the original on."
            )
        return
    _prepared = False
    scheduler_infos = result[3].scheduler_infos
    if not all(info.pop(READY, None) == settings.policy for info in scheduler_infos):
        raise RuntimeError(
            f"--kv-policy {settings.policy} is not active in the scheduler process: is sglang-tri "
            "installed for it, and not filtered out by SGLANG_PLUGINS?"
        )
