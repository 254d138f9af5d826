"""Settings that a request brings itself, in `custom_params["kv_policy"]` of its sampling
parameters. A client sends them: they may be anything that JSON can say.
"""

from __future__ import annotations

import os

from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError, shown

# They are not public yet: tests switch them on.
PER_REQUEST = "SGLANG_KV_POLICY_PER_REQUEST"


def allowed() -> bool:
    """Whether requests may bring settings of their own."""
    return os.environ.get(PER_REQUEST) == "1"


def settings_of(server: KvPolicyConfig, custom_params: object) -> KvPolicyConfig:
    """The settings of a request: those of the `server`, but for what it sets itself.

    Args:
        server: the server's settings.
        custom_params: as the request has them; only an object can hold settings.

    Raises:
        KvPolicyError: settings that cannot work, or that no request may bring.
    """
    own = custom_params.get("kv_policy") if isinstance(custom_params, dict) else None
    if own is None or own == {}:
        return server
    if not allowed():
        raise KvPolicyError(
            f"custom_params['kv_policy'] {shown(own)} is not public: leave it out, and set "
            "--kv-policy for the whole server."
        )
    try:
        return server.with_overrides(own)
    except KvPolicyError as error:
        raise KvPolicyError(f"custom_params['kv_policy']: {error}") from error
