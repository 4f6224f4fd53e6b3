"""The Tucker cores: their sum, its leading singular pair with a stable sign, and the penalty.

C cores (h in the paper), H heads, R Tucker rank.
"""

from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.kernels.rank_one_filter import update_filter, update_filter_reference
from ultramem_megatron.kernels.small_svd import singular_values
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.initialization.draws import Draw
from ultramem_megatron.memory.initialization.scales import Scales
from ultramem_megatron.memory.precise_buffers import PreciseBuffers


class TuckerCores(PreciseBuffers):
    """Cores C^(i) of every head and the rank-1 filter (u, t) of their sum (eq. 7-10, 16).

    Cores are read by calling the module, as Megatron's overlapped parameter gather needs: it waits
    for a module's own parameters when that module is called.
    """

    precise: ClassVar = ("u", "t")  # rounded, the filter would pick another shortlist
    u: Tensor
    t: Tensor
    fixed: Tensor | None

    def __init__(self, config: UltraMemConfig) -> None:
        super().__init__()
        rank, heads = config.tucker_rank, config.heads
        self.weight = nn.Parameter(torch.empty(config.cores, heads, rank, rank))
        precise = torch.promote_types(self.weight.dtype, torch.float32)
        self.register_buffer("u", torch.zeros(heads, rank, dtype=precise))
        self.register_buffer("t", torch.zeros(heads, rank, dtype=precise))

        self.register_buffer("fixed", None, persistent=False)

        self.spectrum: Tensor | None = None
        """Singular values (H, R) at the last update of the filter, for reports."""

    @torch.no_grad()
    def reset(self, draw: Draw, scales: Scales) -> None:
        """Initial values; the first filter's sign is the same whatever kernels run later."""
        if scales.cores is None:
            draw.uniform_(self.weight, "cores")
        else:
            draw.normal_(self.weight, scales.cores, "cores")
        self.spectrum = update_filter_reference(self.weight, self.u, self.t)

    def forward(self, update_filter: bool = False) -> Tensor:
        """The cores (C, H, R, R); `update_filter` first brings u and t up to date with them."""
        if update_filter:
            self._update_filter()
        return self.weight

    def directions(self) -> Tensor:
        """u of the rows and t of the columns, (2, H, R)."""
        both = torch.stack([self.u, self.t], 1) if self.fixed is None else self.fixed
        return both.transpose(0, 1)  # a kernel wants the heads first

    def fix(self) -> None:
        """Keep the directions until `train()`, for cores that stay as they are."""
        self.fixed = torch.stack([self.u, self.t], 1)  # in a kernel's order

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; in training mode directions follow the filter."""
        if mode:
            self.fixed = None
        return super().train(mode)

    def total(self) -> Tensor:
        """Sum of the cores, (H, R, R), at least float32."""
        return at_least_float32(self.weight).sum(0)

    def singular_values(self) -> Tensor:
        """Singular values of the summed cores, (H, R), largest first; differentiable."""
        return singular_values(self.total())

    @torch.no_grad()
    def _update_filter(self) -> None:
        """Recompute u and t from the cores; repeating it with the same cores changes nothing.

        Raises UltraMemError where the cores are not finite, on a CPU: a GPU would have the host
        wait for the answer, and there the loss is NaN next.
        """
        weight = self.weight
        if weight.device.type == "cpu" and not bool(torch.isfinite(weight).all()):
            raise UltraMemError(
                "retrieval.cores.weight holds NaN or infinity: the run has diverged. Go on from an "
                "earlier checkpoint (--ckpt-step) with a lower --lr. Without "
                "--no-check-for-nan-in-loss-and-grad a run ends where that begins."
            )
        self.spectrum = update_filter(self.weight, self.u, self.t)


def singular_value_penalty(singular_values: Tensor, margin: float) -> Tensor:
    """Mean over heads of sum_{i>=2} max(0, lambda_i - margin)^2 / (R - 1) (eq. 11-12).

    singular_values: (H, R). Zero for rank 1, where nothing is approximated.
    """
    if singular_values.shape[-1] == 1:
        return singular_values.new_zeros(())
    return (singular_values[..., 1:] - margin).relu().square().mean()
