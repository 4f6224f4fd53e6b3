"""What Megatron refuses in flags, said as what this package refuses: one line, status 2."""

import contextlib
import difflib
import functools
import re
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.megatron.flags.slips import refuse_slips


@contextlib.contextmanager
def megatron_refuses() -> Iterator[None]:
    """Within it Megatron reads and checks flags; what it refuses becomes an UltraMemError.

    Its parser would print each of its flags, and its assertions are tracebacks, many without words:
    those are shown as they stand in Megatron. Common slips are refused before it checks.
    """
    from megatron.training import arguments

    checks = functools.partial(_without_slips, arguments.validate_args)
    try:
        with (
            mock.patch.object(ArgumentParser, "error", _refuse),
            mock.patch.object(arguments, "validate_args", checks),
        ):
            yield
    except UltraMemError:
        raise
    except Exception as error:  # whatever it is, it comes of the flags
        if isinstance(error, ImportError) and (error.name or "").startswith("megatron."):
            raise  # of a Megatron that lacks what we import
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split()) or (place.line or "").strip()
        if not isinstance(error, (AssertionError, ValueError, RuntimeError)):
            words = f"{type(error).__name__}: {words}"
        raise UltraMemError(
            f"Megatron refuses these flags: {words} ({place.filename.rpartition('/')[2]}, line "
            f"{place.lineno})."
        ) from error


def _without_slips(validate: Callable[..., Any], args: Namespace, *rest: Any) -> Any:
    refuse_slips(args)
    return validate(args, *rest)


def _refuse(parser: ArgumentParser, message: str) -> NoReturn:
    unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    close = {close for word in unknown for close in difflib.get_close_matches(word, known, 1)}
    hint = f" Did you mean {', '.join(sorted(close))}?" if close else ""
    raise UltraMemError(f"Wrong flags: {message}.{hint} ultramem flags and train --help list them.")
