"""Which decomposition runs; see dispatch.py. The reference is torch.linalg's.

That of a GPU's library has the host wait for its verdict, in each layer of each micro-batch.
"""

import torch
from torch import Tensor

from ultramem_megatron.kernels.dispatch import implementation

MOST_ROWS = 16
"""Of what the Triton kernel holds in registers."""


def singular_values(matrices: Tensor) -> Tensor:
    """Singular values (..., R) of (..., R, R), largest first; differentiable."""
    if decomposes(matrices):
        from ultramem_megatron.kernels.small_svd.autograd import SingularValues

        values: Tensor = SingularValues.apply(matrices)
        return values
    return torch.linalg.svdvals(matrices)


def decomposes(matrices: Tensor) -> bool:
    """Whether matrices (..., R, R) are decomposed in Triton."""
    return implementation(matrices.device) == "triton" and matrices.shape[-1] <= MOST_ROWS
