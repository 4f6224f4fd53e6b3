"""Ways to gather rows, weight them per core and sum them per group."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem_megatron.kernels.benchmarks.candidate import Candidate
from ultramem_megatron.kernels.benchmarks.plain_layer import plain_lookup
from ultramem_megatron.kernels.benchmarks.shapes import Shape
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce

_COMPARED_ROWS = 4096


def candidates(shape: Shape, device: torch.device) -> list[Candidate]:
    """The reference first."""
    table = make_table(shape, device)
    index = (shape.tokens, shape.picks)
    rows = torch.randint(shape.values, index, device=device)
    groups = torch.randint(shape.expansion, index, device=device)
    scores = torch.randn(*index, shape.cores, device=device, requires_grad=True)
    read = rows.unique()[:_COMPARED_ROWS]

    def candidate(
        name: str, leaf: Tensor, forward: Callable[[], Tensor], kernels: str = ""
    ) -> Candidate:
        def gradients() -> dict[str, Tensor]:
            assert scores.grad is not None
            return {"scores": scores.grad, "table": table_gradient(leaf, table.shape)[read]}

        return Candidate(
            name=name, forward=forward, leaves=(leaf, scores), gradients=gradients, kernels=kernels
        )

    def ours() -> Tensor:
        return lookup_reduce(table, rows, groups, scores, shape.expansion)

    def plain() -> Tensor:
        return plain_lookup(table, rows, groups, scores, shape.expansion)

    sliced = table.detach().view(-1, shape.value_dim // shape.cores).requires_grad_()
    found = [
        candidate("reference", table, ours, "reference"),
        candidate("torch", table, ours, "torch"),
        candidate(
            "plain", table, lambda: plain_lookup(table, rows, groups, scores, shape.expansion)
        ),
    ]
    for sparse in (False, True):
        name = f"embedding_bag, {'sparse' if sparse else 'dense'} gradient"
        found.append(
            candidate(name, sliced, _bags(sliced, rows, groups, scores, shape.expansion, sparse))
        )
    if device.type == "cuda":
        found.append(candidate("triton", table, ours, "triton"))
    return found


def make_table(shape: Shape, device: torch.device) -> Tensor:
    """A table as Megatron's wrapper leaves it, with `main_grad`; its rows repeat after 4096."""
    block = torch.randn(min(4096, shape.values), shape.value_dim, device=device) / 10
    repeats = -(-shape.values // len(block))
    table = block.to(shape.dtype).repeat(repeats, 1)[: shape.values].requires_grad_()
    table.main_grad = torch.zeros(table.shape, device=device)  # type: ignore[attr-defined]
    return table


def table_gradient(leaf: Tensor, shape: torch.Size) -> Tensor:
    """The gradient wherever it went."""
    if leaf.grad is None:
        return leaf.main_grad.view(shape)  # type: ignore[attr-defined,no-any-return]
    if leaf.grad.is_sparse and hasattr(leaf, "main_grad"):
        return leaf.main_grad.view(shape)  # type: ignore[no-any-return]
    dense = leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad
    return dense.view(shape)


def _bags(
    sliced: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int, sparse: bool
) -> Callable[[], Tensor]:
    """PyTorch's own: one bag a core, token and group, on the table as N*C rows of V/C."""
    tokens, picks, cores = scores.shape
    core = torch.arange(cores, device=rows.device).unsqueeze(1)
    token = torch.arange(tokens, device=rows.device).unsqueeze(1)

    def forward() -> Tensor:
        bags, order = (token * num_groups + groups).flatten().sort(stable=True)
        starts = torch.searchsorted(bags, torch.arange(tokens * num_groups, device=rows.device))
        sums = F.embedding_bag(
            (rows.flatten()[order] * cores + core).flatten(), sliced,
            (starts + core * tokens * picks).flatten(), mode="sum", sparse=sparse,
            per_sample_weights=scores.flatten(0, 1)[order].t().flatten().to(sliced.dtype),
        )  # fmt: skip
        return sums.view(cores, tokens, num_groups, -1).permute(1, 2, 0, 3).flatten(2)

    return forward
