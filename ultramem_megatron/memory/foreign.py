"""Memories of other people's models: what their loaders share.

A loader builds our layers from a state dict under the authors' names and says where each of those
is found in ours; so the way back serves weights and gradients alike.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.layer import memory_layers
from ultramem_megatron.memory.retrieval.tdqkr import TuckerRetrieval
from ultramem_megatron.memory.tables.value_table import mark_as_values, value_tables


@dataclass(frozen=True)
class Entry:
    """One name of the authors'.

    ours: name of the parameter or buffer that holds it; None: nothing depends on it. back: from
    ours to theirs. unused: what follows that along the first dimension, and nothing depends on.
    """

    ours: str | None
    back: Callable[[Tensor], Tensor] = lambda x: x
    unused: Tensor | None = None

    def theirs(self, ours: Tensor | None, *, gradient: bool) -> Tensor:
        """Their tensor, or its gradient, of ours."""
        parts = [] if ours is None else [self.back(ours.detach())]
        if self.unused is not None:
            parts.append(torch.zeros_like(self.unused) if gradient else self.unused)
        return torch.cat(parts).clone().contiguous()


class ForeignMemories(nn.Module):
    """Memories loaded from a state dict of their authors'.

    layers: in the order of the model, each (batch, position, D) to the same; they may share tables.
    """

    def __init__(self, layers: Iterable[nn.Module], entries: Mapping[str, Entry]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._entries = dict(entries)

    def take(self, ours: Mapping[str, Tensor]) -> "ForeignMemories":
        """Take these tensors, by our names, as they are: dtype and device are theirs. Itself."""
        self.load_state_dict({n: t.clone().contiguous() for n, t in ours.items()}, assign=True)
        for parameter in self.parameters():
            parameter.requires_grad_()
        for table in value_tables(self).values():
            mark_as_values(table.weight)
        for layer in memory_layers(self):
            retrieval = layer.retrieval
            if isinstance(retrieval, TuckerRetrieval) and not retrieval.cores.u.any():
                layer.after_step()
        return self

    def authors_state(self) -> dict[str, Tensor]:
        """The weights as they are now, under the names they came with; copies."""
        ours = self.state_dict()
        return {
            name: entry.theirs(ours[entry.ours] if entry.ours else None, gradient=False)
            for name, entry in self._entries.items()
        }

    def authors_gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter under its authors' name; zeros where there is none."""
        ours = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self.named_parameters(remove_duplicate=False)
        }
        return {
            name: entry.theirs(ours[entry.ours] if entry.ours else None, gradient=True)
            for name, entry in self._entries.items()
            if entry.ours is None or entry.ours in ours
        }


def tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of what may be numpy arrays, detached; dtypes stay."""
    return {name: torch.as_tensor(value).detach() for name, value in state_dict.items()}


class Sizes:
    """The mapping of sizes and flags under the authors' names, of Python's or numpy's scalars."""

    def __init__(self, given: Mapping[str, Any], what: str) -> None:
        """what: the layer, for messages."""
        self._given, self._what = given, what

    def get(self, name: str, default: Any = None) -> Any:
        """A size or flag; without a default it has to be there."""
        if name not in self._given:
            if default is None:
                raise UltraMemError(
                    f"{self._what}: the mapping of sizes has no {name!r}, only "
                    f"{', '.join(sorted(self._given)) or 'nothing'}. Add it."
                )
            return default
        value = self._given[name]
        return value.item() if hasattr(value, "item") else value

    def refuse(self, *names: str, why: str) -> None:
        """Raise UltraMemError if one of these flags is on."""
        for name in names:
            if self.get(name, False):
                raise UltraMemError(f"{self._what}: {name}={self.get(name)}: {why}.")

    def require(self, holds: bool, name: str, allowed: str) -> None:
        """Raise UltraMemError unless the size or flag is as it must be."""
        if not holds:
            raise UltraMemError(f"{self._what}: {name} is {self.get(name)}; it must be {allowed}.")


def check_shapes(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raise UltraMemError unless the state dict has these names and shapes, and no others."""
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unknown:
        raise UltraMemError(
            f"{what}: the state dict does not fit the sizes given: "
            f"missing {_some(missing)}; not expected {_some(unknown)}. Pass the entries of the "
            f"memories alone, under the authors' names, and the sizes they were made with."
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise UltraMemError(
                f"{what}: {name} has shape {tuple(state[name].shape)}, but the sizes given imply "
                f"{shape}. Pass the sizes it was made with."
            )


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return (
        ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "") or "none"
    )
