"""From queries to the best pairs of keys and their scores (arXiv 2411.12364, eq. 1-17).

T tokens, H heads, Q queries, n keys per side (expanded), s of them whose pairs are scored, m top-m,
R Tucker rank, K width of one rank's key, C cores.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .configuration_ultramem import keys_per_side


def precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class Float32Buffers(nn.Module):
    """A module some of whose buffers stay in float32, whatever the model is cast to."""

    float32: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.float32}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            cast = getattr(self, name)
            if torch.finfo(cast.dtype).bits < 32:
                setattr(self, name, buffer.to(cast.device))
        return self


class Keys(nn.Module):
    """The key sets of all heads and sides."""

    def __init__(self, memory: dict[str, Any], eps: float) -> None:
        super().__init__()
        ranks, key_dim = memory["tucker_rank"], memory["key_dim"]
        self.split = memory["rank_layout"] == "split"
        self.by_rank = self.split or memory["query_per_rank"]
        self.key_dim = key_dim
        shape = (
            memory["heads"],
            2,
            keys_per_side(memory),
            ranks,
            key_dim // ranks if self.split else key_dim,
        )
        self.weight = nn.Parameter(torch.empty(shape))
        self.norm = key_norm(memory, eps)

    def forward(self, query: Tensor, directions: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """Keys (T, H, 2, m) of largest scores over ranks by directions (2, H, R), ascending.

        And their scores (T, H, 2, R, m), at least float32. query: (T, Q, 2, Dk or R*Dk).
        """
        heads, _, side, ranks, width = self.weight.shape
        tokens, queries = query.shape[:2]
        by_rank = query.view(tokens, queries, 1, 2, ranks if self.by_rank else 1, width)
        by_rank = by_rank.expand(-1, -1, heads // queries, -1, ranks, -1).flatten(1, 2)
        normed = self.norm(self.weight.view(heads, 2, side, -1, self.key_dim)).view_as(self.weight)
        scores = by_rank.permute(1, 2, 3, 0, 4) @ normed.permute(0, 1, 3, 4, 2)  # (H, 2, R, T, n)
        scores = precise(scores).permute(3, 0, 1, 2, 4)  # (T, H, 2, R, n)
        weights = directions.to(scores.dtype).transpose(0, 1)  # (H, 2, R)
        combined = (scores.detach() * weights.unsqueeze(-1)).sum(3)
        best = combined.topk(topk).indices.sort(-1).values
        return best, scores.gather(4, best.unsqueeze(3).expand(-1, -1, -1, ranks, -1))


class Cores(Float32Buffers):
    """Tucker cores of every head, and the leading singular pair (u, t) of their sum."""

    float32: ClassVar = ("u", "t")  # rounded, another shortlist would be picked
    u: Tensor
    t: Tensor

    def __init__(self, memory: dict[str, Any]) -> None:
        super().__init__()
        heads, rank = memory["heads"], memory["tucker_rank"]
        self.weight = nn.Parameter(torch.empty(memory["cores"], heads, rank, rank))
        self.register_buffer("u", torch.zeros(heads, rank, dtype=torch.float32))
        self.register_buffer("t", torch.zeros(heads, rank, dtype=torch.float32))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The cores (C, H, R, R), and the filter's directions (2, H, R)."""
        return self.weight, torch.stack([self.u, self.t])

    def total(self) -> Tensor:
        """Sum of the cores, (H, R, R)."""
        return precise(self.weight).sum(0)

    @torch.no_grad()
    def update(self) -> None:
        """Bring u and t up to date with the cores; the sign nearer to the stored pair is kept."""
        left, _, right = torch.linalg.svd(self.total())
        u, t = left[..., :, 0], right[..., 0, :]
        kept = ((u - self.u).abs() + (t - self.t).abs()).sum(-1, keepdim=True)
        flipped = ((-u - self.u).abs() + (-t - self.t).abs()).sum(-1, keepdim=True)
        sign = torch.where(flipped < kept, -1.0, 1.0)
        self.u.copy_(sign * u)
        self.t.copy_(sign * t)


class TuckerRetrieval(nn.Module):
    """Tucker-decomposed query-key retrieval with one score per core (eq. 4-17)."""

    def __init__(self, memory: dict[str, Any], eps: float) -> None:
        super().__init__()
        self.topk, self.side = memory["topk"], memory["side_topk"] or memory["topk"]
        self.weight, self.margin = memory["aux_loss_weight"], memory["aux_loss_margin"]
        self.keys = Keys(memory, eps)
        self.cores = Cores(memory)

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys of row and column (T, H, m) of the best pairs, and scores (T, H, m, C)."""
        weight, directions = self.cores()  # called: only then are offloaded weights there
        keys, scores = self.keys(query, directions, self.side)
        row, column = scores.unbind(2)  # (T, H, R, s)
        cores = weight.to(scores.dtype)
        with torch.no_grad():
            grid = (cores.sum(0).mT @ row).mT @ column  # (T, H, s, s)
            best = grid.flatten(2).topk(self.topk).indices
        at_row, at_column = best // self.side, best % self.side
        ranks = (-1, -1, row.shape[2], -1)
        row = row.gather(3, at_row.unsqueeze(2).expand(ranks))
        column = column.gather(3, at_column.unsqueeze(2).expand(ranks))
        by_core = torch.einsum("thaj,chab,thbj->thjc", row, cores, column)
        return keys[:, :, 0].gather(2, at_row), keys[:, :, 1].gather(2, at_column), by_core

    def penalty(self) -> Tensor | None:
        """Weighted penalty on the cores' small singular values (eq. 11-12); None: there is none."""
        if not self.weight or self.cores.weight.shape[-1] == 1:
            return None
        small = torch.linalg.svdvals(self.cores.total())[..., 1:]
        return self.weight * (small - self.margin).relu().square().mean()


class ProductKeyRetrieval(nn.Module):
    """score(i, j) = row score i + column score j (eq. 1-3)."""

    def __init__(self, memory: dict[str, Any], eps: float) -> None:
        super().__init__()
        self.topk, self.side = memory["topk"], memory["side_topk"] or memory["topk"]
        self.keys = Keys(memory, eps)

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As TuckerRetrieval's, with one core."""
        keys, scores = self.keys(query, query.new_ones(2, len(self.keys.weight), 1), self.side)
        row, column = scores[..., 0, :].unbind(2)  # (T, H, s)
        pairs = (row.unsqueeze(3) + column.unsqueeze(2)).flatten(2)
        found, best = pairs.topk(self.topk)
        at_row, at_column = best // self.side, best % self.side
        rows, columns = keys[:, :, 0].gather(2, at_row), keys[:, :, 1].gather(2, at_column)
        return rows, columns, found.unsqueeze(-1)

    def penalty(self) -> None:
        """There is none."""


def key_norm(memory: dict[str, Any], eps: float) -> nn.Module:
    """Of queries and keys, over Dk."""
    if memory["qk_norm"] == "none":
        return nn.Identity()
    if memory["qk_norm"] == "rmsnorm":
        return nn.RMSNorm(memory["key_dim"], eps=eps)
    return nn.LayerNorm(memory["key_dim"], eps=eps, bias=False)
