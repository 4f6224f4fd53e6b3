"""Dimension-wise partition (paper section 4, figure 8): every rank holds all rows, some columns.

Addresses of all ranks' tokens are gathered, scores go only to the ranks that hold a core's columns;
each rank pools all tokens on its columns, and the pooled slices go home. Perfectly balanced, and no
size depends on the indices, so nothing waits for the host. All ranks bring equally many tokens.

T tokens of this rank, G ranks, P picks per token, C cores, c cores of one rank, E expansion groups,
V value dim, v columns of one rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultramem_megatron.communication.exchange import Transfer, all_to_all, gather_tokens
from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.lookup_prevalued.activations import activation
from ultramem_megatron.memory.tables.contract import ColumnsReader, Partition, PreValues
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.replicated import ReplicatedReader
from ultramem_megatron.memory.tables.traffic import PRODUCT_BYTES, Exchange, Volume, address_bytes


@dataclass(frozen=True)
class DimensionWiseReader:
    """Reads a table cut by columns over `group`; `columns` reads this rank's columns of it."""

    layout: TableLayout
    num_groups: int
    group: Any
    columns: ColumnsReader

    @property
    def pauses(self) -> int:
        """See TableReader.pauses."""
        return self.columns.pauses + 2

    @property
    def prevalued_pauses(self) -> int:
        """See TableReader.prevalued_pauses."""
        return self.columns.dot_pauses + 2 + self.pauses

    def read(
        self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None = None
    ) -> Pausing:
        """See TableReader.read. Pre-values come first: no rank has all of a product."""
        if pre:
            dots = yield from self._dot(pre.part, addresses, pre.x)
            scores = scores * activation(pre.act)(dots).unsqueeze(2)
        tokens = len(addresses)
        gathering = gather_tokens(self._narrow(addresses), self.group, "addresses")
        sending = self._send_scores(scores, part)
        yield
        addresses = gathering.wait().long()
        pooled = yield from self.columns.read(part, addresses, sending.wait())
        returning = all_to_all(pooled, self.group, "pooled values")
        yield
        home = returning.wait()  # (G*T, E, v), by owner of columns
        by_rank = home.view(self.layout.column_parts, tokens, self.num_groups, part.shape[1])
        by_token = by_rank.permute(1, 2, 0, 3)
        return by_token.reshape(tokens, self.num_groups, self.layout.value_dim)

    def _dot(self, part: Tensor, addresses: Tensor, x: Tensor) -> Pausing:
        """Products (T, P): partial ones of all tokens go home and are added up there."""
        size, tokens = self.layout.column_parts, len(addresses)
        gathering = gather_tokens(self._narrow(addresses), self.group, "addresses")
        slices = x.to(part.dtype).view(tokens, size, part.shape[1]).transpose(0, 1)
        sending = all_to_all(slices.flatten(0, 1), self.group, "pre-value inputs")
        yield
        addresses = gathering.wait().long()
        partial = yield from self.columns.dot(part, addresses, sending.wait())  # (G*T, P)
        returning = all_to_all(partial, self.group, "pre-value products")
        yield
        return returning.wait().view(size, tokens, -1).sum(0)

    def _narrow(self, addresses: Tensor) -> Tensor:
        bytes_each = address_bytes(self.num_groups * self.layout.num_values)
        return addresses.to(torch.int32) if bytes_each == 4 else addresses

    def _send_scores(self, scores: Tensor, part: Tensor) -> Transfer:
        """Scores (T, P, C) to (G*T, P, c): of all tokens, for the cores of this rank's columns."""
        layout = self.layout
        held = len(layout.cores_of(0))
        # Made on the device: a list from the host would have to be waited for.
        ranks = torch.arange(layout.column_parts, device=scores.device)
        first = ranks * layout.cores // layout.column_parts
        cores = first.unsqueeze(1) + torch.arange(held, device=scores.device)  # (G, c)
        # Sent in the table's dtype, which the lookup computes in anyway.
        by_rank = scores.to(part.dtype)[:, :, cores].permute(2, 0, 1, 3)  # (G, T, P, c)
        return all_to_all(by_rank.flatten(0, 1), self.group, "scores")


def volume(x: Exchange) -> Volume:
    """Addresses and scores of all tokens come in, pooled slices go home."""
    others = x.size - 1
    cores = max(1, x.cores // x.size)  # cores whose columns one rank holds
    addresses = x.address_bytes * x.picks * others
    scores = x.number_bytes * cores * x.picks * others
    pooled = x.number_bytes * x.expansion * x.value_dim * others / x.size
    dots = _volume_of_dots(x) if x.pre_dim else Volume(0.0, 0.0)
    return Volume(addresses + scores + pooled + dots.forward, scores + pooled + dots.backward)


def _volume_of_dots(x: Exchange) -> Volume:
    """Of pre-values: addresses once more, slices of the inputs, partial products."""
    others = x.size - 1
    inputs = x.number_bytes * x.pre_dim * others / x.size
    products = PRODUCT_BYTES * x.picks * others
    return Volume(x.address_bytes * x.picks * others + inputs + products, inputs + products)


def kept(x: Exchange) -> float:
    """Rows, groups and scores of the other ranks' picks."""
    cores = max(1, x.cores // x.size)
    return x.picks * (x.size - 1) * (2 * 8 + cores * x.number_bytes)


def _check(layout: TableLayout) -> None:
    size = layout.size
    if layout.value_dim % size:
        raise UltraMemError(
            f"--ultramem-partition dimension cuts the value dimension, but --ultramem-value-dim "
            f"{layout.value_dim} is not divisible by --ultramem-parallel-size {size}. Use a "
            f"multiple of {size}, another size, or --ultramem-partition number."
        )
    if size % layout.cores and layout.cores % size:
        raise UltraMemError(
            f"--ultramem-partition dimension with --ultramem-parallel-size {size} would make the "
            f"slices of --ultramem-cores {layout.cores} straddle ranks: one must divide the other. "
            f"Use another size, other cores, or --ultramem-partition number."
        )


def _reader(
    layout: TableLayout, num_groups: int, group: Any, _exchange: Exchange
) -> DimensionWiseReader:
    columns = ReplicatedReader(layout.num_values, num_groups)
    return DimensionWiseReader(layout, num_groups, group, columns)


PARTITION = Partition(
    name="dimension",
    parts=lambda size, _node: (1, size),
    check=_check,
    reader=_reader,
    volume=volume,
    kept=kept,
)
