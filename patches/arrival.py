"""Requests in the main process, on their way to the scheduler: what it could not take ends here.

An error that a request causes in the scheduler ends the server for everybody. One that is raised
here is a 400 for who has sent it.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Awaitable, Callable
from numbers import Integral
from typing import Any

from sglang_tri.errors import KvPolicyError, shown
from sglang_tri.patches import salts, server
from sglang_tri.patches.versions import serving
from sglang_tri.patches.versions.interface import TokenizerManager

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
    if not serving.is_generation(obj):
        return
    for item in _items(manager, obj):
        reason = _wrong_field(item) or _wrong_sampling(manager, item.sampling_params)
        if reason:
            raise refused(manager, item.rid, reason)


def _items(manager: TokenizerManager, obj: Any) -> list[Any]:
    """The requests that were sent together; a sample is one by itself."""
    if getattr(obj, "is_single", True):
        return [obj]
    try:
        return [obj[index] for index in range(obj.batch_size)]
    except (LookupError, TypeError) as error:
        reason = f"what was sent does not fit {obj.batch_size} prompts: {error!r}"
        raise refused(manager, obj.rid, reason) from error


def _wrong_field(item: Any) -> str:
    start, embeds = item.logprob_start_len, item.positional_embed_overrides
    for name in ("rid", "extra_key", "lora_path"):
        value = getattr(item, name)
        if not isinstance(value, str) and (value is not None or name == "rid"):
            return _wrong(name, value, "one string")
    if not isinstance(start, Integral) or (item.return_logprob and start < -1):
        return _wrong("logprob_start_len", start, "a position in the prompt, or -1")
    if embeds is not None and not serving.is_positional_embeds(embeds):
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
    settings = server.attached(manager.server_args) if custom_params else None
    try:
        if settings is not None:
            settings.for_request(custom_params)
    except KvPolicyError as error:
        return str(error)
    return ""


def _wrong(name: str, value: object, instead: str) -> str:
    return f"{name} {shown(value)} does not work: send {instead}."


def pack(
    original: Callable[..., Any], manager: TokenizerManager, obj: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND _create_tokenized_object: a message that the scheduler can read, or a 400."""
    try:
        message = original(manager, obj, *args, **kwargs)
    except (TypeError, OverflowError) as error:
        raise refused(manager, obj.rid, _wrong_token(obj) or str(error)) from error
    if serving.is_tokenized_generation(message):
        message.extra_key = salts.separated(message.extra_key)
        reason = serving.unreadable(message)
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


def join_key(original: Callable[..., str | None], endpoint: Any, request: Any) -> str | None:
    """AROUND _compute_extra_key: the joined string goes on knowing its parts, or it is a 400."""
    try:
        return salts.join(original, endpoint, request)
    except KvPolicyError as error:
        rid = getattr(request, "rid", None)
        raise refused(endpoint.tokenizer_manager, rid, str(error)) from error


def refused(manager: TokenizerManager, rid: object, reason: str) -> KvPolicyError:
    """Log and count a request that is not served; returns the error to raise."""
    logger.error("%s, rid=%s", reason, shown(rid))
    setattr(manager, _COUNT, count(manager) + 1)
    return KvPolicyError(reason)


def count(manager: TokenizerManager) -> int:
    """Requests that were refused in this process."""
    found: int = vars(manager).get(_COUNT, 0)
    return found


async def add_refused(
    original: Callable[..., Awaitable[list[dict[str, Any]]]], manager: TokenizerManager
) -> list[dict[str, Any]]:
    """AROUND TokenizerManager.get_internal_state: requests that never reached the scheduler.

    Another engine in this process may have no policy, and so no report.
    """
    states = await original(manager)
    for report in (state[server.KEY] for state in states if server.KEY in state):
        report["requests_refused"] += count(manager)
    return states
