"""Ways to read values behind pre-values: in one pass, in two, and as plain PyTorch code."""

from collections.abc import Callable

import torch
from torch import Tensor

from launch.benchmarks.kernels.candidate import Candidate, implementations
from launch.benchmarks.kernels.lookups import COMPARED_ROWS, make_table, table_gradient
from launch.benchmarks.kernels.plain_layer import plain_lookup
from launch.benchmarks.kernels.shapes import Shape
from ultramem_megatron.kernels.lookup_dot import lookup_dot
from ultramem_megatron.kernels.lookup_prevalued import lookup_prevalued
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce

TWO_PASSES = "two passes"


def candidates(shape: Shape, device: torch.device) -> list[Candidate]:
    """The reference first. As in UltraMemV2: one group, and pre-values as wide as values."""
    tables = [make_table(shape, device) for _ in range(2)]
    table, pre_table = tables
    index = (shape.tokens, shape.picks)
    rows = torch.randint(shape.values, index, device=device)
    groups = torch.zeros_like(rows)
    scores = torch.randn(*index, shape.cores, device=device, requires_grad=True)
    x = torch.randn(shape.tokens, shape.value_dim, device=device, dtype=shape.dtype)
    x.requires_grad_()
    read = rows.unique()[:COMPARED_ROWS]

    def one_pass() -> Tensor:
        return lookup_prevalued(table, pre_table, rows, groups, scores, x, 1)

    def two_passes() -> Tensor:
        weights = scores * lookup_dot(pre_table, rows, x).unsqueeze(2)
        return lookup_reduce(table, rows, groups, weights, 1)

    def plain() -> Tensor:
        dots = (pre_table[rows] * x.unsqueeze(1)).sum(2)
        return plain_lookup(table, rows, groups, scores * dots.unsqueeze(2), 1)

    def gradients() -> dict[str, Tensor]:
        of_tables = [table_gradient(leaf, leaf.shape)[read] for leaf in tables]
        assert scores.grad is not None
        assert x.grad is not None
        names = ("table", "pre-values", "scores", "inputs")
        return dict(zip(names, (*of_tables, scores.grad, x.grad), strict=True))

    def candidate(name: str, forward: Callable[[], Tensor], kernels: str = "") -> Candidate:
        leaves = (*tables, scores, x)
        return Candidate(
            name=name, forward=forward, leaves=leaves, gradients=gradients, kernels=kernels
        )

    own = implementations(device)
    found = [candidate(name, one_pass, name) for name in own]
    return [*found, candidate(TWO_PASSES, two_passes, own[-1]), candidate("plain", plain)]
