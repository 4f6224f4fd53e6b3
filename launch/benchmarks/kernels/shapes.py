"""Sizes of what is timed, the sweeps over them, and the bytes and FLOPs they stand for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.spans import Span


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One memory layer on one batch of tokens."""

    tokens: int = 512
    hidden: int = 512
    num_keys: int = 256
    """n: the table has n*n rows."""
    topk: int = 32
    value_dim: int = 256
    expansion: int = 4
    heads: int = 2
    cores: int = 2
    dtype: torch.dtype = torch.float32

    @property
    def values(self) -> int:
        """N: rows of the table."""
        return self.num_keys**2

    @property
    def picks(self) -> int:
        """Rows read per token, m*H."""
        return self.config().picks

    @property
    def table_bytes(self) -> int:
        """Of the table itself."""
        return self.values * self.value_dim * self.dtype.itemsize

    def config(self) -> UltraMemConfig:
        """The layer; key width is half the hidden size, all else the defaults."""
        return UltraMemConfig(
            spans=(Span(1, 2),),
            num_keys=self.num_keys,
            key_dim=self.hidden // 2,
            value_dim=self.value_dim,
            topk=self.topk,
            heads=self.heads,
            cores=self.cores,
            value_expansion=self.expansion,
            share_query=self.heads == 1 or self.heads % 2 == 0,
        )

    def columns(self) -> dict[str, str | int]:
        """For a row of the CSV."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**named, "values": self.values, "dtype": str(self.dtype).removeprefix("torch.")}

    def lookup_bytes(self, backward: bool) -> int:
        """Least traffic of a lookup: rows and sums; backward rows again and float32 gradients."""
        rows = self.tokens * self.picks * self.value_dim
        sums = self.tokens * self.expansion * self.value_dim
        forward = (rows + sums) * self.dtype.itemsize
        if not backward:
            return forward
        distinct = min(self.values, self.tokens * self.picks) * self.value_dim
        return 2 * forward + 2 * distinct * 4

    def lookup_flops(self, backward: bool) -> int:
        """A product and a sum per number read; three times that with both gradients."""
        return (3 if backward else 1) * 2 * self.tokens * self.picks * self.value_dim

    def layer_macs(self) -> int:
        """Multiply-adds of a layer per token: products, grids, lookup."""
        grids = self.heads * self.cores * self.topk**2 * self.config().tucker_rank
        return sum(self.product_macs().values()) + grids + self.picks * self.value_dim

    def product_macs(self) -> dict[str, int]:
        """Multiply-adds per token of a layer's matrix products, by name."""
        config = self.config()
        return {
            "query": self.hidden * 2 * config.key_dim * config.num_queries,
            "keys": 2 * self.heads * config.keys_per_side * config.key_dim,
            "projection": self.expansion * self.value_dim * self.hidden,
        }


DEFAULT = Shape()
_KEYS = (128, 256, 512, 1024, 2048, 4096)  # 16k to 16.8M values
_SWEEPS: dict[str, list[dict[str, int]]] = {
    "tokens": [{"tokens": n} for n in (1, 64, 2048)],
    "topk": [{"topk": n} for n in (16, 64)],
    "value_dim": [{"value_dim": n} for n in (128, 512)],
    "expansion": [{"expansion": n} for n in (1, 16)],
}


SWEEPS = ("values", *_SWEEPS)
"""What is swept over, by name."""


def sweeps(
    quick: bool, device: torch.device, names: Sequence[str] = SWEEPS
) -> Iterator[tuple[str, Shape]]:
    """(name, shape): over values, then around the default over each other size that is named.

    On a GPU shapes are those of a model of width 2048 in bfloat16.
    """
    base = DEFAULT
    if device.type == "cuda":
        base = Shape(
            tokens=8192, hidden=2048, value_dim=1024, topk=42, num_keys=1024, dtype=torch.bfloat16
        )
    for keys in ((32, 64) if quick else _KEYS) if "values" in names else ():
        yield "values", replace(base, num_keys=keys, tokens=32 if quick else base.tokens)
    if quick:
        return
    for name, changes in _SWEEPS.items():
        if name not in names:
            continue
        yield name, base
        for change in changes:
            yield name, replace(base, **change)  # type: ignore[arg-type]  # any of its fields
