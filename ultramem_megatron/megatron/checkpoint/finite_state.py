"""What an optimizer loads is searched for NaN and infinity, as the weights of the model are.

A moment or a float32 copy of a weight that is not finite shows one step later, as a loss that is
NaN: the weights beside it are whole. So are the settings of its groups, where a rate may be NaN.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ultramem_megatron.errors import NonFiniteError
from ultramem_megatron.memory.finite import refuse_non_finite

_ADVICE = "load an earlier one (--load with --ckpt-step), or its weights alone (--no-load-optim)"


def search_what_it_loads(optimizer: Any, chunks: list[Any]) -> None:
    """From now on `optimizer.load_state_dict` raises NonFiniteError for what is not finite.

    optimizer: as Megatron's get_megatron_optimizer returns it. chunks: the model it trains.
    """
    load = optimizer.load_state_dict

    @functools.wraps(load)
    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        names = _names(chunks)
        for single in _singles(optimizer):
            refuse_non_finite(_state(single, names), "the optimizer", _ADVICE)
            refuse_non_finite_settings(single.param_groups, "group {} of the optimizer")
        return result

    optimizer.load_state_dict = load_state_dict


def refuse_non_finite_settings(settings: Iterable[Mapping[str, Any]], owner: str) -> None:
    """Raise NonFiniteError for a float that is not finite. owner: "{}" is the mapping's number."""
    for number, group in enumerate(settings):
        for name, value in group.items():
            parts = value if isinstance(value, (list, tuple)) else [value]
            if not all(math.isfinite(part) for part in parts if isinstance(part, float)):
                raise NonFiniteError(
                    f"The loaded {name} of {owner.format(number)} is {value}. The checkpoint is "
                    f"damaged: {_ADVICE}."
                )


def _singles(optimizer: Any) -> Iterator[Any]:
    """The optimizers that Megatron chained, also those within a layer-wise one, if they train."""
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is not None:
        for single in chained:
            yield from _singles(single)
    elif optimizer.optimizer is not None and not getattr(optimizer, "is_stub_optimizer", False):
        yield optimizer


def _names(chunks: list[Any]) -> dict[int, str]:
    """id of a parameter, or of its float32 copy -> name in the model."""
    found = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            short = name.replace("module.", "")
            found[id(parameter)] = short
            main = getattr(parameter, "main_param", None)
            if main is not None:
                found[id(main)] = short
    return found


def _state(single: Any, names: Mapping[int, str]) -> Iterator[tuple[str, Tensor]]:
    torch_optimizer = single.optimizer
    pieces = dict(names)
    # The distributed optimizer trains pieces of its own, also of float32 weights.
    for whole, (group, place) in getattr(single, "model_param_group_index_map", {}).items():
        piece = torch_optimizer.param_groups[group]["params"][place]
        pieces[id(piece)] = names.get(id(whole), "a parameter")
    for group in torch_optimizer.param_groups:
        for parameter in group["params"]:
            name = pieces.get(id(parameter), "a parameter")
            yield f"float32 weights of {name}", parameter
            yield from _tensors(torch_optimizer.state.get(parameter, {}), name)
    scaler = getattr(single, "grad_scaler", None)
    if scaler is not None:
        yield "loss scale", scaler.scale


def _tensors(state: Mapping[str, Any], name: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor):
                yield f"{key} of {name}", tensor
