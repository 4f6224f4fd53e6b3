"""Comparisons that say what differs, with tolerances that come from the dtype."""

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; the absolute norm if expected is zero."""
    expected = expected.detach().double()
    difference = (actual.detach().double() - expected).norm().item()
    scale = expected.norm().item()
    return difference / scale if scale > 0 else difference


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "tensor") -> None:
    """Assert equal shapes and a relative error below `tolerance`; NaN anywhere fails."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} instead of {expected.shape}"
    assert torch.isfinite(actual).all(), f"{name} holds NaN or infinity"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3e} > {tolerance:.1e}"
