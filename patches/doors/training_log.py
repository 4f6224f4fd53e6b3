"""Metrics of memory layers follow Megatron's own log line and go to the same writers."""

import math
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_PARAMETERS = (
    "loss_dict", "total_loss_dict", "learning_rate", "iteration", "loss_scale",
    "report_memory_flag", "skipped_iter", "grad_norm", "params_norm", "num_zeros_in_grad",
    "max_attention_logit", "pg_collection", "is_first_iteration", "seqlen_squared_sum_in_batch",
    "total_real_tokens_in_batch",
)  # fmt: skip


def _with_memory_metrics(original: Any) -> Any:
    def training_log(
        loss_dict: Any, total_loss_dict: Any, learning_rate: Any, iteration: int, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        from megatron.training import get_args

        from ultramem_megatron.megatron.current_run import current_run

        result = original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)
        if current_run.monitor is not None and iteration % get_args().log_interval == 0:
            _report(iteration)
        return result

    return training_log


def _report(iteration: int) -> None:
    from megatron.training import get_tensorboard_writer, get_wandb_writer, print_rank_last

    from ultramem_megatron.megatron.current_run import current_run
    from ultramem_megatron.megatron.metrics import console_line, tensorboard_tag

    assert current_run.monitor is not None
    by_layer = current_run.monitor.collect()  # a collective: every rank takes part
    scalars = {
        tensorboard_tag(layer, name): value
        for layer, metrics in by_layer.items()
        for name, value in metrics.items()
        if not math.isnan(value)
    }
    value_lr = current_run.value_learning_rate()
    if value_lr is not None:
        scalars["ultramem/value-learning-rate"] = value_lr
    for layer, metrics in by_layer.items():
        shared = {} if value_lr is None else {"value learning rate": value_lr}
        print_rank_last(console_line(layer, {**metrics, **shared}))
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    if writer:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, iteration)
    if wandb_writer:
        wandb_writer.log(scalars, iteration)


def _install(editor: Editor) -> None:
    editor.wrap("megatron.training.training.training_log", _with_memory_metrics, _PARAMETERS)


PATCH = Patch(
    name="doors.training_log",
    symbols=("megatron.training.training.training_log",),
    reason="pretrain() has no callback at log intervals.",
    delete_when="pretrain() calls user callbacks when it logs.",
    install=_install,
    versions=">=0.18",
)
