"""The largest differences between two recorded trainings, put together from their ranks."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.tools.verify_parallel.whole_model import Piece, assemble, relative_error


class Difference(NamedTuple):
    """The largest relative difference of one kind, and where it is."""

    kind: str
    value: float
    place: str


def recorded(ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank left in the folder."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def compare(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[Difference]:
    """Largest differences in loss, gradient norm, gradients and weights, and among replicas."""
    differences = [_of_steps(first, second, kind) for kind in ("loss", "grad norm")]
    for kind in ("gradients", "weights"):
        ours, theirs = (_whole(ranks, kind) for ranks in (second, first))
        _require_equal_shapes(ours, theirs)
        worst = max(
            ((relative_error(tensor, theirs[name][0]), name) for name, (tensor, _) in ours.items()),
            default=(0.0, "none recorded"),
        )
        differences.append(Difference(kind, *worst))
        replicas = max((error, name) for name, (_, error) in [*ours.items(), *theirs.items()])
        differences.append(Difference(f"replicas of {kind}", *replicas))
    return differences


def _require_equal_shapes(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, (tensor, _) in ours.items():
        first, second = tuple(theirs[name][0].shape), tuple(tensor.shape)
        if first != second:
            raise UltraMemError(
                f"{name} is {first} in the first layout and {second} in the second: not the same "
                f"model. If it is the vocabulary, which is padded to a multiple of "
                f"--make-vocab-size-divisible-by times the tensor-parallel size, give each layout "
                f"the value that makes these multiples equal."
            )


def _of_steps(first: list[dict[str, Any]], second: list[dict[str, Any]], kind: str) -> Difference:
    # The last rank is on the last pipeline stage, which knows the loss.
    pairs = zip(first[-1]["steps"], second[-1]["steps"], strict=True)
    worst = max((abs(b[kind] - a[kind]) / abs(a[kind]), a["iteration"]) for a, b in pairs)
    return Difference(kind, worst[0], f"step {worst[1]}")


def _whole(ranks: list[dict[str, Any]], kind: str) -> dict[str, tuple[Tensor, float]]:
    found = assemble(
        ({name: Piece(**where) for name, where in rank["pieces"].items()}, rank[kind])
        for rank in ranks
    )
    return {name: (whole.tensor, whole.replica_error) for name, whole in found.items()}
