"""With --ultramem-lazy-adam the optimizer leaves rows of value tables without gradient alone."""

from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch


def _with_lazy_tables(original: Any) -> Any:
    def get_megatron_optimizer(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        from ultramem_megatron.megatron.current_run import current_run
        from ultramem_megatron.megatron.optimizer.lazy_adam import make_lazy

        optimizer = original(config, model_chunks, *args, **kwargs)
        if current_run.ultramem is None or not current_run.ultramem.lazy_adam:
            return optimizer
        # Half precision trains a float32 copy of each parameter.
        tables = [
            getattr(parameter, "main_param", parameter)
            for chunk in model_chunks
            for parameter in chunk.parameters()
            if getattr(parameter, "ultramem_values", False)
        ]
        for single in getattr(optimizer, "chained_optimizers", [optimizer]):
            if tables and single.optimizer is not None:
                make_lazy(single.optimizer, tables)
        return optimizer

    return get_megatron_optimizer


def _install(editor: Editor) -> None:
    editor.wrap("megatron.training.training.get_megatron_optimizer", _with_lazy_tables)


PATCH = Patch(
    name="doors.optimizer_built",
    symbols=("megatron.training.training.get_megatron_optimizer",),
    reason="pretrain() builds the optimizer itself and hands it to nobody before the first step.",
    delete_when="pretrain() takes an optimizer or calls back when it has built one.",
    install=_install,
)
