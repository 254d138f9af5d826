"""The one exception that a user of the command line or the Python API should see."""


class KvPolicyError(ValueError):
    """A setting that cannot work; the message names the flag, the value and what would work."""
