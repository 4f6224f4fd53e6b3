"""Comparisons that say what differs, with tolerances that come from the dtype."""

import torch
from torch import Tensor

from ultramem_megatron.tools.verify_parallel.whole_model import relative_error

__all__ = ["assert_close", "relative_error"]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "tensor") -> None:
    """Assert equal shapes and a relative error below `tolerance`; NaN anywhere fails."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} instead of {expected.shape}"
    assert torch.isfinite(actual).all(), f"{name} holds NaN or infinity"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3e} > {tolerance:.1e}"
