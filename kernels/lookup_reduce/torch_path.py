"""Lookup-reduce through PyTorch's own kernels: the path for CPUs.

Seen as N*C slices of width V/C, the table is summed by `embedding_bag`, one bag for each token,
group and core, so gathered rows are never stored. Its gradient is an `embedding_bag` too: of the
output gradient, one bag for each distinct slice, in the order of a stable sort, so deterministic.

N table rows, V value dim, T tokens, P picks per token, C cores, E groups.
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
    slices, bags = _slices(rows, cores), _bags(groups, num_groups, cores)
    bags, order = bags.sort(stable=True)
    sums = F.embedding_bag(
        slices[order],
        _sliced(table, cores),
        torch.searchsorted(bags, torch.arange(tokens * num_groups * cores, device=bags.device)),
        mode="sum",
        per_sample_weights=scores.flatten()[order].to(table.dtype),
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
    if table.is_cuda and table.dtype == torch.bfloat16:
        return _dots_of_gathered(grad, table, rows, groups, scores)
    cores = scores.shape[2]
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        _sliced(grad.flatten(0, 1), cores),
        _sliced(table, cores),
        _slices(rows, cores),
        torch.zeros(1, dtype=torch.int64, device=rows.device),
        _bags(groups, grad.shape[1], cores),
        mode=0,
        padding_idx=-1,
    )
    return dots.view_as(scores).to(scores.dtype)


def _dots_of_gathered(
    grad: Tensor, table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor
) -> Tensor:
    """The same from gathered rows, some tokens at a time: what PyTorch has for bfloat16 on GPUs."""
    dots = torch.empty_like(scores, memory_format=torch.contiguous_format)
    _, picks, cores = scores.shape
    step = max(1, _CHUNK_BYTES // (picks * table.shape[1] * 4))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        value = table[rows[part]].float()  # (t, P, V)
        wanted = grad[part].float().gather(1, groups[part].unsqueeze(-1).expand_as(value))
        dots[part] = (value * wanted).unflatten(-1, (cores, -1)).sum(-1).to(scores.dtype)
    return dots


def row_gradients(grad: Tensor, rows: Tensor, groups: Tensor, scores: Tensor) -> RowGradients:
    """Distinct rows (u,) with their gradients (u, V), at least float32, a piece at a time."""
    grad = at_least_float32(grad)
    cores, width = scores.shape[2], grad.shape[2]
    slices, order = _slices(rows, cores).sort(stable=True)
    distinct, counts = torch.unique_consecutive(slices, return_counts=True)  # (U*C,)
    bags = _bags(groups, grad.shape[1], cores)[order]
    weights = scores.flatten()[order].to(grad.dtype)
    starts = counts.cumsum(0) - counts
    step = cores * max(1, _CHUNK_BYTES // (width * grad.itemsize))
    for first in range(0, len(distinct), step):
        begin = int(starts[first])
        end = int(starts[first + step]) if first + step < len(distinct) else len(slices)
        sums = F.embedding_bag(
            bags[begin:end],
            _sliced(grad.flatten(0, 1), cores),
            starts[first : first + step] - begin,
            mode="sum",
            per_sample_weights=weights[begin:end],
        )
        yield distinct[first : first + step : cores] // cores, sums.view(-1, width)


def _sliced(x: Tensor, cores: int) -> Tensor:
    """(n, V) as (n*C, V/C)."""
    return x.reshape(len(x) * cores, x.shape[1] // cores)


def _slices(rows: Tensor, cores: int) -> Tensor:
    """Rows (T, P) as the slices they consist of, (T*P*C,)."""
    core = torch.arange(cores, device=rows.device)
    return (rows.flatten().unsqueeze(1) * cores + core).flatten()


def _bags(groups: Tensor, num_groups: int, cores: int) -> Tensor:
    """The slice of the output that each picked slice is added to, (T*P*C,)."""
    tokens = torch.arange(len(groups), device=groups.device).unsqueeze(1)
    return _slices(tokens * num_groups + groups, cores)
