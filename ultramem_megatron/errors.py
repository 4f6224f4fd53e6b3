"""The one exception for what a user can put right, a flag, a size, a file; its raising and end."""

import argparse
import errno
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

REFUSAL_FILE = "ULTRAMEM_REFUSAL"
"""Environment: where a launched rank leaves its message, so that nothing starts it again."""

_TORCHRUNS_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment: where torchrun looks for what ended a rank, for its report, which comes last."""

_SECONDS_TO_END_IN = 30
"""launch/torchrun.sh looks for that file every second, and ends torchrun and its ranks."""

_EXTRAS = {
    "tokenizers": "train",
    "transformers": "train",
    "tensorboard": "train",
    "omegaconf": "train",
    "matplotlib": "plots",
    "safetensors": "export",
    "pyarrow": "data",
    "lm_eval": "eval",
}
"""Package -> the extra of pyproject.toml that brings it."""


class UltraMemError(ValueError):
    """Names what was given, what is allowed, and what to change."""


class CommandParser(argparse.ArgumentParser):
    """argparse's, which would print its usage, on every rank, and leave launchers no message.

    Raises UltraMemError for words that it cannot take.
    """

    def error(self, message: str) -> NoReturn:
        """Called by argparse with what is wrong."""
        raise UltraMemError(f"{message}. {self.prog} --help says more.")


_OTHER_SCHEDULE = re.compile(
    r"^OptimizerParamScheduler: class input value (.+) and checkpoint ?value (.+) for (.+) do not "
)
"""What Megatron asserts (optimizer_param_scheduler.py); its dots and spaces differ by version."""


class NonFiniteError(UltraMemError):
    """A loaded number is NaN or infinite. Whoever knows the checkpoint puts its folder before."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with status 2 and the message of an UltraMemError, shown once, on rank 0.

    So it does where a supported, but older Megatron lacks what a command imports, or an extra of
    this package is not installed.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in _EXTRAS and find_spec(package) is None:
            _refuse(f"this command needs {package}, which is not installed. {how_to_get(package)}")
        if package != "megatron" or not _has_older_megatron():
            raise
        _refuse(
            f"this command needs megatron-core 0.19, {version('megatron-core')} is installed. With "
            f"0.17 and 0.18 memory layers run in a training loop of your own: launch/own_loop.py."
        )
    except BaseException as error:
        found = user_error(error)
        if found is None:
            raise
        _refuse(str(found))


def how_to_get(package: str) -> str:
    """What to run where a package of an extra is missing; this one itself is on no index."""
    return f'Run pip install ".[{_EXTRAS[package]}]" in the checkout, or pip install {package}.'


def user_error(error: BaseException) -> UltraMemError | None:
    """The UltraMemError that `error` is or, as torch's CheckpointException, has from some rank.

    So are a path that no file system takes, and Megatron's assertion on a schedule that is not the
    checkpoint's.
    """
    if isinstance(error, UltraMemError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return UltraMemError(f"{error.filename!s:.80}: {error.strerror}. Give another path.")
    schedule = _OTHER_SCHEDULE.search(str(error)) if isinstance(error, AssertionError) else None
    if schedule is not None:
        here, there, name = schedule.groups()
        return UltraMemError(
            f"--load: the checkpoint's schedule has {there} as its {name}, here it is {here}. Add "
            f"--override-opt_param-scheduler to go on with this run's schedule, or "
            f"--use-checkpoint-opt_param-scheduler with the checkpoint's."
        )
    failures: dict[int, object] = getattr(error, "failures", {})  # rank -> (error, traceback)
    found = (user_error(pair[0]) for pair in failures.values() if isinstance(pair, tuple))
    return next((one for one in found if one is not None), None)


def _has_older_megatron() -> bool:
    return version("megatron-core").startswith(("0.17.", "0.18."))


def _refuse(message: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    _tell_torchrun(f"error: {message}")
    told = os.environ.get(REFUSAL_FILE)
    if told:
        with suppress(OSError):  # the exit status says it too
            Path(told).write_text(f"error: {message}\n")
            time.sleep(_SECONDS_TO_END_IN)  # at an exit torchrun would start all ranks again
    sys.exit(2)


def _tell_torchrun(message: str) -> None:
    """In the form of torch's ErrorHandler, which would write a traceback."""
    file = os.environ.get(_TORCHRUNS_FILE)
    if file:
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # rank 0 has printed it
            Path(file).write_text(
                json.dumps({"message": {"message": message, "extraInfo": details}})
            )
