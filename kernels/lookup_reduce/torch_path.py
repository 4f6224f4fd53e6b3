"""Lookup-reduce through PyTorch's own kernels: the path for CPUs.

Seen as N*C rows of width V/C, the table is summed by `embedding_bag`, one bag for each core, token
and group, so gathered rows are never stored. Its gradient is an `embedding_bag` too: of the output
gradient, one bag for each distinct row, in the order of a stable sort, hence deterministic.

N table rows, V value dim, T tokens, P picks per token, C cores, E groups, U distinct rows.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem_megatron.kernels.precision import at_least_float32

_CHUNK_BYTES = 4 * 2**20
"""Row gradients are handed on in pieces of this size, which a CPU's cache holds."""

RowGradients = Iterator[tuple[Tensor, Tensor]]


def pool(table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int) -> Tensor:
    """Same contract as `lookup_reduce_reference`, without a graph."""
    tokens, _, cores = scores.shape
    bags, order = _bags(groups, num_groups).sort(stable=True)
    starts = torch.searchsorted(bags, torch.arange(tokens * num_groups, device=bags.device))
    sums = _sum_bags(
        _by_core(table, cores),
        rows.flatten()[order],
        scores.flatten(0, 1)[order].to(table.dtype),
        starts,
    )
    return sums.view(tokens, num_groups, table.shape[1])


def backward(
    grad: Tensor,
    table: Tensor,
    rows: Tensor,
    groups: Tensor,
    scores: Tensor,
    target: Tensor | None,
    with_scores: bool,
) -> Tensor | None:
    """Add the table's gradient to `target` (N, V), if given; return that of the scores, if asked.

    grad: (T, E, V).
    """
    if target is not None:
        for distinct, gradients in row_gradients(grad, rows, groups, scores):
            target.index_add_(0, distinct, gradients.to(target.dtype))
    return _score_gradient(grad, table, rows, groups, scores) if with_scores else None


def _score_gradient(
    grad: Tensor, table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor
) -> Tensor:
    """d scores (T, P, C) for grad (T, E, V): <row, grad of its group>, slice by slice."""
    if scores.numel() == 0:
        return torch.zeros_like(scores)
    core = torch.arange(scores.shape[2], device=rows.device)
    bags = _bags(groups, grad.shape[1])
    picked = (rows.flatten().unsqueeze(1) * len(core) + core).flatten()
    summed_in = (bags.unsqueeze(1) * len(core) + core).flatten()
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        _by_core(grad.flatten(0, 1), len(core)), _by_core(table, len(core)), picked,
        torch.zeros(1, dtype=torch.int64, device=rows.device), summed_in, mode=0, padding_idx=-1,
    )  # fmt: skip
    return dots.view_as(scores).to(scores.dtype)


def row_gradients(grad: Tensor, rows: Tensor, groups: Tensor, scores: Tensor) -> RowGradients:
    """Distinct rows (u,) with their gradients (u, V), at least float32, a piece at a time."""
    grad = at_least_float32(grad)
    cores, width = scores.shape[2], grad.shape[2]
    by_core = _by_core(grad.flatten(0, 1), cores)
    picked, order = rows.flatten().sort(stable=True)
    distinct, counts = torch.unique_consecutive(picked, return_counts=True)
    bags = _bags(groups, grad.shape[1])[order]
    weights = scores.flatten(0, 1)[order].to(grad.dtype)
    starts = counts.cumsum(0) - counts
    step = max(1, _CHUNK_BYTES // (width * grad.itemsize))
    for first in range(0, len(distinct), step):
        begin = int(starts[first])
        end = int(starts[first + step]) if first + step < len(distinct) else len(picked)
        sums = _sum_bags(
            by_core,
            bags[begin:end],
            weights[begin:end],
            starts[first : first + step] - begin,
        )
        yield distinct[first : first + step], sums


def _bags(groups: Tensor, num_groups: int) -> Tensor:
    """Number token * E + group of each pick's sum, (T*P,)."""
    tokens = torch.arange(len(groups), device=groups.device).unsqueeze(1)
    return (tokens * num_groups + groups).flatten()


def _by_core(x: Tensor, cores: int) -> Tensor:
    """(n, V) as (n*C, V/C)."""
    return x.reshape(len(x) * cores, x.shape[1] // cores)


def _sum_bags(by_core: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """Weighted sums of rows: (n*C, V/C), (k,), (k, C), first pick of each bag (b,) to (b, V)."""
    cores = weights.shape[1]
    core = torch.arange(cores, device=rows.device).unsqueeze(1)
    sums = F.embedding_bag(
        (rows * cores + core).flatten(),
        by_core,
        (starts + core * len(rows)).flatten(),
        mode="sum",
        per_sample_weights=weights.t().flatten(),
    )  # (C*b, V/C)
    return sums.view(cores, len(starts), by_core.shape[1]).transpose(0, 1).flatten(1)
