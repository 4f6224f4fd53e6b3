"""Put the model of a parallel run together again: one tensor per parameter of the whole model.

Value tables are assembled from their parts, tensor-parallel weights from their shards, and the
layers of pipeline stages get the numbers they have in the whole model. Replicas must be equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.closeness import assert_close
from tests.training_runs import RankRun, TrainingRun, run_pretrain


@dataclass(frozen=True)
class Piece:
    """Where a rank's tensor belongs in the whole model."""

    name: str
    partition_dim: int | None = None  # of a tensor-parallel weight
    tp_rank: int = 0
    rows: range | None = None  # of a value table
    columns: range | None = None
    whole: tuple[int, int] | None = None


def pieces(trained: Any) -> dict[str, Piece]:
    """By the local name of each parameter; an `on_finish` of `run_pretrain`."""
    from megatron.core import parallel_state

    from ultramem_megatron.value_table import ValueTable

    tp_rank, found = parallel_state.get_tensor_model_parallel_rank(), {}
    for index, chunk in enumerate(trained.model):
        modules = dict(chunk.named_modules())
        for name, parameter in chunk.named_parameters():
            local = f"{index}.{name}" if index else name
            owner = modules[name.rpartition(".")[0]]
            dim = parameter.partition_dim if parameter.tensor_model_parallel else None
            piece = Piece(_global_name(name, modules), dim, tp_rank)
            if isinstance(owner, ValueTable):
                layout = owner.layout
                whole = (layout.num_values, layout.value_dim)
                piece = Piece(piece.name, None, 0, layout.rows(), layout.columns(), whole)
            found[local] = piece
    return found


def _global_name(name: str, modules: dict[str, Any]) -> str:
    head, separator, tail = name.partition("decoder.layers.")
    if not separator:
        return name.removeprefix("module.").removeprefix("module.")
    number, _, rest = tail.partition(".")
    layer = modules[f"{head}decoder.layers.{number}"]
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"


def train(world_size: int, argv: Sequence[str], **options: Any) -> TrainingRun:
    """`run_pretrain` with everything that the functions below need."""
    options = {"gradients_at": 1, "parameters": True, "on_finish": pieces, **options}
    return run_pretrain(world_size, argv, **options)


def whole(run: TrainingRun, kind: str, only: str = "") -> dict[str, Tensor]:
    """All "gradients" or "parameters" with `only` in their names, whole."""
    by_name: dict[str, list[tuple[Piece, Tensor]]] = {}
    for rank in run.ranks:
        for local, tensor in _tensors(rank, kind).items():
            if only not in local:
                continue
            by_name.setdefault(rank.finished[local].name, []).append((rank.finished[local], tensor))
    return {name: _assemble(name, found) for name, found in by_name.items()}


def _tensors(rank: RankRun, kind: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = getattr(rank, kind)
    return tensors


def _assemble(name: str, found: list[tuple[Piece, Tensor]]) -> Tensor:
    distinct: dict[Piece, Tensor] = {}
    for piece, tensor in found:
        if piece.partition_dim is None and piece.whole is None:
            piece = Piece(name)
        if piece in distinct:
            assert_close(tensor, distinct[piece], 1e-6, f"replica of {name}")
        distinct.setdefault(piece, tensor)
    first = next(iter(distinct))
    if first.whole is not None:
        return _table(first.whole, distinct)
    if first.partition_dim is None:
        return distinct[first]
    shards = sorted(distinct.items(), key=lambda item: item[0].tp_rank)
    return torch.cat([tensor for _, tensor in shards], dim=first.partition_dim)


def _table(shape: tuple[int, int], parts: dict[Piece, Tensor]) -> Tensor:
    table = torch.full(shape, float("nan"))
    for piece, tensor in parts.items():
        rows, columns = piece.rows, piece.columns
        assert rows is not None
        assert columns is not None
        table[rows.start : rows.stop, columns.start : columns.stop] = tensor.float()
    return table


def assert_same_training(
    run: TrainingRun, expected: TrainingRun, tolerance: float, *, gradients: bool = True
) -> None:
    """Losses, gradient norms, every gradient of the recorded step and every final weight."""
    assert len(run.losses) == len(expected.losses)
    for ours, theirs in zip(run.losses, expected.losses, strict=True):
        assert abs(ours - theirs) <= tolerance * theirs
    for ours, theirs in zip(run.grad_norms, expected.grad_norms, strict=True):
        assert abs(ours - theirs) <= 10 * tolerance * theirs
    for kind, factor in (("parameters", 1), ("gradients", 10)):
        if kind == "gradients" and not gradients:
            continue
        ours, theirs = whole(run, kind), whole(expected, kind)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert_close(ours[name], tensor, factor * tolerance, f"{kind} {name}")
