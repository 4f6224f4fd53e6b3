"""Random numbers of a layer, which depend on (seed, layer, name) and nothing else.

Every tensor is drawn from a generator of its own, a table block by block, so that the
result depends neither on what else was drawn nor on how a table is cut over ranks.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_PER_BLOCK, COLUMNS_PER_BLOCK = 4096, 64


@dataclass(frozen=True)
class Draw:
    """Draws for one layer."""

    seed: int
    layer_number: int

    def generator(self, name: str, device: torch.device) -> torch.Generator:
        """The generator of a name."""
        return generator_for(device, self.seed, self.layer_number, name)

    def normal_(self, tensor: Tensor, std: float, name: str) -> None:
        """Fill from a normal distribution around 0, drawn in float32."""
        generator = self.generator(name, tensor.device)
        drawn = torch.randn(
            tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32
        )
        tensor.copy_(drawn * std)

    def uniform_(self, tensor: Tensor, name: str, *, low: float = 0.0, high: float = 1.0) -> None:
        """Fill evenly between two numbers, drawn in float32."""
        generator = self.generator(name, tensor.device)
        drawn = torch.rand(
            tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32
        )
        tensor.copy_(drawn * (high - low) + low)

    def weights_(self, tensor: Tensor, std: float, name: str, *, uniform: bool) -> None:
        """Fill around 0 with this standard deviation, from a uniform or a normal distribution."""
        if uniform:
            reach = math.sqrt(3) * std
            self.uniform_(tensor, name, low=-reach, high=reach)
        else:
            self.normal_(tensor, std, name)

    def table_(
        self, part: Tensor, rows: range, columns: range, width: int, std: float, name: str
    ) -> None:
        """As normal_, for these rows and columns of a table of `width` columns."""
        normal_part(part, rows, columns, width, std, self.seed, self.layer_number, name)


def generator_for(device: torch.device, *key: object) -> torch.Generator:
    """A generator on `device` whose seed is a hash of the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def normal_part(
    part: Tensor, rows: range, columns: range, width: int, std: float, *key: object
) -> None:
    """Fill `part` with these rows and columns of a table that is drawn block by block.

    part: (len(rows), len(columns)). width: columns of the whole table. Blocks that hold nothing of
    the part are not drawn, and every part comes out as the whole table would have it.
    """
    for down, in_down in _blocks(rows, ROWS_PER_BLOCK):
        for across, in_across in _blocks(columns, COLUMNS_PER_BLOCK):
            first = across * COLUMNS_PER_BLOCK
            drawn = torch.randn(
                ROWS_PER_BLOCK,
                min(COLUMNS_PER_BLOCK, width - first),
                device=part.device,
                dtype=torch.float32,
                generator=generator_for(part.device, *key, down, *([across] if across else [])),
            )
            piece = drawn[_slice(in_down, down * ROWS_PER_BLOCK), _slice(in_across, first)]
            part[_slice(in_down, rows.start), _slice(in_across, columns.start)] = piece * std


def _blocks(wanted: range, size: int) -> Iterator[tuple[int, range]]:
    """Numbers of the blocks that hold some of `wanted`, and which."""
    for block in range(wanted.start // size, -(-wanted.stop // size)):
        yield block, range(max(block * size, wanted.start), min((block + 1) * size, wanted.stop))


def _slice(some: range, start: int) -> slice:
    """Where `some` is in what begins at `start`."""
    return slice(some.start - start, some.stop - start)
