"""A value table in 8 bits, multiplied out where it is read: it is only read, never trained.

N values, V value dim, W width of a pre-value, T tokens, P picks of a token, C cores, E expansion,
B values with a scale in common.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .hot_rows_ultramem import HotRows
from .mapped_ultramem import bring
from .retrieval_ultramem import Float32Buffers, precise

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What a code is, by `value_quantization["format"]`."""
AT_ONCE = 64
"""Tokens whose values lie multiplied out in a CPU's cache together."""


class QuantizedTable(Float32Buffers):
    """N values, pooled by their scores as a ValueTable's (eq. 15 and 17), from codes and scales."""

    float32: ClassVar = ("scales",)
    codes: Tensor
    scales: Tensor

    def __init__(
        self, number: int, width: int, expansion: int, quantization: dict[str, Any]
    ) -> None:
        super().__init__()
        self.expansion = expansion
        self.format = FORMATS[quantization["format"]]
        blocks = width // (quantization["block"] or width)
        # Bytes, whatever they stand for: numbers would be converted with the model's.
        self.register_buffer("codes", torch.zeros(number, width, dtype=torch.uint8))
        self.register_buffer("scales", torch.ones(number, blocks, dtype=torch.float32))
        self.hot: HotRows | None = None

    def forward(self, addresses: Tensor, scores: Tensor) -> Tensor:
        """(T, E*V), float32, for virtual addresses (T, P) and scores (T, P, C)."""
        if self.codes.device.type != "cpu" or torch.compiler.is_compiling():
            return self._sums(addresses, scores)
        parts = zip(addresses.split(AT_ONCE), scores.split(AT_ONCE), strict=True)
        return torch.cat([self._sums(*part) for part in parts])

    def _sums(self, addresses: Tensor, scores: Tensor) -> Tensor:
        number, width = self.codes.shape
        tokens, _, cores = scores.shape
        token = torch.arange(tokens, device=addresses.device).unsqueeze(1)
        bags = (token * self.expansion + addresses // number).flatten()
        values, scales = self._rows((addresses % number).flatten())
        weights = scores.float().flatten(0, 1)
        if scales.shape[1] == 1:
            weights = weights * scales  # P*C products in place of P*V
        else:
            values = blockwise(values, scales)
        weighted = values.view(-1, cores, width // cores) * weights[..., None]
        sums = values.new_zeros(tokens * self.expansion, cores, width // cores)
        return sums.index_add(0, bags, weighted).view(tokens, self.expansion * width)

    def bring(self, addresses: Tensor) -> None:
        """Have the rows of virtual addresses fetched, where the table is on disk."""
        rows = addresses % len(self.codes)
        for part in (self.codes, self.scales):
            bring(part, rows if self.hot is None else self.hot.missing(rows))

    def read(self, rows: Tensor) -> Tensor:
        """Values (R, V), float32, of rows (R,)."""
        return blockwise(*self._rows(rows))

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the codes of rows (R,) stand for (R, V), and their scales (R, V / B)."""
        codes, scales = self.codes, self.scales
        if self.hot is not None and not torch.compiler.is_compiling():
            unique, rows = rows.unique(return_inverse=True)
            codes, scales = self.hot.read(
                unique, lambda missing: (self.codes[missing], self.scales[missing])
            )
        return decoded(codes.index_select(0, rows), self.format), scales.index_select(0, rows)


class QuantizedPreValues(QuantizedTable):
    """N pre-values, multiplied with inputs as a PreValueTable's."""

    def forward(self, addresses: Tensor, x: Tensor) -> Tensor:
        """(T, P), float32, for virtual addresses (T, P) and inputs (T, W)."""
        rows = self.read((addresses % len(self.codes)).flatten())
        return products(rows.view(*addresses.shape, -1), x)


def decoded(codes: Tensor, kind: torch.dtype) -> Tensor:
    """What codes, bytes, stand for, float32.

    e4m3 is moved to the places of a half's sign, exponent and fraction, which is 2^8 too small:
    PyTorch's own conversion takes numbers one by one on a CPU. NaN, in no table, becomes 480.
    """
    if kind == torch.int8:
        return codes.view(kind).float()
    halves = codes.view(torch.int8).short().bitwise_left_shift(7).bitwise_and(-0x4001)
    return halves.view(torch.float16).float() * 256


def blockwise(values: Tensor, scales: Tensor) -> Tensor:
    """Values (R, V) times scales (R, V / B)."""
    return (values.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(2)).flatten(1)


def products(rows: Tensor, x: Tensor) -> Tensor:
    """<row, x> (T, P), at least float32, of rows (T, P, W) and inputs (T, W)."""
    return (precise(rows) * precise(x).unsqueeze(1)).sum(2)
