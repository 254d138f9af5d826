"""The arguments of a server with SGLang 0.5.17, its model, and messages between its processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from sglang_tri.patches.versions.v0_5_17.wire import unreadable as unreadable

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.server_args import ServerArgs

model_config = methodcaller("get_model_config")


def server_args(model_path: str) -> ServerArgs:
    """The arguments of a server for a model, all others as SGLang chooses them."""
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(model_path=model_path)


def attach(args: ServerArgs, name: str, value: object) -> None:
    """Let `value` travel with the arguments, also once SGLang has sealed them."""
    object.__setattr__(args, name, value)


def attached(args: ServerArgs, name: str) -> Any:
    """What travels with the arguments, or None."""
    return vars(args).get(name)


def attention_backends(args: ServerArgs) -> tuple[str, str]:
    """The names of those that prefill and decode run with."""
    prefill, decode = args.get_attention_backends()
    return prefill, decode


def switch(name: str) -> bool:
    """Whether a switch in the environment is on, as SGLang itself reads it."""
    from sglang.srt.environ import envs

    return bool(getattr(envs, name).get())


def rope_settings(model: ModelConfig) -> dict[str, Any]:
    """RoPE in the model's configuration: `rope_theta`, `rope_type` and what else that has."""
    from sglang.srt.utils.hf_transformers_utils import get_rope_config

    theta, scaling = get_rope_config(model.hf_text_config)
    settings = dict(scaling or {})
    kind = settings.get("rope_type") or settings.get("type") or "default"
    return {**settings, "rope_type": kind, "rope_theta": theta}


def has_latent_attention(model: ModelConfig) -> bool:
    """Whether all heads share one latent row (MLA)."""
    from sglang.srt.configs.model_config import AttentionArch

    return model.attention_arch != AttentionArch.MHA


def has_recurrent_layers(model: ModelConfig) -> bool:
    """Whether some layers have a state instead of a KV cache."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(model) is not None


def platform() -> str:
    """The platform that SGLang has chosen on this machine."""
    from sglang.srt.platforms import current_platform

    return f"{current_platform.device_name} ({type(current_platform).__name__})"


@contextmanager
def engine(flags: Sequence[str]) -> Iterator[None]:
    """Inside, an engine is loaded with the command line `flags`, in processes of its own."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    loaded = Engine(server_args=prepare_server_args([*flags]))
    try:
        yield
    finally:
        loaded.shutdown()


def is_generation(request: Any) -> bool:
    """Whether it asks for text, and not for embeddings."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    return isinstance(request, GenerateReqInput)


def is_tokenized_generation(message: Any) -> bool:
    """The same of what goes to the scheduler."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    return isinstance(message, TokenizedGenerateReqInput)


def is_positional_embeds(value: Any) -> bool:
    from sglang.srt.managers.embed_types import PositionalEmbeds

    return isinstance(value, PositionalEmbeds)


def collect_reports(manager: TokenizerManager, message: Any, key: str) -> None:
    """Take what `publish_at_end` sent out of the per-token information.

    SGLang would hand it to the user as a list with one element for each output token.
    """
    from sglang.srt.managers.io_struct import (
        BatchEmbeddingOutput,
        unwrap_from_pickle,
        wrap_as_pickle,
    )

    if isinstance(message, BatchEmbeddingOutput) or message.customized_info is None:
        return
    info = unwrap_from_pickle(message.customized_info)
    ours = info.pop(key, None)
    if ours is None:
        return
    message.customized_info = wrap_as_pickle(info) if info else None
    for rid, values in zip(message.rids, ours, strict=True):
        state = manager.rid_to_state.get(rid)
        if state is not None and values and values[-1] is not None:
            setattr(state, key, values[-1])


def report_of(manager: TokenizerManager, request: Any, key: str) -> Callable[[], Any]:
    """What gives the report of a request that is being answered, or None before it has come."""
    state = manager.rid_to_state[request.rid]
    return lambda: vars(state).get(key)
