"""Which decomposition runs; see dispatch.py. The reference is torch.linalg's.

That of a GPU's library has the host wait for its verdict, in each layer of each micro-batch.
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation

MOST_ROWS = 16
"""Of what the Triton kernel holds in registers."""


def small_svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., R, R), S (..., R) and Vh (..., R, R), as torch.linalg.svd gives, without a graph.

    matrices: (..., R, R), float32 or float64. In Triton a column of U whose singular value is zero
    is zero, and what holds NaN gives NaN; elsewhere that raises torch.linalg.LinAlgError.
    """
    if _fused(matrices):
        from ultramem_megatron.kernels.small_svd.triton_kernel import decompose  # needs Triton

        return decompose(matrices.detach())
    found: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(matrices.detach())
    return found


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values (..., R) of (..., R, R), largest first; differentiable."""
    if _fused(matrices):
        from ultramem_megatron.kernels.small_svd.autograd import SingularValues

        values: Tensor = SingularValues.apply(matrices)
        return values
    return torch.linalg.svdvals(matrices)


def _fused(matrices: Tensor) -> bool:
    return implementation(matrices.device) == "triton" and matrices.shape[-1] <= MOST_ROWS
