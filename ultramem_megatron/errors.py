"""The one exception for what a user can put right: a flag, a size, a file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UltraMemError(ValueError):
    """Names what was given, what is allowed, and what to change."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with status 2 and the message of an UltraMemError, shown once, on rank 0."""
    try:
        yield
    except UltraMemError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
