"""What every retrieval offers a memory layer, and how it is listed.

T tokens, H heads, m top-m, C cores, r rank, N keys per side.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ultramem_megatron.kernels.grid_shuffle import grid_shuffle
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.scales import Scales
from ultramem_megatron.memory.retrieval.keys import ProductKeys
from ultramem_megatron.memory.retrieval.retrieved import Retrieved


class Retrieval(nn.Module, ABC):
    """From queries to addresses and scores. What a kind does not need stays as it is here."""

    score_power: float
    """Scores grow with this power of the query's gain."""

    def __init__(self, config: UltraMemConfig, eps: float) -> None:
        """eps: of the keys' norm."""
        super().__init__()
        self.config = config
        self.keys = ProductKeys(config, eps)

    @abstractmethod
    def forward(self, query: Tensor) -> Retrieved:
        """query: (T, Q, 2, Dk), normalised."""

    def shuffled(self, query: Tensor, tables: Tensor) -> Retrieved:
        """As forward, its addresses shuffled by the tables of `grid_shuffle`.

        Override it where a kernel can do that in passing.
        """
        retrieved = self(query)
        return retrieved._replace(addresses=grid_shuffle(retrieved.addresses, tables))

    def fix(self) -> None:
        """Do once what every forward would repeat, until `train()`, for weights that stay."""
        self.keys.fix()

    def reset(self, draw: Draw, scales: Scales) -> None:
        """Initial values."""
        self.keys.reset(draw, scales)

    def after_step(self) -> None:
        """What the optimizer's step makes necessary; repeating it changes nothing."""

    def penalty(self) -> Tensor | None:
        """A weighted loss on parameters alone, added once per optimizer step; None: there is none.

        Differentiable in the parameters of this module.
        """
        return None

    def recall(self, query: Tensor) -> Tensor | None:
        """Share of the best pairs of keys that a search which shortlists can find does find.

        query: as for `forward`, of few tokens. A scalar; None where nothing is missed.
        """
        return None

    def report(self) -> dict[str, float]:
        """Figures for the log, by the kind's `reports`, in order; what does not apply is NaN."""
        return {}


Grids = tuple[Tensor, Tensor, list[Tensor]]
"""Shortlisted rows (T, m) and columns (T, m), and the scores (T, m, m) of their pairs per core."""


@dataclass(frozen=True)
class RetrievalKind:
    """One retrieval in the list.

    name: the flag's value. check: raises UltraMemError for a config that it cannot serve.
    reference: the plain form for one head, of rank scores row and column (T, r, N), the layer's
    state dict and the config; it shares no code with `build`. defaults: fields of the config that
    it needs other than the config's own, where they are not given. reports: names of what
    `Retrieval.report` gives.
    """

    name: str
    build: Callable[[UltraMemConfig, float], Retrieval]
    check: Callable[[UltraMemConfig], None]
    reference: Callable[[Tensor, Tensor, int, Mapping[str, Tensor], UltraMemConfig], Grids]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reports: tuple[str, ...] = ()
