"""With `--log-interval 1` the second log line is of the second step alone."""

import functools
from typing import Any

from ultramem_megatron.patches.doors.training_log import PARAMETERS
from ultramem_megatron.patches.patch import Editor, Patch


def _regular_when_due(original: Any) -> Any:
    @functools.wraps(original)
    def training_log(*args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        from megatron.training import get_args

        extra = is_first_iteration and get_args().log_interval != 1
        return original(*args, is_first_iteration=extra, **kwargs)

    return training_log


def _install(editor: Editor) -> None:
    editor.wrap("megatron.training.training.training_log", _regular_when_due, PARAMETERS)


PATCH = Patch(
    name="defects.first_log_line",
    symbols=("megatron.training.training.training_log",),
    reason="The first line, extra to the regular ones, leaves sums and times to the line after it, "
    "also where it is a regular one: with --log-interval 1 the second shows means of two steps.",
    delete_when="should_reset holds where iteration % log_interval is 0.",
    install=_install,
    versions=">=0.18",
)
