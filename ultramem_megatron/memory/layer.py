"""UltraMemLayer: query -> retrieve -> read values -> project, as in the paper's figure 4 and 5.

T tokens, D hidden, H heads, m top-m, C cores, E expansion, V value dim. The layer is a plain
torch module: it knows nothing of Megatron, ranks or groups.
"""

from typing import Self

import torch
from torch import Tensor, nn

from ultramem_megatron.communication.pausing import Steps, run
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization import reset_parameters
from ultramem_megatron.memory.linear import Linear
from ultramem_megatron.memory.observations import MemoryStatistics
from ultramem_megatron.memory.premultiplied import PremultipliedValues
from ultramem_megatron.memory.query import QueryProjection
from ultramem_megatron.memory.retrieval.addresses import GridShuffle, split_address
from ultramem_megatron.memory.retrieval.product_key import ProductKeyRetrieval
from ultramem_megatron.memory.retrieval.retrieved import Retrieved
from ultramem_megatron.memory.retrieval.tdqkr import TuckerRetrieval
from ultramem_megatron.memory.retrieval.tucker_core import TuckerCores, singular_value_penalty
from ultramem_megatron.memory.tables.value_table import ValueTable


class UltraMemLayer(nn.Module):
    """One memory layer, (..., D) -> (..., D).

    In training call `update_filter()` once after each optimizer step, before the next forward
    (Megatron layers built by this package do); evaluation uses the filter as it was left.
    """

    def __init__(
        self,
        config: UltraMemConfig,
        *,
        hidden_size: int,
        num_layers: int,
        layer_number: int = 1,
        eps: float = 1e-5,
        values: ValueTable | None = None,
    ) -> None:
        """Build and initialise in the default dtype and on the default device.

        hidden_size: D. num_layers: L of the whole model (for the initial output variance).
        layer_number: 1-based; with the config it determines the initial values, whatever else has
        drawn random numbers before. eps: of the query and key norms. values: the table, or
        this rank's part of it; by default the layer has one of its own. Raises UltraMemError.
        """
        super().__init__()
        config.validate(hidden_size=hidden_size, num_layers=num_layers)
        self.config = config
        self.layer_number = layer_number
        self.query = QueryProjection(config, hidden_size, eps)
        self.retrieval: TuckerRetrieval | ProductKeyRetrieval = (
            TuckerRetrieval(config, eps)
            if config.retrieval == "tdqkr"
            else ProductKeyRetrieval(config, eps)
        )
        self.shuffle: nn.Module = (
            GridShuffle(config.keys_per_side) if config.value_expansion > 1 else nn.Identity()
        )
        self.values = ValueTable(config) if values is None else values
        self.value_proj: nn.Module = (
            Linear(config.value_expansion * config.value_dim, hidden_size, bias=False)
            if config.value_projection
            else nn.Identity()
        )
        self.premultiplied: PremultipliedValues | None = None
        self.statistics = MemoryStatistics(config.num_values)
        self.register_load_state_dict_post_hook(_refuse_non_finite_values)
        if not self.values.weight.is_meta:
            reset_parameters(self, num_layers=num_layers)

    def forward(self, x: Tensor, history: Tensor | None = None) -> Tensor:
        """x: (..., D); with a query convolution (S, B, D) and its `history` (see query.py)."""
        return run(self.steps(x, history))

    def steps(self, x: Tensor, history: Tensor | None = None) -> Steps:
        """As forward, pausing whenever other ranks have to answer."""
        retrieved = self.retrieve(self.query(x, history))
        addresses = self.shuffle(retrieved.addresses)
        if self.premultiplied is not None:
            return self.premultiplied(addresses, retrieved.scores).view(x.shape)
        pooled = yield from self.values(addresses, retrieved.scores)
        out = self.value_proj(pooled.flatten(1)).view(x.shape)
        if self.training and torch.is_grad_enabled():
            rows, _ = split_address(addresses, self.config.num_values)
            self.statistics.record(rows, retrieved.scores, out, self.config.topk)
        return out

    @property
    def pauses(self) -> int:
        """How often `steps` pauses."""
        return self.values.pauses

    def retrieve(self, query: Tensor) -> Retrieved:
        """Addresses and scores for normalised queries (T, Q, 2, Dk)."""
        retrieved = self.retrieval(query)
        if not self.config.softmax:
            return retrieved
        tokens, _, cores = retrieved.scores.shape
        per_head = retrieved.scores.view(tokens, self.config.heads, self.config.topk, cores)
        return retrieved._replace(scores=per_head.softmax(2).view_as(retrieved.scores))

    @property
    def cores(self) -> TuckerCores | None:
        """The Tucker cores; None with product-key retrieval."""
        return self.retrieval.cores if isinstance(self.retrieval, TuckerRetrieval) else None

    def update_filter(self) -> None:
        """Bring the rank-1 filter up to date with the cores."""
        if self.cores is not None:
            self.cores(update_filter=True)

    def prepare_for_inference(self, premultiply: bool = False) -> None:
        """Do once what every forward would repeat, until `train()`; the weights must stay.

        premultiply: multiply the values by their projections too (see premultiplied.py), which
        takes E*h*D/Dv times the memory of the table. Raises UltraMemError if that is impossible.
        """
        self.eval()
        self.retrieval.keys.fix()
        if premultiply:
            self.premultiplied = self._premultiply()

    def _premultiply(self) -> PremultipliedValues:
        if not isinstance(self.value_proj, Linear):
            raise UltraMemError(
                "--premultiply-values: the values of this model have no projection "
                "(--no-ultramem-value-projection). Decode without it."
            )
        ranks = self.values.layout.size
        if ranks > 1:
            raise UltraMemError(
                f"--premultiply-values: each value table is shared by {ranks} ranks. Use "
                f"--ultramem-parallel-size 1, or decode without it."
            )
        return PremultipliedValues(self.values.weight, self.value_proj.weight, self.config.cores)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; in training mode nothing is prepared."""
        if mode:
            self.premultiplied = None
        return super().train(mode)

    def auxiliary_loss(self) -> Tensor | None:
        """alpha * penalty on the cores' small singular values (eq. 11-12); None if there is none.

        A function of parameters only: add it once per optimizer step, not once per micro-batch.
        """
        if self.cores is None or self.config.aux_loss_weight == 0 or self.config.tucker_rank == 1:
            return None
        penalty = singular_value_penalty(self.cores.singular_values(), self.config.aux_loss_margin)
        return self.config.aux_loss_weight * penalty


def _refuse_non_finite_values(layer: nn.Module, _incompatible: object) -> None:
    assert isinstance(layer, UltraMemLayer)
    table = layer.values.weight
    if table.is_meta or bool(torch.isfinite(table.sum(dtype=torch.float32))):
        return
    bad = int((~torch.isfinite(table)).any(dim=1).sum())
    if bad:
        raise UltraMemError(
            f"The loaded value table of memory layer {layer.layer_number} holds NaN or infinity in "
            f"{bad} of its {len(table)} rows. The checkpoint is damaged or the run that wrote it "
            f"had diverged: load an earlier one (--load with --ckpt-step)."
        )
