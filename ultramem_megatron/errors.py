"""The one exception for what a user can put right: a flag, a size, a file."""


class UltraMemError(ValueError):
    """Names what was given, what is allowed, and what to change."""
