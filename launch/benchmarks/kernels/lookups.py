"""Ways to gather rows, weight them per core and sum them per group."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.benchmarks.kernels.candidate import Candidate, implementations
from launch.benchmarks.kernels.plain_layer import plain_lookup
from launch.benchmarks.kernels.shapes import Shape
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce

COMPARED_ROWS = 4096


def candidates(shape: Shape, device: torch.device, with_fbgemm: bool = False) -> list[Candidate]:
    """The reference first; FBGEMM, which must be installed, last."""
    table = make_table(shape, device)
    index = (shape.tokens, shape.picks)
    rows = torch.randint(shape.values, index, device=device)
    groups = torch.randint(shape.expansion, index, device=device)
    scores = torch.randn(*index, shape.cores, device=device, requires_grad=True)
    read = rows.unique()[:COMPARED_ROWS]

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

    found = [candidate(name, table, ours, name) for name in implementations(device)]
    found.append(candidate("plain", table, plain))
    bags = _Bags(table, rows, groups, scores, shape.expansion)
    for sparse in (False, True):
        name = f"embedding_bag, {'sparse' if sparse else 'dense'} gradient"
        found.append(candidate(name, bags.sliced, bags.embedding_bag(sparse)))
    if with_fbgemm:
        found.append(candidate("FBGEMM TBE, dense gradient", *bags.fbgemm()))
    return found


def make_table(shape: Shape, device: torch.device) -> Tensor:
    """A table as Megatron's wrapper leaves it, with `main_grad`; its rows repeat after 4096."""
    block = torch.randn(min(4096, shape.values), shape.value_dim, device=device) / 10
    repeats = -(-shape.values // len(block))
    table = block.to(shape.dtype).repeat(repeats, 1)[: shape.values].requires_grad_()
    table.main_grad = torch.zeros(table.shape, device=device)  # type: ignore[attr-defined]  # Megatron's tag
    return table


def table_gradient(leaf: Tensor, shape: torch.Size) -> Tensor:
    """The gradient wherever it went."""
    if leaf.grad is None:
        return leaf.main_grad.view(shape)  # type: ignore[attr-defined]  # Megatron's tag
    if leaf.grad.is_sparse and hasattr(leaf, "main_grad"):
        return leaf.main_grad.view(shape)
    dense = leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad
    return dense.view(shape)


class _Bags:
    """The lookup as pooled embeddings: bags of the table's N*C slices, for every sum and core."""

    def __init__(
        self, table: Tensor, rows: Tensor, groups: Tensor, scores: Tensor, num_groups: int
    ) -> None:
        self.rows, self.groups, self.scores, self.num_groups = rows, groups, scores, num_groups
        self.sliced = table.detach().view(-1, table.shape[1] // scores.shape[2]).requires_grad_()

    def embedding_bag(self, sparse: bool) -> Callable[[], Tensor]:
        """PyTorch's own."""

        def forward() -> Tensor:
            slices, starts, weights = self._prepared()
            sums = F.embedding_bag(
                slices,
                self.sliced,
                starts[:-1],
                mode="sum",
                sparse=sparse,
                per_sample_weights=weights.to(self.sliced.dtype),
            )
            return sums.view(len(self.rows), self.num_groups, -1)

        return forward

    def fbgemm(self) -> tuple[Tensor, Callable[[], Tensor]]:
        """Its table, on the same storage, and FBGEMM's table-batched embedding of that."""
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            DenseTableBatchedEmbeddingBagsCodegen,
        )

        precision = SparseType.from_dtype(self.sliced.dtype)
        module = DenseTableBatchedEmbeddingBagsCodegen(
            [tuple(self.sliced.shape)],
            weights_precision=precision,
            output_dtype=precision,
            use_cpu=self.sliced.device.type == "cpu",
        )
        module.weights = torch.nn.Parameter(self.sliced.detach().flatten())

        def forward() -> Tensor:
            slices, starts, weights = self._prepared()
            sums: Tensor = module(slices, starts, per_sample_weights=weights)
            return sums.view(len(self.rows), self.num_groups, -1)

        return module.weights, forward

    def _prepared(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slices, first slice of each bag (and their end), weights; in the order of bags."""
        cores, device = self.scores.shape[2], self.rows.device
        core = torch.arange(cores, device=device)
        token = torch.arange(len(self.rows), device=device).unsqueeze(1)
        sums = (token * self.num_groups + self.groups).unsqueeze(2) * cores + core
        bags, order = sums.flatten().sort(stable=True)
        last = len(self.rows) * self.num_groups * cores
        starts = torch.searchsorted(bags, torch.arange(last + 1, device=device))
        slices = (self.rows.unsqueeze(2) * cores + core).flatten()
        return slices[order], starts, self.scores.flatten()[order]
