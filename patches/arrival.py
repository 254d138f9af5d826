"""Requests in the main process, on their way to the scheduler: what it could not take ends here.

An error that a request causes in the scheduler ends the server for everybody. One that is raised
here is a 400 for who has sent it.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING, Any

from sglang_tri.errors import KvPolicyError, shown
from sglang_tri.patches import flags, request_settings, salts, wire

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase
    from sglang.srt.managers.io_struct import GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

_COUNT = "kv_policy_refused"


def check_shape(manager: TokenizerManager, obj: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE generate_request: what SGLang takes the number of requests and their adapter from."""
    params = getattr(obj, "sampling_params", None)
    if params == []:
        raise refused(manager, obj.rid, "sampling_params [] is empty: leave it out.")
    for own in params if isinstance(params, list) else [params]:
        samples = own.get("n", 1) if isinstance(own, dict) else 1
        if samples != 1 and not isinstance(samples, Integral):
            raise refused(manager, obj.rid, _wrong("n", samples, "a whole number"))
    # SGLang's own name of an adapter, which it works out from `lora_path`.
    if getattr(obj, "lora_id", None) is not None:
        raise refused(manager, obj.rid, _wrong("lora_id", obj.lora_id, "lora_path"))


def check_fields(manager: TokenizerManager, obj: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE _init_req_state: the fields of each request that are read on its way or later."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not isinstance(obj, GenerateReqInput):
        return
    for item in _items(manager, obj):
        reason = _wrong_field(item) or _wrong_sampling(manager, item.sampling_params)
        if reason:
            raise refused(manager, item.rid, reason)


def _items(manager: TokenizerManager, obj: GenerateReqInput) -> list[GenerateReqInput]:
    """The requests that were sent together; a sample is one by itself."""
    if getattr(obj, "is_single", True):
        return [obj]
    try:
        return [obj[index] for index in range(obj.batch_size)]
    except (LookupError, TypeError) as error:
        reason = f"what was sent does not fit {obj.batch_size} prompts: {error!r}"
        raise refused(manager, obj.rid, reason) from error


def _wrong_field(item: GenerateReqInput) -> str:
    from sglang.srt.managers.embed_types import PositionalEmbeds

    start, embeds = item.logprob_start_len, item.positional_embed_overrides
    for name in ("rid", "extra_key", "lora_path"):
        value = getattr(item, name)
        if not isinstance(value, str) and (value is not None or name == "rid"):
            return _wrong(name, value, "one string")
    if not isinstance(start, Integral) or (item.return_logprob and start < -1):
        return _wrong("logprob_start_len", start, "a position in the prompt, or -1")
    if embeds is not None and not isinstance(embeds, PositionalEmbeds):
        return _wrong("positional_embed_overrides", embeds, "none over HTTP")
    return ""


def _wrong_sampling(manager: TokenizerManager, params: object) -> str:
    if not isinstance(params, dict):
        return _wrong("sampling_params", params, "one object")
    for name in ("max_new_tokens", "min_new_tokens"):
        value = params.get(name)
        if value is not None and not isinstance(value, Integral):
            return _wrong(name, value, "a whole number")
    custom_params = params.get("custom_params")
    settings = flags.attached(manager.server_args) if custom_params else None
    try:
        if settings is not None:
            request_settings.settings_of(settings, custom_params)
    except KvPolicyError as error:
        return str(error)
    return ""


def _wrong(name: str, value: object, instead: str) -> str:
    return f"{name} {shown(value)} does not work: send {instead}."


def pack(
    original: Callable[..., Any], manager: TokenizerManager, obj: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND _create_tokenized_object: a message that the scheduler can read, or a 400."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    try:
        message = original(manager, obj, *args, **kwargs)
    except (TypeError, OverflowError) as error:
        raise refused(manager, obj.rid, _wrong_token(obj) or str(error)) from error
    if isinstance(message, TokenizedGenerateReqInput):
        message.extra_key = salts.separated(message.extra_key)
        reason = wire.unreadable(message)
        if reason:
            raise refused(manager, message.rid, reason)
    return message


def _wrong_token(obj: Any) -> str:
    """The first input id that is no 64-bit number; "" if all are."""
    for position, token in enumerate(obj.input_ids or ()):
        try:
            array("q", [token])
        except (TypeError, OverflowError):
            return f"token {shown(token)} at position {position} of the input is not a token id."
    return ""


def join_key(
    original: Callable[..., str | None], serving: OpenAIServingBase, request: Any
) -> str | None:
    """AROUND _compute_extra_key: the joined string goes on knowing its parts, or it is a 400."""
    try:
        return salts.join(original, serving, request)
    except KvPolicyError as error:
        rid = getattr(request, "rid", None)
        raise refused(serving.tokenizer_manager, rid, str(error)) from error


def refused(manager: TokenizerManager, rid: object, reason: str) -> KvPolicyError:
    """Log and count a request that is not served; returns the error to raise."""
    logger.error("%s, rid=%s", reason, shown(rid))
    setattr(manager, _COUNT, count(manager) + 1)
    return KvPolicyError(reason)


def count(manager: TokenizerManager) -> int:
    """Requests that were refused in this process."""
    found: int = vars(manager).get(_COUNT, 0)
    return found
