"""--use-checkpoint-args takes flags from a checkpoint, but none that names code or files."""

import functools
import pickle
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint import CheckpointException

from ultramem_megatron.errors import UltraMemError, user_error
from ultramem_megatron.faults.trust import ADVICE, fault_of, is_trusted
from ultramem_megatron.patches.patch import Editor, Patch

_FUNCTION = "megatron.training.checkpointing.load_args_from_checkpoint"
_CODE = ("spec", "heterogeneous_layers_config_path", "trust_remote_code")
"""What upstream copies, or may come to copy, and then imports or opens."""


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_args_from_checkpoint(
        args: Namespace, load_arg: str = "load", checkpointing_context: Any = None
    ) -> Any:
        given = {name: getattr(args, name, None) for name in _CODE}
        try:
            result = original(args, load_arg, checkpointing_context)
        except (CheckpointException, Exception) as error:
            raise UltraMemError(
                f"--use-checkpoint-args: no flags can be read from {getattr(args, load_arg)}: "
                f"{_reason(error)}"
            ) from error
        for name, mine in given.items():
            theirs = getattr(args, name, None)
            if theirs not in (mine, None) and not is_trusted():
                raise UltraMemError(
                    f"--use-checkpoint-args: {getattr(args, load_arg)} names code or files of its "
                    f"own ({name} is {theirs!r:.200}), which are never taken from it. {ADVICE}"
                )
        return result

    return load_args_from_checkpoint


def _reason(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return f"common.pt or a file of rank 0 {fault_of(error)}. {ADVICE}"
    lines = str(user_error(error) or error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split("; rank local")[0]


def _install(editor: Editor) -> None:
    editor.wrap(_FUNCTION, _checked, ("args", "load_arg", "checkpointing_context"))


PATCH = Patch(
    name="defects.stored_code",
    symbols=(_FUNCTION,),
    reason="The flags are read and used inside parse_args(), before any hook.",
    delete_when="load_args_from_checkpoint() takes no `spec` and no paths.",
    install=_install,
    versions=">=0.19",
)
