"""The one exception for what a user can put right: a flag, a size, a file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

REFUSAL_FILE = "ULTRAMEM_REFUSAL"
"""Environment: where a launched rank leaves its message, so that nothing starts it again."""


class UltraMemError(ValueError):
    """Names what was given, what is allowed, and what to change."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with status 2 and the message of an UltraMemError, shown once, on rank 0.

    So it does where a supported, but older Megatron lacks what a command imports.
    """
    try:
        yield
    except UltraMemError as error:
        _refuse(str(error))
    except ImportError as error:
        if not (error.name or "").startswith("megatron.") or not _has_older_megatron():
            raise
        _refuse(
            f"this command needs megatron-core 0.19, {version('megatron-core')} is installed. With "
            f"0.17 and 0.18 memory layers run in a training loop of your own: launch/own_loop.py."
        )


def _has_older_megatron() -> bool:
    return version("megatron-core").startswith(("0.17.", "0.18."))


def _refuse(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    told = os.environ.get(REFUSAL_FILE)
    if told:
        with suppress(OSError):  # the exit status says it too
            Path(told).write_text(f"error: {message}\n")
    sys.exit(2)
