"""Value tables, and the kinds of reading them: what weighs a value beside its score.

T tokens, D hidden, N rows of a table, V value dim, W width of a pre-value, P picks of a token,
C cores, E expansion.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_ultramem import table_rows
from .hot_rows_ultramem import HotRows
from .mapped_ultramem import bring
from .quantized_ultramem import QuantizedPreValues, QuantizedTable, products


class ValueTable(nn.Module):
    """N values, pooled by their scores, one sum for each expansion group (eq. 15 and 17)."""

    def __init__(self, number: int, width: int, expansion: int) -> None:
        super().__init__()
        self.expansion = expansion
        self.weight = nn.Parameter(torch.empty(number, width))
        self.hot: HotRows | None = None

    def forward(self, addresses: Tensor, scores: Tensor) -> Tensor:
        """(T, E*V) for virtual addresses (T, P) and scores (T, P, C)."""
        number, width = self.weight.shape
        tokens, _, cores = scores.shape
        weight, rows = self.held(addresses % number)
        groups = addresses // number
        core = torch.arange(cores, device=rows.device)
        token = torch.arange(tokens, device=rows.device).unsqueeze(1)
        slices = (rows.unsqueeze(2) * cores + core).flatten()
        bags = ((token * self.expansion + groups).unsqueeze(2) * cores + core).flatten()
        bags, order = bags.sort(stable=True)
        every = torch.arange(tokens * self.expansion * cores, device=rows.device)
        sums = F.embedding_bag(
            slices[order],
            weight.view(-1, width // cores),
            torch.searchsorted(bags, every),
            mode="sum",
            per_sample_weights=scores.flatten()[order].to(weight.dtype),
        )
        return sums.view(tokens, self.expansion * width)

    def held(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A table, the whole or of what is read alone, and where these rows are in it."""
        if self.hot is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.weight, rows
        unique, places = rows.unique(return_inverse=True)
        (found,) = self.hot.read(unique, lambda missing: (self.weight[missing],))
        return found, places

    def bring(self, addresses: Tensor) -> None:
        """Have the rows of virtual addresses fetched, where the table is on disk."""
        rows = addresses % len(self.weight)
        bring(self.weight, rows if self.hot is None else self.hot.missing(rows))


class PreValueTable(ValueTable):
    """N pre-values: rows to multiply an input with."""

    def forward(self, addresses: Tensor, x: Tensor) -> Tensor:
        """(T, P), at least float32, for virtual addresses (T, P) and inputs (T, W)."""
        weight, places = self.held(addresses % len(self.weight))
        rows = F.embedding(places, weight)
        return products(rows, x.to(rows.dtype))


class UltraMemTables(nn.Module):
    """What one memory reads, or several: values, and in some kinds pre-values."""

    def __init__(self, memory: dict[str, Any], quantization: dict[str, Any] | None) -> None:
        super().__init__()
        heads = memory["heads"] if memory["values_per_head"] else 1
        size = (table_rows(memory) * heads, memory["value_dim"], memory["value_expansion"])
        narrow = (size[0], memory["pre_value_dim"] or memory["value_dim"], size[2])
        self.values: QuantizedTable | ValueTable
        self.pre_values: QuantizedTable | ValueTable | None = None
        if quantization:
            self.values = QuantizedTable(*size, quantization)
        else:
            self.values = ValueTable(*size)
        if memory["values"] == "prevalued" and quantization:
            self.pre_values = QuantizedPreValues(*narrow, quantization)
        elif memory["values"] == "prevalued":
            self.pre_values = PreValueTable(*narrow)


class Pooled(nn.Module):
    """Scores times values (UltraMem, arXiv 2411.12364, eq. 3)."""

    at_once = 1024
    """Tokens whose rows are read together where no gradients are wanted."""

    def __init__(self, memory: dict[str, Any], hidden_size: int) -> None:
        super().__init__()

    def forward(self, addresses: Tensor, scores: Tensor, x: Tensor, tables: Any) -> Tensor:
        """(T, E*V) for addresses (T, P), scores (T, P, C), inputs (T, D) of the memory, and tables.

        tables: UltraMemTables, or a memory with its own.
        """
        pooled: Tensor = tables.values(addresses, scores)
        return pooled.to(x)


class PreValued(Pooled):
    """Scores times act(<pre-value, W x>) times values (UltraMemV2; PEER without W, with GELU)."""

    at_once = 128

    def __init__(self, memory: dict[str, Any], hidden_size: int) -> None:
        super().__init__(memory, hidden_size)
        width = memory["pre_value_dim"] or memory["value_dim"]
        projected = memory["value_projection"]
        self.pre_proj = nn.Linear(hidden_size, width, bias=False) if projected else None
        self.activation = memory["pre_value_activation"]

    def forward(self, addresses: Tensor, scores: Tensor, x: Tensor, tables: Any) -> Tensor:
        """See Pooled."""
        inputs = x if self.pre_proj is None else self.pre_proj(x)
        gates = tables.pre_values(addresses, inputs).to(scores.device)
        if self.activation != "none":
            gates = getattr(F, self.activation)(gates)
        return super().forward(addresses, scores * gates.unsqueeze(2), x, tables)


class Gated(Pooled):
    """Scores times values, and their sum times silu(W x), in every group (Memory+)."""

    def __init__(self, memory: dict[str, Any], hidden_size: int) -> None:
        super().__init__(memory, hidden_size)
        width, self.expansion = memory["value_dim"], memory["value_expansion"]
        self.gate = nn.Linear(hidden_size, width, bias=memory["projection_bias"])

    def forward(self, addresses: Tensor, scores: Tensor, x: Tensor, tables: Any) -> Tensor:
        """See Pooled."""
        gate = F.silu(self.gate(x)).repeat(1, self.expansion)
        return super().forward(addresses, scores, x, tables) * gate


KINDS: dict[str, type[Pooled]] = {"pooled": Pooled, "prevalued": PreValued, "gated": Gated}
"""By `memory["values"]`."""
