"""Door: parameter groups and a learning-rate scheduler of one's own in pretrain()."""

from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

overrides: list[Callable[[], dict[Any, dict[str, Any]]]] = []
"""Each gives optimizer overrides by `ParamKey`, added to those that Megatron makes of its flags."""

schedulers: list[Callable[..., Any]] = []
"""The last one, if any, is called in the place of Megatron's OptimizerParamScheduler."""


def _with_overrides(original: Any) -> Any:
    def get_megatron_optimizer_config(args: Any) -> Any:
        config, own = original(args)
        for more in overrides:
            own = {**(own or {}), **more()}
        return config, own

    return get_megatron_optimizer_config


def _with_scheduler(original: Any) -> Any:
    def make_scheduler(*args: Any, **kwargs: Any) -> Any:
        return (schedulers[-1] if schedulers else original)(*args, **kwargs)

    return make_scheduler


def _install(editor: Editor) -> None:
    training = "megatron.training.training"
    editor.wrap(f"{training}.get_megatron_optimizer_config", _with_overrides, ("args",))
    editor.wrap(f"{training}.OptimizerParamScheduler", _with_scheduler)


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
