"""Whether the scheduler process can read what a client has sent.

With SGLANG_USE_PICKLE_IPC=0 SGLang's HTTP process packs most fields as they came, and its scheduler
unpacks them by their declared types and ends at the first that differs. (By default it pickles
messages: nothing is checked, and some values of other types are served.)
"""

from __future__ import annotations

import copy
import typing
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_tri.errors import shown

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

# Large, or packed later, and none of it with a type of the client's choice.
_SKIPPED = ("input_ids", "mm_inputs", "mm_data_mooncake", "time_stats")


def unreadable(message: TokenizedGenerateReqInput) -> str:
    """The field of `message` that the scheduler cannot read, and why; "" if it can read all."""
    from sglang.srt.managers import io_struct

    if io_struct._USE_PICKLE_IPC:
        return ""
    small = copy.copy(message)
    for name in _SKIPPED:
        setattr(small, name, None)
    error = _unreadable(small, type(small))
    return "" if error is None else _find(small) or str(error)


def _find(struct: msgspec.Struct) -> str:
    """The first field of `struct` that cannot be read, and why; "" if each can by itself."""
    declared = typing.get_type_hints(type(struct))
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        error = _unreadable(value, declared[name])
        if error is not None:
            inside = _find(value) if isinstance(value, msgspec.Struct) else ""
            return inside or f"{name} {shown(value)} does not work: {error}"
    return ""


def _unreadable(value: object, declared: Any) -> Exception | None:
    """What goes wrong where `value` is packed, and unpacked as the type `declared`."""
    from sglang.srt.managers import io_struct

    try:
        packed = msgspec.msgpack.encode(value, enc_hook=io_struct.enc_hook)
        msgspec.msgpack.decode(packed, type=declared, dec_hook=io_struct.dec_hook)
    except Exception as error:  # Whatever it is, the scheduler would not survive it.
        return error
    return None
