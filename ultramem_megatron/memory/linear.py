"""A linear map that leaves its initial values to initialization.py."""

from torch import nn


class Linear(nn.Linear):
    """nn.Linear without the draws at construction, which would shift other modules' values."""

    def reset_parameters(self) -> None:
        """Draw nothing."""
