"""A value table in 8 bits, multiplied out where it is read: it is only read, never trained.

N values, V value dim, T tokens, P picks of a token, C cores, E expansion, B values with a scale in
common.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .retrieval_ultramem import Float32Buffers

FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What a code is, by `value_quantization["format"]`."""


class QuantizedTable(Float32Buffers):
    """N values, pooled by their scores as a ValueTable's (eq. 15 and 17), from codes and scales."""

    float32: ClassVar = ("scales",)
    codes: Tensor
    scales: Tensor

    def __init__(self, memory: dict[str, Any], quantization: dict[str, Any]) -> None:
        super().__init__()
        self.expansion = memory["value_expansion"]
        self.format = FORMATS[quantization["format"]]
        number, width = memory["num_keys"] ** 2, memory["value_dim"]
        blocks = width // quantization["block"]
        # Bytes, whatever they stand for: numbers would be converted with the model's.
        self.register_buffer("codes", torch.zeros(number, width, dtype=torch.uint8))
        self.register_buffer("scales", torch.ones(number, blocks, dtype=torch.float32))

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

    def read(self, rows: Tensor) -> Tensor:
        """Values (R, V), float32, of rows (R,)."""
        codes = self.codes.index_select(0, rows).view(self.format).float()
        scales = self.scales.index_select(0, rows)
        return (codes.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(2)).flatten(1)
