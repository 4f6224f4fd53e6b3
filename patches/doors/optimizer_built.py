"""Door: functions that see the optimizer before its first step."""

from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

after: list[Callable[[Any, list[Any]], None]] = []
"""Called with the optimizer that pretrain() has built, and the model chunks it is for."""


def _then_the_others(original: Any) -> Any:
    def get_megatron_optimizer(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = original(config, model_chunks, *args, **kwargs)
        for function in after:
            function(optimizer, model_chunks)
        return optimizer

    return get_megatron_optimizer


def _install(editor: Editor) -> None:
    editor.wrap("megatron.training.training.get_megatron_optimizer", _then_the_others)


PATCH = Patch(
    name="doors.optimizer_built",
    symbols=("megatron.training.training.get_megatron_optimizer",),
    reason="pretrain() builds the optimizer itself and hands it to nobody before the first step.",
    delete_when="pretrain() takes an optimizer or calls back when it has built one.",
    install=_install,
)
