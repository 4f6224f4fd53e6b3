"""One UltraMem memory layer in plain PyTorch: queries, retrieval, values (arXiv 2411.12364).

B batch, S sequence, T tokens, D hidden, H heads, Q queries, R Tucker rank, N rows of a table,
m top-m, P = H*m picks of a token, C cores.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .configuration_ultramem import keys_per_side, table_rows, window
from .retrieval_ultramem import (
    Float32Buffers,
    ProductKeyRetrieval,
    TuckerRetrieval,
    key_norm,
    precise,
)
from .values_ultramem import KINDS, UltraMemTables

Pending = Tensor | Callable[[], Tensor]
"""What a memory adds, or a call that reads it."""
_MOMENTUM = 0.9


class QueryConvolution(nn.Module):
    """Depthwise convolution over time that sees only the past of the same text."""

    def __init__(self, hidden_size: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, kernel))

    def forward(self, x: Tensor, before: Tensor | None, positions: Tensor) -> Tensor:
        """x: (B, S, D) at positions (B or 1, S); before: (B, kernel-1, D), None for zeros."""
        kernel = self.weight.shape[1]
        if before is None:
            before = x.new_zeros(x.shape[0], kernel - 1, x.shape[2])
        seen = torch.cat([before, x], 1)
        out = precise(x.new_zeros(1, 1, 1))
        for tap in range(kernel):
            back = kernel - 1 - tap
            part = seen[:, tap : tap + x.shape[1]]
            part = part.masked_fill((positions < back).unsqueeze(-1), 0)  # before the text began
            out = torch.addcmul(out, part, self.weight[:, tap])
        return out.to(x.dtype)


class QueryMean(Float32Buffers):
    """What queries of all tokens have in common, the running mean over training's steps."""

    float32: ClassVar = ("mean", "updates")
    mean: Tensor
    updates: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size, dtype=torch.float32))
        self.register_buffer("updates", torch.zeros(1, dtype=torch.float32))
        self._seen: list[Tensor] = []

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """x: (B, S, D); real: (B, S), False for padding."""
        if self.training and torch.is_grad_enabled():
            flat = x.detach().flatten(0, 1) if real is None else x.detach()[real]
            count = flat.new_full((1,), len(flat), dtype=self.mean.dtype)
            self._seen.append(torch.cat([flat.sum(0, dtype=self.mean.dtype), count]))
        return x - self.mean.to(x.dtype)

    @torch.no_grad()
    def update(self) -> None:
        """Take in what was seen since the last time, once per optimizer step."""
        if not self._seen:
            return
        sums = torch.stack(self._seen).sum(0)
        self._seen = []
        total, count = sums[:-1], sums[-1:]
        good = (count > 0) & total.isfinite().all()
        updates = self.updates + 1
        share = torch.maximum(1 / updates, torch.full_like(updates, 1 - _MOMENTUM))
        self.mean.copy_(torch.where(good, torch.lerp(self.mean, total / count, share), self.mean))
        self.updates.copy_(torch.where(good, updates, self.updates))

    def _save_to_state_dict(self, *args: Any) -> None:
        self.update()
        super()._save_to_state_dict(*args)


