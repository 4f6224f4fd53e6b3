"""Ways to select: side top-m and Tucker grid top-m."""

from collections.abc import Callable

import torch
from torch import Tensor

from launch.benchmarks.kernels.candidate import Candidate, implementations
from launch.benchmarks.kernels.shapes import Shape
from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.kernels.side_topk import side_topk
from ultramem_megatron.kernels.tucker_topk import tucker_topk

Forward = Callable[[], Tensor]


def side_candidates(shape: Shape, device: torch.device) -> list[Candidate]:
    """Scores of all keys of both sides and the m best; the reference first."""
    config = shape.config()
    key_shape = (2, config.keys_per_side, config.tucker_rank, config.rank_key_dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=shape.dtype).requires_grad_()

    query = draw(shape.tokens, shape.heads, 2, config.tucker_rank, config.rank_key_dim)
    keys = draw(shape.heads, *key_shape)
    directions = torch.randn(2, shape.heads, config.tucker_rank, device=device)

    def plain() -> Tensor:
        scores = at_least_float32(torch.einsum("thsak,hsnak->thsan", query, keys))
        with torch.no_grad():
            combined = torch.einsum("thsan,sha->thsn", scores, directions)
            best = combined.topk(shape.topk, dim=-1).indices
        index = best.unsqueeze(3).expand(-1, -1, -1, scores.shape[3], -1)
        return scores.gather(-1, index)

    def ours() -> Tensor:
        return side_topk(query, keys, directions, shape.topk)[1]

    return _candidates(ours, plain, {"query": query, "keys": keys}, device)


def tucker_candidates(shape: Shape, device: torch.device) -> list[Candidate]:
    """The m best of the m x m pairs; the reference first."""
    config = shape.config()
    sides = (shape.tokens, shape.heads, 2)
    scores = torch.randn(*sides, config.tucker_rank, shape.topk, device=device).requires_grad_()
    keys = torch.randint(config.keys_per_side, (*sides, shape.topk), device=device)
    ranks = (config.tucker_rank, config.tucker_rank)
    cores = torch.randn(shape.cores, shape.heads, *ranks, device=device).requires_grad_()

    def plain() -> Tensor:
        row, column = scores.unbind(2)
        grids = torch.einsum("thai,chab,thbj->thcij", row, cores, column).flatten(3)
        best = grids.sum(2).topk(shape.topk, dim=-1).indices
        index = best.unsqueeze(2).expand(-1, -1, shape.cores, -1)
        return grids.gather(3, index).transpose(2, 3)

    def ours() -> Tensor:
        return tucker_topk(scores, keys, cores, config.keys_per_side)[1]

    return _candidates(ours, plain, {"scores": scores, "cores": cores}, device)


def _candidates(
    ours: Forward, plain: Forward, leaves: dict[str, Tensor], device: torch.device
) -> list[Candidate]:
    def gradients() -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def candidate(name: str, forward: Forward, kernels: str = "") -> Candidate:
        return Candidate(
            name=name,
            forward=forward,
            leaves=tuple(leaves.values()),
            gradients=gradients,
            kernels=kernels,
            canonical=lambda scores: scores.sort(-1).values.sort(-2).values,
        )

    names = implementations(device)
    return [*(candidate(name, ours, name) for name in names), candidate("plain", plain)]
