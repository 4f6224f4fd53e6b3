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
        number, width = self.codes.shape
        tokens, _, cores = scores.shape
        token = torch.arange(tokens, device=addresses.device).unsqueeze(1)
        bags = (token * self.expansion + addresses // number).flatten()
        values = self.read((addresses % number).flatten())
        weighted = values.view(-1, cores, width // cores) * scores.float().flatten(0, 1)[..., None]
        sums = values.new_zeros(tokens * self.expansion, cores, width // cores)
        return sums.index_add(0, bags, weighted).view(tokens, self.expansion * width)

    def bring(self, addresses: Tensor) -> None:
        """Have the rows of virtual addresses fetched, where the table is on disk."""
        rows = addresses % len(self.codes)
        for part in (self.codes, self.scales):
            bring(part, rows if self.hot is None else self.hot.missing(rows))

    def read(self, rows: Tensor) -> Tensor:
        """Values (R, V), float32, of rows (R,)."""
        codes, scales = self.codes, self.scales
        if self.hot is not None and not torch.compiler.is_compiling():
            unique, rows = rows.unique(return_inverse=True)
            codes, scales = self.hot.read(
                unique, lambda missing: (self.codes[missing], self.scales[missing])
            )
        codes = codes.index_select(0, rows).view(self.format).float()
        scales = scales.index_select(0, rows)
        return (codes.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(2)).flatten(1)


class QuantizedPreValues(QuantizedTable):
    """N pre-values, multiplied with inputs as a PreValueTable's."""

    def forward(self, addresses: Tensor, x: Tensor) -> Tensor:
        """(T, P), float32, for virtual addresses (T, P) and inputs (T, W)."""
        rows = self.read((addresses % len(self.codes)).flatten())
        return products(rows.view(*addresses.shape, -1), x)


def products(rows: Tensor, x: Tensor) -> Tensor:
    """<row, x> (T, P), at least float32, of rows (T, P, W) and inputs (T, W)."""
    return (precise(rows) * precise(x).unsqueeze(1)).sum(2)
