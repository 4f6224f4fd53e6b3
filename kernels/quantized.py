"""Rows of a table in 8 bits: codes, and the scales that multiply them.

N rows, V value dim, B scales of a row, each of V/B neighbouring values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ultramem_megatron.errors import UltraMemError

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Dtypes of codes."""


class QuantizedRows(NamedTuple):
    """codes: (N, V), of FORMATS. scales: (N, B) float32."""

    codes: Tensor
    scales: Tensor

    def at(self, rows: Tensor) -> Tensor:
        """Values (R, V), float32, of `rows` (R,), int64."""
        codes = self.codes.view(torch.uint8)[rows]  # PyTorch gathers no float8 everywhere
        return QuantizedRows(codes.view(self.codes.dtype), self.scales[rows]).values()

    def values(self) -> Tensor:
        """All of them, (N, V), float32."""
        codes = self.codes.float().unflatten(1, (self.scales.shape[1], -1))
        return (codes * self.scales.unsqueeze(2)).flatten(1)


def format_of(codes: Tensor) -> str:
    """Which of FORMATS they are."""
    return next(name for name, dtype in FORMATS.items() if dtype == codes.dtype)


def check_block(flag: str, block: int | None, value_dim: int, pre_value_dim: int | None) -> None:
    """Raise UltraMemError unless so many values in common with a scale divide every table's row."""
    for what, width in (("values", value_dim), ("pre-values", pre_value_dim or value_dim)):
        if block is not None and (block < 1 or width % block):
            raise UltraMemError(
                f"{flag} is {block}; {what} are {width} wide. Give a divisor of {width}, or leave "
                f"{flag} out for one scale a row."
            )


def quantized(values: Tensor, kind: str, block: int | None = None) -> QuantizedRows:
    """Codes and scales of values (N, V); a block's largest value gets the largest code.

    kind: of FORMATS. block: values of a row with a scale in common, a divisor of V; None: all of
    them. Raises UltraMemError where values are not finite.
    """
    blocks = values.float().unflatten(1, (-1, block or values.shape[1]))
    if not blocks.isfinite().all():
        raise UltraMemError("A value table holds NaN or infinity: the model is damaged.")
    scales = _scales(blocks, kind)
    exact = blocks / scales
    codes = (exact.round() if kind == "int8" else exact).to(FORMATS[kind])
    return QuantizedRows(codes.flatten(1), scales.squeeze(2))


def _scales(blocks: Tensor, kind: str) -> Tensor:
    """(N, B, 1): what the largest code of each block is multiplied by; 1 where all is zero."""
    most = 127.0 if kind == "int8" else torch.finfo(FORMATS[kind]).max
    scales = blocks.abs().amax(2, keepdim=True) / most
    # Subnormal scales would lose the values: those are nothing beside others.
    return torch.where(scales < torch.finfo(torch.float32).tiny, torch.ones_like(scales), scales)
