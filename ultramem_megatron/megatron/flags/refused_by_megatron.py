"""What Megatron refuses in flags, said as what this package refuses: one line, status 2."""

import contextlib
import difflib
import re
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import NoReturn
from unittest import mock

from ultramem_megatron.errors import UltraMemError


@contextlib.contextmanager
def megatron_refuses() -> Iterator[None]:
    """Within it Megatron reads and checks flags; what it refuses becomes an UltraMemError.

    Its parser would print each of its flags, and its assertions are tracebacks, many without words:
    those are shown as they stand in Megatron.
    """
    try:
        with mock.patch.object(ArgumentParser, "error", _refuse):
            yield
    except UltraMemError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split()) or (place.line or "").strip()
        raise UltraMemError(
            f"Megatron refuses these flags: {words} ({place.filename.rpartition('/')[2]}, line "
            f"{place.lineno})."
        ) from error


def _refuse(parser: ArgumentParser, message: str) -> NoReturn:
    unknown = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    close = {close for word in unknown for close in difflib.get_close_matches(word, known, 1)}
    hint = f" Did you mean {', '.join(sorted(close))}?" if close else ""
    raise UltraMemError(f"Wrong flags: {message}.{hint} ultramem flags and train --help list them.")
