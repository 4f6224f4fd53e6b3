"""Door: functions that are called after Megatron's own log line."""

from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

after: list[Callable[[int], None]] = []
"""Called on every rank with the iteration, at every step at which `training_log` is called."""

PARAMETERS = (
    "loss_dict",
    "total_loss_dict",
    "learning_rate",
    "iteration",
    "loss_scale",
    "report_memory_flag",
    "skipped_iter",
    "grad_norm",
    "params_norm",
    "num_zeros_in_grad",
    "max_attention_logit",
    "pg_collection",
    "is_first_iteration",
    "seqlen_squared_sum_in_batch",
    "total_real_tokens_in_batch",
)


def _then_the_others(original: Any) -> Any:
    def training_log(
        loss_dict: Any,
        total_loss_dict: Any,
        learning_rate: Any,
        iteration: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        for function in after:
            function(iteration)
        return result

    return training_log


def _install(editor: Editor) -> None:
    editor.wrap("megatron.training.training.training_log", _then_the_others, PARAMETERS)


PATCH = Patch(
    name="doors.training_log",
    symbols=("megatron.training.training.training_log",),
    reason="pretrain() has no callback at log intervals.",
    delete_when="pretrain() calls user callbacks when it logs.",
    install=_install,
    versions=">=0.18",
)
