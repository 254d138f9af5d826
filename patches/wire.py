"""Whether the scheduler process can read what a client has sent.

SGLang's HTTP process hands on most fields as they came. The scheduler takes them for what they are
declared to be, and ends where they are not.
"""

from __future__ import annotations

import copy
import functools
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_tri.errors import shown

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

# What the hooks read. By default SGLang pickles messages, and serves some values of other types.
_READ = ("rid", "extra_key", "logprob_start_len", "positional_embed_overrides")
_READ_SAMPLING = ("max_new_tokens", "min_new_tokens")
# Large, or packed later, and none of it with a type of the client's choice.
_SKIPPED = ("input_ids", "mm_inputs", "mm_data_mooncake", "time_stats")


def unreadable(message: TokenizedGenerateReqInput) -> str:
    """The field of `message` that the scheduler cannot read, and why; "" if it can read all."""
    from sglang.srt.managers import io_struct

    if io_struct._USE_PICKLE_IPC:
        return _find(message, _READ) or _find(message.sampling_params, _READ_SAMPLING)
    small = copy.copy(message)
    for name in _SKIPPED:
        setattr(small, name, None)
    error = _unreadable(small, type(small))
    return "" if error is None else _find(small, small.__struct_fields__) or str(error)


def _find(struct: msgspec.Struct, names: Iterable[str]) -> str:
    """The first of these fields that cannot be read, and why; "" if each can by itself."""
    declared = _declared(type(struct))
    for name in names:
        value = getattr(struct, name)
        error = _unreadable(value, declared[name])
        if error is not None:
            nested = isinstance(value, msgspec.Struct)
            inside = _find(value, value.__struct_fields__) if nested else ""
            return inside or f"{name} {shown(value)} does not work: {error}"
    return ""


@functools.cache
def _declared(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return typing.get_type_hints(struct)


def _unreadable(value: object, declared: Any) -> Exception | None:
    """What goes wrong where `value` is packed, and unpacked as the type `declared`."""
    from sglang.srt.managers import io_struct

    try:
        packed = msgspec.msgpack.encode(value, enc_hook=io_struct.enc_hook)
        msgspec.msgpack.decode(packed, type=declared, dec_hook=io_struct.dec_hook)
    except Exception as error:  # Whatever it is, the scheduler would not survive it.
        return error
    return None
