"""The policies by name. A new one is a file beside these and a line here."""

from sglang_tri.policies.base import Policy
from sglang_tri.policies.random import Random
from sglang_tri.policies.streaming import Streaming
from sglang_tri.policies.triattention import TriAttention
from sglang_tri.policies.variance import TriAttentionVariance

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (TriAttention, TriAttentionVariance, Streaming, Random)
}
