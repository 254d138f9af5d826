"""KV-cache eviction for SGLang that leaves RadixAttention and overlap scheduling on."""

__version__ = "0.1.0"
