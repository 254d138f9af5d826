"""Requests in the main process, on their way to the scheduler: what it could not take ends here.

An error that a request causes in the scheduler ends the server for everybody. One that is raised
here is a 400 for who has sent it.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_tri.errors import KvPolicyError, shown
from sglang_tri.patches import flags, request_settings, salts, wire

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase
    from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

_COUNT = "kv_policy_refused"


def check_shape(manager: TokenizerManager, obj: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE generate_request: what SGLang takes the number of prompts and samples from."""
    params = getattr(obj, "sampling_params", None)
    if params == []:
        raise refused(manager, obj.rid, "sampling_params [] is empty: leave it out.")
    for own in params if isinstance(params, list) else [params]:
        samples = own.get("n") if isinstance(own, dict) else None
        if samples is not None and not _is_whole(samples):
            raise refused(manager, obj.rid, _not_whole("n", samples))


def check(manager: TokenizerManager, obj: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE _init_req_state: what of each request is read before it is packed."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not isinstance(obj, GenerateReqInput):
        return
    for item in _items(manager, obj):
        if not isinstance(item.rid, str):
            raise refused(manager, item.rid, f"rid {shown(item.rid)} does not work: send a string.")
        try:
            _check_sampling(manager, item.sampling_params)
        except KvPolicyError as error:
            raise refused(manager, item.rid, str(error)) from error


def _items(manager: TokenizerManager, obj: GenerateReqInput) -> list[GenerateReqInput]:
    """The requests that were sent together; a sample is one by itself."""
    if getattr(obj, "is_single", True):
        return [obj]
    try:
        return [obj[index] for index in range(obj.batch_size)]
    except (IndexError, TypeError) as error:
        reason = f"a list is shorter than the {obj.batch_size} prompts that it belongs to: {error}"
        raise refused(manager, obj.rid, reason) from error


def _check_sampling(manager: TokenizerManager, params: object) -> None:
    if not isinstance(params, dict):
        raise KvPolicyError(f"sampling_params {shown(params)} does not work: send one object.")
    for name in ("max_new_tokens", "min_new_tokens"):
        value = params.get(name)
        if value is not None and not _is_whole(value):
            raise KvPolicyError(_not_whole(name, value))
    settings = flags.attached(manager.server_args)
    if settings is not None:
        request_settings.settings_of(settings, params.get("custom_params"))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _not_whole(name: str, value: object) -> str:
    return f"{name} {shown(value)} does not work: send a whole number."


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
        _check_message(manager, message)
    return message


def _check_message(manager: TokenizerManager, message: TokenizedGenerateReqInput) -> None:
    if isinstance(message.extra_key, str):
        message.extra_key = salts.separated(message.extra_key)
    reason = wire.unreadable(message) or _impossible(message)
    if reason:
        raise refused(manager, message.rid, reason)


def _impossible(message: TokenizedGenerateReqInput) -> str:
    """What the scheduler can read and would end at; "" if there is nothing."""
    if not message.input_ids and not message.input_embeds:
        return "the prompt is empty: send a token at least."
    if message.logprob_start_len < -1:
        return (
            f"logprob_start_len {message.logprob_start_len} does not work: send a position in the "
            "prompt, or -1 for none."
        )
    return ""


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
