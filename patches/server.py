"""Settings enter SGLang, a server that cannot work is refused, and answers say what was done.

Hooks of the main process; the scheduler process reads the same settings and statistics.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_tri import config
from sglang_tri import statistics as stats
from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import hooks, refusals, table
from sglang_tri.patches.cpu.activation import check_platform
from sglang_tri.patches.versions import serving
from sglang_tri.patches.versions.interface import ModelConfig, ServerArgs, TokenizerManager
from sglang_tri.policies import POLICIES
from sglang_tri.statistics import Statistics, calibration_text

logger = logging.getLogger(__name__)

# In `meta_info` of a response, and in `/server_info`.
KEY = "kv_policy"
# In the scheduler's message that it is ready; taken out again by the main process.
READY = "_kv_policy"
# A leading underscore: SGLang seals the other attributes once its arguments are resolved.
_ATTRIBUTE = "_kv_policy"

# Whether arguments with a policy were made that no server has been started with yet.
_prepared = False


# Settings.


def add_flags(result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ServerArgs.add_cli_args."""
    config.add_arguments(parser)


def parse_flags(
    original: Callable[..., ServerArgs], cls: type[ServerArgs], args: argparse.Namespace
) -> ServerArgs:
    """AROUND ServerArgs.from_cli_args: SGLang drops what it does not know; keep ours."""
    try:
        settings = config.from_namespace(args)
        if settings.enabled:
            check_platform()
        server_args = original(cls, args)
        attach(server_args, settings)
    except KvPolicyError as error:
        raise SystemExit(f"error: {error}") from error
    return server_args


def take_keywords(
    original: Callable[..., None], server_args: ServerArgs, *args: Any, **kwargs: Any
) -> None:
    """AROUND ServerArgs.__init__: `sgl.Engine(kv_policy=...)` passes its keywords on to here."""
    ours = {flag.keyword for flag in config.FLAGS} & set(kwargs)
    settings = KvPolicyConfig.from_keywords({name: kwargs.pop(name) for name in ours})
    if settings.enabled:
        check_platform()
    original(server_args, *args, **kwargs)
    attach(server_args, settings)


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
    _prepare(server_args, settings)
    # Plain values: the scheduler process unpickles them before any plugin is loaded.
    serving.attach(server_args, _ATTRIBUTE, settings.to_dict())


def attached(server_args: ServerArgs) -> KvPolicyConfig | None:
    """The settings of a server whose policy is on, else None."""
    values = serving.attached(server_args, _ATTRIBUTE)
    return None if values is None else KvPolicyConfig(**values)


# The start.


def _prepare(server_args: ServerArgs, settings: KvPolicyConfig) -> None:
    """Before anything is started: refuse what cannot work, install the main process's hooks.

    Raises:
        KvPolicyError: what cannot work, by flag, value and reason.
    """
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
    model = serving.model_config(server_args)
    refusals.check_model_config(model)
    check_statistics(settings, model)


def check_reuse(server_args: ServerArgs, settings: KvPolicyConfig) -> None:
    """Refuse reuse that was asked for where there is no prefix cache."""
    asked = settings.continues and "reuse" in settings.explicit
    if asked and server_args.disable_radix_cache:
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
    with errors_name_flag("--kv-stats"):
        return stats.load(settings.stats_file)


def read_sources(settings: KvPolicyConfig) -> Statistics | None:
    """As `read_statistics`; refuses a text that statistics cannot be made with later, too."""
    if settings.calibrates:
        calibration_text.Source(settings.calibration_text).read()
    return read_statistics(settings)


@contextmanager
def errors_name_flag(flag: str) -> Iterator[None]:
    """Inside, errors of a file become those of the flag that names it."""
    try:
        yield
    except KvPolicyError as error:
        raise KvPolicyError(f"{flag} {error} ({flag} auto makes new ones.)") from error


def check_statistics(settings: KvPolicyConfig, model: ModelConfig) -> None:
    """Refuse unreadable statistics, and those of another geometry or RoPE."""
    found = read_sources(settings)
    if found is None:
        return
    with errors_name_flag("--kv-stats"):
        found.check_geometry(model.num_hidden_layers, model.num_attention_heads, model.head_dim)
        found.check_rope_settings(serving.rope_settings(model))
    if settings.enabled:
        POLICIES[settings.policy].check_second_moments(found.q_square is not None)
    served = model.model_path.rstrip("/").rsplit("/", 1)[-1]
    named = (found.model_name or served).rstrip("/").rsplit("/", 1)[-1]
    if named != served:
        logger.warning("--kv-stats %s was made for %s, serving %s.", found.path, named, served)


def confirm(
    result: tuple[Any, ...],
    cls: type,
    server_args: ServerArgs,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AFTER Engine._launch_subprocesses: the scheduler has said that its hooks are in place.

    SGLang logs errors of plugins and goes on; a server that silently keeps every token would look
    like one that works.
    """
    global _prepared
    settings = attached(server_args)
    if settings is None:
        if _prepared:
            raise RuntimeError(
                "--kv-policy was set, but a copy of the server's arguments is served that does not "
                "have it (made by dataclasses.asdict, for example): pass the original on."
            )
        return
    _prepared = False
    infos = result[3].scheduler_infos
    if not all(info.pop(READY, None) == settings.policy for info in infos):
        raise RuntimeError(
            f"--kv-policy {settings.policy} is not active in the scheduler process: is sglang-tri "
            "installed for it, and not filtered out by SGLANG_PLUGINS?"
        )


# Responses.


def collect(manager: TokenizerManager, recv_obj: Any) -> None:
    """BEFORE _handle_batch_output: take the requests' reports out of the scheduler's message."""
    serving.collect_reports(manager, recv_obj, KEY)


async def deliver(
    original: Callable[..., AsyncIterator[dict[str, Any]]],
    manager: TokenizerManager,
    obj: Any,
    *args: Any,
    **kwargs: Any,
) -> AsyncIterator[dict[str, Any]]:
    """AROUND _wait_one_response: add a request's report to `meta_info`, as a plain dict."""
    report = serving.report_of(manager, obj, KEY)
    async for response in original(manager, obj, *args, **kwargs):
        if (info := report()) is not None:
            response["meta_info"][KEY] = info
        yield response
