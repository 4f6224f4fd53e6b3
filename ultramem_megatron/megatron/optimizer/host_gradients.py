"""Gradients of tables in host memory, when a step's last backward is done.

They are added up over the ranks that hold the same rows, of the rows that any of them has read, and
scaled as Megatron has scaled the stand-in's gradient, which every rank had set to 1 (HostRows). The
stand-in then gets their norm for a gradient: so they count in the gradient norm, and what unscaling
and clipping make of it says what to make of the rows.

N table rows, u of them with a gradient, V value dim.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.layer import memory_layers
from ultramem_megatron.memory.tables.host_rows import HostRows
from ultramem_megatron.memory.tables.value_table import value_tables

_AT_ONCE = 2**16  # rows


def complete_gradients(chunks: Iterable[Any]) -> None:
    """Of all tables in host memory of these model chunks; a collective, once a step."""
    for chunk in chunks:
        memories: Iterable[Any] = memory_layers(chunk)
        for layer in memories:
            for table in value_tables(layer).values() if layer.owns_tables else ():
                if table.rows is not None and table.stand_in.requires_grad:
                    _complete(table.rows, layer.groups.replicas, _refuses_nan(chunk))


def _refuses_nan(chunk: Any) -> bool:
    return bool(getattr(getattr(chunk, "ddp_config", None), "check_for_nan_in_grad", False))


def _complete(home: HostRows, replicas: Any, refuses_nan: bool) -> None:
    rows, main_grad = home.complete(), home.stand_in.main_grad  # type: ignore[attr-defined]  # Megatron's tag
    factor = home.told(main_grad) / replicas.size()
    if replicas.size() > 1:
        rows = _of_all(rows, home, replicas)
        home.complete_as(rows)
    gradient, squares = home.gradient, 0.0
    for some in rows.split(_AT_ONCE):
        assert gradient is not None
        scaled = gradient[some] * factor
        if replicas.size() > 1:
            scaled = _summed(scaled, home, replicas)
        gradient.index_copy_(0, some, scaled)
        squares += float(torch.linalg.vector_norm(scaled, dtype=torch.float64)) ** 2
    if refuses_nan and not math.isfinite(squares):
        raise UltraMemError(
            "The gradient of a value table in host memory is not finite. Training stops here, as "
            "Megatron's does (--no-check-for-nan-in-loss-and-grad lets it go on); resume from the "
            "last checkpoint, with a lower learning rate if it comes back."
        )
    main_grad.fill_(math.sqrt(squares))
    home.norm = float(main_grad)


def _of_all(rows: Tensor, home: HostRows, replicas: Any) -> Tensor:
    """Rows that any of the replicas has a gradient of, ascending."""
    found = torch.zeros(len(home.weight), dtype=torch.uint8)
    found.index_fill_(0, rows, 1)
    for piece in found.split(2**26):
        piece.copy_(_reduced(piece, dist.ReduceOp.MAX, home, replicas))
    if home.gradient is None:
        home.gradient = torch.zeros(home.weight.shape, dtype=torch.float32)
    return found.nonzero().flatten()


def _summed(gradient: Tensor, home: HostRows, replicas: Any) -> Tensor:
    return _reduced(gradient, dist.ReduceOp.SUM, home, replicas)


def _reduced(tensor: Tensor, operation: Any, home: HostRows, replicas: Any) -> Tensor:
    """Over the replicas, by way of the device, whose groups they are."""
    there = tensor.to(home.stand_in.device, copy=True)
    dist.all_reduce(there, operation, group=replicas)
    return there.cpu()
