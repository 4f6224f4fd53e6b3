"""--moe-grouped-gemm on a CPU: the same experts, one after another.

The specs of --transformer-impl local have no grouped experts anyway; only the check of flags asks
for a GPU. Checkpoints of both kinds of experts load into each other.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_VALIDATE = "megatron.training.arguments.validate_args"


def _without_capability(validate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(validate)
    def validate_args(args: Any, defaults: Any = None) -> Any:
        grouped, args.moe_grouped_gemm = args.moe_grouped_gemm, False
        try:
            return validate(args, defaults or {})
        finally:
            args.moe_grouped_gemm = grouped

    return validate_args


def _install(editor: Editor) -> None:
    editor.wrap(_VALIDATE, _without_capability, ("args", "defaults"))


PATCH = Patch(
    name="cpu.grouped_experts",
    symbols=(_VALIDATE,),
    reason="It asserts a CUDA compute capability of 8 for --moe-grouped-gemm, whatever the specs.",
    delete_when="The check is made where grouped experts are built.",
    install=_install,
    active=without_cuda,
    versions=">=0.19",
)
