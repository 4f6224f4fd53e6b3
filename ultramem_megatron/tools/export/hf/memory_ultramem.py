"""One UltraMem memory layer in plain PyTorch: queries, retrieval, values (arXiv 2411.12364).

B batch, S sequence, T tokens, D hidden, H heads, Q queries, N values, V value dim,
m top-m, P = H*m picks of a token, C cores, E expansion.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantized_ultramem import QuantizedTable
from .retrieval_ultramem import (
    Float32Buffers,
    ProductKeyRetrieval,
    TuckerRetrieval,
    key_norm,
    keys_per_side,
    precise,
)

_CHUNK = 1024  # tokens looked up at a time where no gradients are wanted
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
            before = x.new_zeros(len(x), kernel - 1, x.shape[-1])
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
        self.shape = ((heads + 1) // 2 if memory["share_query"] else heads, 2, key_dim)
        kernel = memory["query_conv_kernel"]
        self.conv = QueryConvolution(hidden_size, kernel) if kernel else None
        self.common = QueryMean(hidden_size) if memory["query_centering"] else None
        self.proj = nn.Linear(hidden_size, self.shape[0] * 2 * key_dim, bias=False)
        self.norm = key_norm(memory, eps)

    def forward(
        self, x: Tensor, before: Tensor | None, positions: Tensor, real: Tensor | None
    ) -> Tensor:
        """Queries (T, Q, 2, Dk) of x (B, S, D); see QueryConvolution and QueryMean."""
        if self.conv is not None:
            x = self.conv(x, before, positions)
        if self.common is not None:
            x = self.common(x, real)
        return self.norm(self.proj(x).reshape(-1, *self.shape))


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


class ValueTable(nn.Module):
    """N values, pooled by their scores, one sum for each expansion group (eq. 15 and 17)."""

    def __init__(self, memory: dict[str, Any]) -> None:
        super().__init__()
        self.expansion = memory["value_expansion"]
        self.weight = nn.Parameter(torch.empty(memory["num_keys"] ** 2, memory["value_dim"]))

    def forward(self, addresses: Tensor, scores: Tensor) -> Tensor:
        """(T, E*V) for virtual addresses (T, P) and scores (T, P, C)."""
        number, width = self.weight.shape
        tokens, _, cores = scores.shape
        rows, groups = addresses % number, addresses // number
        core = torch.arange(cores, device=rows.device)
        token = torch.arange(tokens, device=rows.device).unsqueeze(1)
        slices = (rows.unsqueeze(2) * cores + core).flatten()
        bags = ((token * self.expansion + groups).unsqueeze(2) * cores + core).flatten()
        bags, order = bags.sort(stable=True)
        every = torch.arange(tokens * self.expansion * cores, device=rows.device)
        sums = F.embedding_bag(
            slices[order],
            self.weight.view(number * cores, width // cores),
            torch.searchsorted(bags, every),
            mode="sum",
            per_sample_weights=scores.flatten()[order].to(self.weight.dtype),
        )
        return sums.view(tokens, self.expansion * width)


class UltraMemMemory(nn.Module):
    """One memory layer, (B, S, D) -> (B, S, D)."""

    def __init__(
        self,
        memory: dict[str, Any],
        hidden_size: int,
        eps: float,
        quantization: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.softmax, self.side = memory["softmax"], keys_per_side(memory)
        self.history = max(memory["query_conv_kernel"] - 1, 0)
        self.query = Query(memory, hidden_size, eps)
        kind = TuckerRetrieval if memory["retrieval"] == "tdqkr" else ProductKeyRetrieval
        self.retrieval = kind(memory, eps)
        self.shuffle = Shuffle(self.side) if memory["value_expansion"] > 1 else None
        self.values: QuantizedTable | ValueTable = (
            QuantizedTable(memory, quantization) if quantization else ValueTable(memory)
        )
        width = memory["value_expansion"] * memory["value_dim"]
        projected = memory["value_projection"]
        self.value_proj = nn.Linear(width, hidden_size, bias=False) if projected else None
        self._weights_version: int | None = None

    def forward(
        self, x: Tensor, before: Tensor | None, positions: Tensor, real: Tensor | None
    ) -> Tensor:
        """before: (B, history, D) inputs of the tokens before x, None: there are none."""
        if self.training and torch.is_grad_enabled():
            self._follow_weights()
        query = self.query(x, before, positions, real)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._look_up(query).view(x.shape)
        return torch.cat([self._look_up(part) for part in query.split(_CHUNK)]).view(x.shape)

    def train(self, mode: bool = True) -> "UltraMemMemory":
        """As nn.Module.train; before an evaluation, the last step is taken in."""
        if self.training and not mode and self._weights_version is not None:
            self._follow_weights()
        return super().train(mode)

    def penalty(self) -> Tensor | None:
        """A loss on parameters alone; None: there is none."""
        return self.retrieval.penalty()

    def _look_up(self, query: Tensor) -> Tensor:
        row, column, scores = self.retrieval(query)
        if self.softmax:
            scores = scores.softmax(2)
        if self.shuffle is not None:
            row, column = self.shuffle(row, column)
        addresses = (row * self.side + column).flatten(1)
        pooled = self.values(addresses, scores.flatten(1, 2)).to(query.dtype)
        return pooled if self.value_proj is None else self.value_proj(pooled)

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
