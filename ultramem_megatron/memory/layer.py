"""UltraMemLayer: query -> retrieve -> read values -> project, as in the paper's figure 4 and 5.

T tokens, D hidden, H heads, m top-m, C cores, E expansion, V value dim. The layer is a plain
torch module: it knows nothing of Megatron, ranks or groups.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from ultramem_megatron.communication.pausing import Pausing, run
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.finite import refuse_non_finite
from ultramem_megatron.memory.initialization import INITIALISATIONS
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.feed_forward import default_std
from ultramem_megatron.memory.initialization.scales import Host
from ultramem_megatron.memory.modules import Linear, zero_bias
from ultramem_megatron.memory.observations import MemoryStatistics
from ultramem_megatron.memory.premultiplied import PremultipliedValues
from ultramem_megatron.memory.query import QueryProjection
from ultramem_megatron.memory.retrieval import RETRIEVALS
from ultramem_megatron.memory.retrieval.addresses import GridShuffle, shuffles
from ultramem_megatron.memory.retrieval.retrieved import Retrieved
from ultramem_megatron.memory.retrieval.window import window_module
from ultramem_megatron.memory.validation import check_alive, check_design
from ultramem_megatron.memory.values import VALUES
from ultramem_megatron.memory.values.contract import Site
from ultramem_megatron.memory.values.pooled import PooledValues

_CALIBRATION_TOKENS = 256


class UltraMemLayer(nn.Module):
    """One memory layer, (..., D) -> (..., D).

    In training call `end_batch()` once in each optimizer step, after its last backward, and
    `after_step()` once after it, before the next forward (Megatron layers built by this package
    do); evaluation uses the filter and the mean of queries as they were left.
    """

    def __init__(
        self,
        config: UltraMemConfig,
        *,
        hidden_size: int,
        num_layers: int,
        layer_number: int = 1,
        eps: float = 1e-5,
        residual_branches: int | None = None,
        feed_forward_std: float | None = None,
        values: nn.Module | None = None,
        table_number: int | None = None,
        first_value: int = 0,
    ) -> None:
        """Build and initialise in the default dtype and on the default device.

        hidden_size: D. num_layers: L of the whole model, and residual_branches, by default 2 L,
        how many outputs it adds up (for the initial output variance).
        layer_number: 1-based; with the config it determines the initial values, whatever else has
        drawn random numbers before. eps: of the query and key norms. feed_forward_std: of the
        output of the layer's own MLP, for `init=matched`; by default that of a GELU MLP 4 D wide
        with weights of 0.02, as Megatron has it. values: built by a kind of
        VALUES, whole or this rank's part; by default the layer has its own. table_number: the
        layer after which the values it reads are named, by default this one; layers that read the
        same values agree on it, and that layer draws them. first_value: row of the table at which
        this memory's values begin. Raises UltraMemError.
        """
        super().__init__()
        check_design(config, hidden_size=hidden_size, num_layers=num_layers)
        self.config = config
        self.layer_number = layer_number
        self.table_number = layer_number if table_number is None else table_number
        self.query = QueryProjection(config, hidden_size, eps)
        self.retrieval = RETRIEVALS[config.retrieval].build(config, eps)
        self.shuffle: nn.Module = (
            GridShuffle(config.keys_per_side) if shuffles(config) else nn.Identity()
        )
        self.window = window_module(config, first_value)
        if values is None:
            values = VALUES[config.values].build(config, Site(hidden_size))
        self.values: Any = values
        self.value_proj: nn.Module = (
            Linear(
                config.value_expansion * config.value_dim, hidden_size, bias=config.projection_bias
            )
            if config.value_projection
            else nn.Identity()
        )
        self.premultiplied: PremultipliedValues | None = None
        self.statistics = MemoryStatistics(config.num_values)
        self.register_load_state_dict_post_hook(_refuse_non_finite_weights)
        if not self.values.weight.is_meta:
            check_alive(config)
            branches = residual_branches or 2 * num_layers
            if feed_forward_std is None:
                feed_forward_std = default_std(hidden_size, branches)
            self.reset_parameters(
                Host(
                    hidden_size=hidden_size,
                    residual_branches=branches,
                    feed_forward_std=feed_forward_std,
                )
            )

    def forward(
        self, x: Tensor, history: Tensor | None = None, reach: Tensor | None = None
    ) -> Tensor:
        """x: (..., D); with a query convolution (S, B, D), its `history` and `reach` (query.py)."""
        return run(self.steps(x, history, reach))

    def steps(
        self,
        x: Tensor,
        history: Tensor | None = None,
        reach: Tensor | None = None,
        advances: bool = False,
    ) -> Pausing:
        """As forward, pausing whenever other ranks have to answer.

        advances: see `CausalConvolution.forward`.
        """
        query = self.query(x, history, reach, advances)
        records = self.training and torch.is_grad_enabled()
        watched = records or bool(self.retrieval._forward_hooks)
        retrieved, addresses = self._located(query, of_grid=watched)
        if self.premultiplied is not None:
            return self.premultiplied(addresses, retrieved.scores).view(x.shape)
        pooled = yield from self.values(addresses, retrieved.scores, x)
        out = self.value_proj(pooled.flatten(1)).view(x.shape)
        if records:
            self.statistics.record(query, retrieved, addresses, out, self.config.topk)
            self.statistics.record_recall(query, self.retrieval.recall)
        return out

    @property
    def pauses(self) -> int:
        """How often `steps` pauses."""
        return self.values.pauses

    def locate(self, addresses: Tensor) -> Tensor:
        """Addresses of the table, group * N + row, for those of the key grid (T, H*m)."""
        located: Tensor = self.window(self.shuffle(addresses))
        return located

    def _located(self, query: Tensor, of_grid: bool) -> tuple[Retrieved, Tensor]:
        """What is retrieved, and its addresses of the table.

        of_grid: somebody looks at what is retrieved, addresses of the key grid; else they may be
        shuffled already, which a GPU does in the kernel before.
        """
        if of_grid or not isinstance(self.shuffle, GridShuffle):
            retrieved = self.retrieve(query)
            return retrieved, self.locate(retrieved.addresses)
        retrieved = self.retrieve(query, self.shuffle.tables)
        return retrieved, self.window(retrieved.addresses)

    def retrieve(self, query: Tensor, shuffle: Tensor | None = None) -> Retrieved:
        """Addresses and scores for normalised queries (T, Q, 2, Dk).

        shuffle: tables of the fixed shuffle, for shuffled addresses.
        """
        if shuffle is None:
            retrieved = self.retrieval(query)
        else:
            retrieved = self.retrieval.shuffled(query, shuffle)
        if self.config.relu_scores:
            return retrieved._replace(scores=retrieved.scores.relu())
        if not self.config.softmax:
            return retrieved
        tokens, _, cores = retrieved.scores.shape
        per_head = retrieved.scores.view(tokens, self.config.heads, self.config.topk, cores)
        return retrieved._replace(scores=per_head.softmax(2).view_as(retrieved.scores))

    def after_step(self) -> None:
        """What an optimizer step makes necessary, such as a filter that follows the cores.

        Raises UltraMemError, with the layer's number, for weights that are not finite.
        """
        try:
            self.retrieval.after_step()
        except UltraMemError as error:
            raise UltraMemError(f"memory layer {self.layer_number}: {error}") from None

    def end_batch(self, reduce: Callable[[Tensor], object] | None = None) -> None:
        """What the last micro-batch of an optimizer step makes necessary: see QueryMean.update.

        Call it once per step, before or after the optimizer's, in the same place on all ranks.
        reduce: sums its argument over the ranks that see other tokens, in place.
        """
        if self.query.common is not None:
            self.query.common.update(reduce)

    def prepare_for_inference(self, premultiply: bool = False) -> None:
        """Do once what every forward would repeat, until `train()`; the weights must stay.

        premultiply: multiply the values by their projections too (see premultiplied.py), which
        takes E*h*D/Dv times the memory of the table. Raises UltraMemError if that is impossible.
        """
        self.eval()
        self.retrieval.fix()
        if premultiply:
            self.premultiplied = self._premultiply()

    def _premultiply(self) -> PremultipliedValues:
        if not isinstance(self.value_proj, Linear):
            raise UltraMemError(
                "--premultiply-values: the values of this model have no projection "
                "(--no-ultramem-value-projection). Decode without it."
            )
        if not isinstance(self.values, PooledValues):
            raise UltraMemError(
                f"--premultiply-values: values of the kind {self.config.values} are not pooled by "
                f"their scores alone. Decode without it."
            )
        if self.value_proj.bias is not None:
            raise UltraMemError(
                "--premultiply-values: the value projection of this model has a bias "
                "(--ultramem-projection-bias). Decode without it."
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
        """The retrieval's penalty on its parameters, weighted; None if there is none.

        A function of parameters only: add it once per optimizer step, not once per micro-batch.
        """
        return self.retrieval.penalty()

    @torch.no_grad()
    def reset_parameters(self, host: Host) -> None:
        """Initial values in a model."""
        config, draw = self.config, Draw(self.config.seed, self.layer_number)
        scales = INITIALISATIONS[config.init].scales(config, host)
        self.query.reset(draw, scales)
        self.retrieval.reset(draw, scales)
        if isinstance(self.value_proj, Linear):
            draw.normal_(self.value_proj.weight, scales.value_projection, "value_proj")
            zero_bias(self.value_proj)
        if isinstance(self.shuffle, GridShuffle):
            self.shuffle.reset(draw.generator("shuffle", torch.device("cpu")))
        self.after_step()
        if scales.mean_square is not None:
            generator = draw.generator("calibration", self.query.proj.weight.device)
            ratio = scales.mean_square / self.calibrate(generator, scales.mean_square)
            if config.softmax:  # the weights add up to 1 whatever the queries: the values give way
                scales = replace(scales, values=scales.values * math.sqrt(ratio))
        self.values.reset_own(draw, scales)
        if self.table_number == self.layer_number:
            self.values.reset(draw, scales)

    @torch.no_grad()
    def calibrate(self, generator: torch.Generator, mean_square: float = 1.0) -> float:
        """Scale the queries so that weights of values have this mean square; what it was before.

        With 1 the variance of what is read is that of the values times their number (appendix A).
        Inputs are drawn as a norm leaves them, with unit variance; the squared scores of the real
        keys are averaged over tokens, picks and cores. Under a softmax queries stay as they are.
        """
        weight = self.query.proj.weight
        drawn = torch.randn(
            _CALIBRATION_TOKENS,
            1,
            weight.shape[1],
            generator=generator,
            device=weight.device,
            dtype=torch.float32,
        )
        scores = self.retrieve(self.query(drawn.to(weight.dtype))).scores
        square = float(scores.double().square().mean())
        if not self.config.softmax:
            gain = getattr(self.query.norm, "weight", None)
            power = -1 / (2 * self.retrieval.score_power)
            (weight if gain is None else gain).mul_((square / mean_square) ** power)
        return square


def memory_layers(model: nn.Module) -> Iterable[UltraMemLayer]:
    """The memory layers of a model, wrapped or not."""
    return (module for module in model.modules() if isinstance(module, UltraMemLayer))


def _refuse_non_finite_weights(layer: nn.Module, _incompatible: object) -> None:
    assert isinstance(layer, UltraMemLayer)
    owner = f"memory layer {layer.layer_number}"
    refuse_non_finite(chain(layer.named_parameters(), layer.named_buffers()), owner)
