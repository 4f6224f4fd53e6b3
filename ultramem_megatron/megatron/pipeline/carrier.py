"""Pending results across pipeline stages: telling Megatron's schedules the width of what they send.

A schedule takes the shape of the tensors between stages from the model config's hidden size. Where
a span crosses a stage boundary, the last layer of a stage sends hidden states and pending result
side by side, and the schedule must see twice the hidden size; everything else must not.
"""

from typing import Any


def widen_pipeline_tensors(models: list[Any]) -> None:
    """Give the outermost wrapper of each model chunk a config whose hidden size is twice as large.

    Schedules read the config of the wrapper; the layers have the original. The two share all other
    state, so what the training loop sets on one is seen by the other.
    """
    for model in models:
        config = model.config
        wide: Any = object.__new__(_wider(type(config), 2 * config.hidden_size))
        wide.__dict__ = config.__dict__
        model.config = wide


def _wider(cls: type, hidden_size: int) -> type:
    # A property takes precedence over the instance's dictionary, which is shared.
    width = property(lambda self: hidden_size, lambda self, value: None)
    return type(cls.__name__, (cls,), {"hidden_size": width, "__module__": cls.__module__})