class Query(nn.Module):
    """From hidden states to normalised queries."""

    def __init__(self, memory: dict[str, Any], hidden_size: int, eps: float) -> None:
        super().__init__()
        heads, key_dim = memory["heads"], memory["key_dim"]
        ranks = memory["tucker_rank"] if memory["query_per_rank"] else 1
        self.shape = ((heads + 1) // 2 if memory["share_query"] else heads, 2, ranks, key_dim)
        kernel = memory["query_conv_kernel"]
        self.conv = QueryConvolution(hidden_size, kernel) if kernel else None
        self.common = QueryMean(hidden_size) if memory["query_centering"] else None
        self.proj = nn.Linear(hidden_size, math.prod(self.shape), bias=memory["projection_bias"])
        self.norm = key_norm(memory, eps)

    def forward(
        self, x: Tensor, before: Tensor | None, positions: Tensor, real: Tensor | None
    ) -> Tensor:
        """Queries (T, Q, 2, Dk), or (T, Q, 2, R*Dk) with one for each rank, of x (B, S, D)."""
        if self.conv is not None:
            x = self.conv(x, before, positions)
        if self.common is not None:
            x = self.common(x, real)
        return self.norm(self.proj(x).reshape(-1, *self.shape)).flatten(3)


class Shuffle(nn.Module):
    """The fixed permutation of virtual addresses: a Feistel network on the key grid (eq. 13)."""

    tables: Tensor

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("tables", torch.zeros(4, side, dtype=torch.int32))

    def forward(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """The place on the grid that a pair of keys stands for."""
        for first, second in self.tables.view(2, 2, self.side):
            row = (row + first[column]) % self.side
            column = (column + second[row]) % self.side
        return row, column


class UltraMemMemory(nn.Module):
    """One memory layer, (B, S, D) -> (B, S, D)."""

    def __init__(
        self,
        memory: dict[str, Any],
        hidden_size: int,
        eps: float,
        quantization: dict[str, Any] | None = None,
        *,
        first_value: int = 0,
        shared: bool = False,
        on_disk: bool = False,
    ) -> None:
        """first_value: its first row in the tables. shared: those are others' too, and not here.

        on_disk: so are the tables, until their rows are read.
        """
        super().__init__()
        self.softmax, self.relu = memory["softmax"], memory["relu_scores"]
        self.history = max(memory["query_conv_kernel"] - 1, 0)
        self.query = Query(memory, hidden_size, eps)
        kind = TuckerRetrieval if memory["retrieval"] == "tdqkr" else ProductKeyRetrieval
        self.retrieval = kind(memory, eps)
        self.side, self.window, self.rows = (
            size(memory) for size in (keys_per_side, window, table_rows)
        )
        scattered = memory["key_expansion"] > 1 or self.window != memory["num_keys"] ** 2
        self.shuffle = Shuffle(self.side) if scattered else None
        self.first_value, self.on_disk = first_value, on_disk
        self.per_head = memory["values_per_head"]
        self.number = self.rows * (memory["heads"] if self.per_head else 1)
        self.grouped = memory["value_expansion"] > 1
        if not shared:
            tables = UltraMemTables(memory, quantization)
            self.values, self.pre_values = tables.values, tables.pre_values
        self.reading = KINDS[memory["values"]](memory, hidden_size)
        width, bias = memory["value_expansion"] * memory["value_dim"], memory["projection_bias"]
        projected = memory["value_projection"]
        self.value_proj = nn.Linear(width, hidden_size, bias=bias) if projected else None
        self._weights_version: int | None = None

    def forward(
        self,
        x: Tensor,
        before: Tensor | None,
        positions: Tensor,
        real: Tensor | None,
        tables: UltraMemTables | None = None,
    ) -> Pending:
        """before: (B, history, D) inputs of the tokens before x, None: there are none.

        With tables on disk, what is returned reads them when it is called, later: their rows come
        meanwhile.
        """
        if self.training:  # without gradients too: reentrant checkpointing reads twice, alike
            self._follow_weights()
        query, inputs = self.query(x, before, positions, real), x.flatten(0, 1)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.read(*self._found(query), inputs, tables).view(x.shape)
        at_once = self.reading.at_once
        parts = list(zip(query.split(at_once), inputs.split(at_once), strict=True))
        if self.on_disk:
            later = [(*self._bring(q, tables), part) for q, part in parts]
            return lambda: torch.cat([self.read(*asked, tables) for asked in later]).view(x.shape)
        read = [self.read(*self._found(q), part, tables) for q, part in parts]
        return torch.cat(read).view(x.shape)

    def locate(self, row: Tensor, column: Tensor) -> Tensor:
        """Addresses (T, P) of the tables, group * N + row, for pairs of keys (T, H, m)."""
        if self.shuffle is not None:
            row, column = self.shuffle(row, column)
        place = row * self.side + column
        rows = (place % self.window + self.first_value) % self.rows
        if self.per_head:
            rows = rows + torch.arange(rows.shape[1], device=rows.device).unsqueeze(1) * self.rows
        if self.grouped:
            rows = rows + place // self.window * self.number
        return rows.flatten(1)

    def weights(self, scores: Tensor) -> Tensor:
        """What a retrieval's scores (T, H, m, C) weigh values with, (T, P, C)."""
        if self.softmax:
            scores = scores.softmax(2)
        if self.relu:
            scores = scores.relu()
        return scores.flatten(1, 2)

    def read(
        self, addresses: Tensor, weights: Tensor, x: Tensor, tables: UltraMemTables | None = None
    ) -> Tensor:
        """What inputs x (T, D) get, (T, D), for addresses (T, P) and weights (T, P, C)."""
        pooled = self.reading(addresses, weights, x, tables=self if tables is None else tables)
        return pooled if self.value_proj is None else self.value_proj(pooled)

    def train(self, mode: bool = True) -> "UltraMemMemory":
        """As nn.Module.train; before an evaluation, the last step is taken in."""
        if self.training and not mode and self._weights_version is not None:
            self._follow_weights()
        return super().train(mode)

    def penalty(self) -> Tensor | None:
        """A loss on parameters alone; None: there is none."""
        return self.retrieval.penalty()

    def _found(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Addresses (T, P) and weights (T, P, C)."""
        row, column, scores = self.retrieval(query)
        return self.locate(row, column), self.weights(scores)

    def _bring(self, query: Tensor, tables: UltraMemTables | None) -> tuple[Tensor, Tensor]:
        """As _found; their rows are on the way then."""
        addresses, weights = self._found(query)
        held = self if tables is None else tables
        for table in (held.pre_values, held.values):
            if table is not None:
                table.bring(addresses)
        return addresses, weights

    def _follow_weights(self) -> None:
        """Once after every optimizer step: the filter follows the cores, the mean the queries."""
        version = self.query.proj.weight._version
        if version == self._weights_version:
            return
        if self._weights_version is not None and self.query.common is not None:
            self.query.common.update()
        if isinstance(self.retrieval, TuckerRetrieval):
            self.retrieval.cores.update()
        self._weights_version = version
