"""The value tables get a learning rate of their own: a parameter group and a schedule for it."""

from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch


def _with_value_overrides(original: Any) -> Any:
    def get_megatron_optimizer_config(args: Any) -> Any:
        from ultramem_megatron.megatron.current_run import current_run
        from ultramem_megatron.megatron.optimizer.value_learning_rate import value_overrides

        config, overrides = original(args)
        if current_run.ultramem is None:
            return config, overrides
        return config, {**(overrides or {}), **value_overrides(current_run.ultramem)}

    return get_megatron_optimizer_config


def _with_value_schedule(original: Any) -> Any:
    def make_scheduler(*args: Any, **kwargs: Any) -> Any:
        from ultramem_megatron.megatron.current_run import current_run
        from ultramem_megatron.megatron.optimizer.value_learning_rate import (
            ValueLearningRateScheduler,
        )

        if current_run.ultramem is None:
            return original(*args, **kwargs)
        scheduler = ValueLearningRateScheduler(
            *args, value_lr_decay=current_run.ultramem.value_lr_decay, **kwargs
        )
        current_run.scheduler = scheduler
        return scheduler

    return make_scheduler


def _install(editor: Editor) -> None:
    training = "megatron.training.training"
    editor.wrap(f"{training}.get_megatron_optimizer_config", _with_value_overrides, ("args",))
    editor.wrap(f"{training}.OptimizerParamScheduler", _with_value_schedule)


PATCH = Patch(
    name="doors.optimizer_config",
    symbols=(
        "megatron.training.training.get_megatron_optimizer_config",
        "megatron.training.training.OptimizerParamScheduler",
    ),
    reason="pretrain() takes neither optimizer overrides nor a scheduler of one's own.",
    delete_when="pretrain() accepts config_overrides and a scheduler class.",
    install=_install,
)
