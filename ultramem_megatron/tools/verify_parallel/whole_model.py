"""Put the model of a parallel run together again: one tensor per parameter of the whole model.

Value tables are assembled from their parts, tensor-parallel weights from their shards, and the
layers of pipeline stages get the numbers they have in the whole model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Where a rank's tensor belongs in the whole model."""

    name: str
    partition_dim: int | None = None
    """Axis a tensor-parallel weight is cut along; None: it is whole."""
    tp_rank: int = 0
    corner: tuple[int, int] | None = None
    """First row and column of a part of a value table."""
    whole: tuple[int, int] | None = None
    """Shape of the whole value table."""
    parts: tuple[int, ...] = ()
    """Rows of each part that a shard holds one after the other, each cut for itself: of an MLP with
    a gate those of the gate and of what is gated, of a Mamba layer those of what it projects to."""


def pieces(model: Iterable[Any]) -> dict[str, Piece]:
    """Where each parameter of this rank's model chunks belongs, by its local name.

    A second chunk's local names start with "1.".
    """
    from megatron.core.utils import get_model_config

    found: dict[str, Piece] = {}
    for index, chunk in enumerate(model):
        gated = get_model_config(chunk).gated_linear_unit
        modules = dict(chunk.named_modules())
        for name, parameter in chunk.named_parameters():
            local = f"{index}.{name}" if index else name
            found[local] = _piece(_global_name(name, modules), parameter, name, modules, gated)
    return found


def _piece(
    whole_name: str, parameter: Any, name: str, modules: Mapping[str, Any], gated: bool
) -> Piece:
    from megatron.core import parallel_state

    from ultramem_megatron.memory.tables.value_table import ValueTable

    owner = name.rpartition(".")[0]
    if isinstance(modules[owner], ValueTable):
        layout = modules[owner].layout
        corner = (layout.rows().start, layout.columns().start)
        return Piece(whole_name, corner=corner, whole=(layout.num_values, layout.value_dim))
    if not parameter.tensor_model_parallel:
        return Piece(whole_name)
    if ".experts." in name:
        tp_rank = parallel_state.get_expert_tensor_parallel_rank()
    else:
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
    parts = tuple(getattr(parameter, "partition_sizes", ()))
    if gated and owner.endswith(".linear_fc1"):
        parts = (len(parameter) // 2,) * 2
    return Piece(whole_name, parameter.partition_dim, tp_rank, parts=parts)


def _global_name(name: str, modules: Mapping[str, Any]) -> str:
    head, separator, tail = name.partition("decoder.layers.")
    if not separator:
        return name.replace("module.", "")
    number, _, rest = tail.partition(".")
    layer = modules[f"{head}decoder.layers.{number}"]
    return f"decoder.layers.{layer.layer_number - 1}.{_global_expert(rest, layer)}"


def _global_expert(name: str, layer: Any) -> str:
    """Experts are numbered over all ranks, not over those of this one."""
    head, separator, tail = name.partition("local_experts.")
    if not separator:
        return name
    number, _, rest = tail.partition(".")
    return f"{head}experts.{layer.mlp.local_expert_indices[int(number)]}.{rest}"


@dataclass(frozen=True)
class Assembled:
    """A whole tensor, and how far apart its replicas were (relative, 0 if there was one)."""

    tensor: Tensor
    replica_error: float


def assemble(
    ranks: Iterable[tuple[Mapping[str, Piece], Mapping[str, Tensor]]],
) -> dict[str, Assembled]:
    """Whole tensors by global name, from each rank's pieces and tensors (both by local name)."""
    by_name: dict[str, list[tuple[Piece, Tensor]]] = {}
    for where, tensors in ranks:
        for local, tensor in tensors.items():
            by_name.setdefault(where[local].name, []).append((where[local], tensor))
    return {name: _assemble(found) for name, found in by_name.items()}


def _assemble(found: list[tuple[Piece, Tensor]]) -> Assembled:
    distinct: dict[Piece, Tensor] = {}
    error = 0.0
    for piece, tensor in found:
        first = distinct.setdefault(piece, tensor)
        error = max(error, relative_error(tensor, first))
    some = next(iter(distinct))
    if some.whole is not None:
        return Assembled(_table(some.whole, distinct), error)
    if some.partition_dim is None:
        return Assembled(distinct[some], error)
    shards = [distinct[piece] for piece in sorted(distinct, key=lambda piece: piece.tp_rank)]
    if some.parts:
        by_part = zip(*(shard.split(some.parts) for shard in shards), strict=True)
        shards = [shard for part in by_part for shard in part]
    return Assembled(torch.cat(shards, dim=some.partition_dim), error)


def _table(shape: tuple[int, int], parts: Mapping[Piece, Tensor]) -> Tensor:
    table = torch.full(shape, float("nan"))
    for piece, tensor in parts.items():
        assert piece.corner is not None
        row, column = piece.corner
        table[row : row + tensor.shape[0], column : column + tensor.shape[1]] = tensor.float()
    return table


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; the absolute norm if expected is zero."""
    expected = expected.detach().double()
    difference = (actual.detach().double() - expected).norm().item()
    scale = expected.norm().item()
    return difference / scale if scale > 0 else difference
