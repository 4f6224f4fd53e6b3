"""Tables in checkpoints have the form that AdamW and a float32 copy have, however they are kept."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch import Tensor

from ultramem_megatron.megatron.optimizer.kept_rows import KeptRows

_SAVES, _LOADS = ("sharded_state_dict", "state_dict"), "load_state_dict"


def expand_for_checkpoints(single: Any, tables: Sequence[KeptRows]) -> None:
    """Let Megatron's optimizer `single` write and read checkpoints of `tables` in that form."""
    nested = False

    def wrapped(method: Callable[..., Any], loads: bool) -> Callable[..., Any]:
        @functools.wraps(method)
        def in_full(*args: Any, **kwargs: Any) -> Any:
            nonlocal nested
            if nested:
                return method(*args, **kwargs)
            nested = True
            for rows in tables:
                rows.expand()
            try:
                state = method(*args, **kwargs)
                _hold(state, [rows.part for rows in tables])
                return state
            finally:
                nested = False
                for rows in tables:
                    rows.drop(loads)

        return in_full

    for name in (*_SAVES, _LOADS):
        setattr(single, name, wrapped(getattr(single, name), name == _LOADS))


def _hold(state: Any, parts: Sequence[Tensor]) -> None:
    """Have shards of these parts keep the numbers that they have now."""
    for value in nested_values(state) if isinstance(state, dict) else ():
        for part in parts:
            if getattr(value, "data", None) is part:
                value.data = part.detach()
