"""Number-wise partition (paper section 4, figure 8): every rank holds some rows, all columns.

Indices go to the owners of their rows. Back come either the rows, weighted and summed at home, or
what the owner has already summed: one vector per (token, expansion group) that has a pick there.
Which of the two moves fewer bytes is decided by sizes alone, once.

How many indices go where depends on them, and the host must know it: it waits for the sizes, once
for each read. What comes before that is enqueued without waiting.

T tokens of this rank, G ranks, P picks per token, C cores, E expansion groups, V value dim; S picks
that this rank serves, B sums that it sends.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultramem_megatron.communication.exchange import Transfer, all_to_all
from ultramem_megatron.communication.pausing import Pausing
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.kernels.lookup_dot import lookup_dot
from ultramem_megatron.kernels.lookup_prevalued import lookup_prevalued
from ultramem_megatron.kernels.lookup_reduce import lookup_reduce
from ultramem_megatron.kernels.precision import at_least_float32
from ultramem_megatron.kernels.shapes import kept_for_backward
from ultramem_megatron.memory.retrieval.addresses import split_address
from ultramem_megatron.memory.tables.contract import Partition, PreValues
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.traffic import (
    PRODUCT_BYTES,
    ROW_BYTES,
    Exchange,
    Volume,
    distinct,
)


class _Picks(NamedTuple):
    """This rank's picks, ordered by the rank that owns the row, then by bucket."""

    order: Tensor  # (T*P,) position of each among the unordered picks
    rows: Tensor  # (T*P,) row within the owner's part
    buckets: Tensor  # (T*P,) token * E + group: where the weighted value belongs
    owners: Tensor  # (T*P,)


_Sizes = tuple[list[int], list[int]]  # entries sent to, and received from, each rank
_Exchanged = Generator[None, None, tuple[Tensor, Tensor]]  # values that came, and their buckets


@dataclass(frozen=True)
class NumberWiseReader:
    """Reads a table cut by rows over `group`."""

    layout: TableLayout
    num_groups: int
    group: Any
    pool_at_owner: bool
    pauses = 3
    prevalued_pauses = 3
    dot_pauses = 3

    def read(
        self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None = None
    ) -> Pausing:
        """See TableReader.read."""
        if part.is_meta:
            return (yield from self._read_shapes(part, addresses, scores, pre))
        picks = self._by_owner(addresses)
        weights = scores.flatten(0, 1)[picks.order].to(part.dtype)  # (T*P, C)
        if pre:
            exchange = self._read_prevalued(part, picks, weights, pre)
        elif self.pool_at_owner:
            exchange = self._read_sums(part, picks, weights)
        else:
            exchange = self._read_rows(part, picks, weights)
        values, buckets = yield from exchange
        pooled = _sums(values, buckets, len(addresses) * self.num_groups)
        return pooled.to(part.dtype).view(len(addresses), self.num_groups, part.shape[1])

    def dot(self, part: Tensor, addresses: Tensor, x: Tensor) -> Pausing:
        """See ColumnsReader.dot: x goes once to each owner of a token's rows."""
        if part.is_meta:
            for _ in range(self.dot_pauses):
                yield
            return lookup_dot(part, addresses % self.layout.num_values, x)
        picks = self._by_owner(addresses)
        tokens = picks.buckets // self.num_groups
        number, new_vector = _numbered(picks.owners, tokens)
        (send, receive), (vectors_send, vectors_receive) = yield from self._exchange_sizes(
            picks.owners, torch.ones_like(picks.owners), new_vector
        )
        of_token = number.new_empty(sum(vectors_send)).scatter_(0, number, tokens)
        asking = self._send_integers(picks.rows, "addresses", send, receive)
        local = number - _first(vectors_send, number)[picks.owners]
        numbering = self._send_integers(local, "input numbers", send, receive)
        vectors = x.to(part.dtype)[of_token]
        lending = all_to_all(vectors, self.group, "pre-value inputs", vectors_send, vectors_receive)
        yield
        served, source = asking.wait().long(), self._sources(receive, number.device)
        first = _first(vectors_receive, number)
        inputs = lending.wait()[numbering.wait().long() + first[source]]  # (S, V)
        products = lookup_dot(part, served.unsqueeze(1), inputs)
        returning = all_to_all(products, self.group, "pre-value products", receive, send)
        yield
        return returning.wait().squeeze(1)[picks.order.argsort()].view(addresses.shape)

    def _sources(self, receive: Sequence[int], device: torch.device) -> Tensor:
        """The rank that each entry came from, when so many came from each."""
        ranks = torch.arange(self.layout.size, device=device)
        return torch.repeat_interleave(ranks, torch.tensor(receive, device=device))

    def _read_shapes(
        self, part: Tensor, addresses: Tensor, scores: Tensor, pre: PreValues | None
    ) -> Pausing:
        """Without numbers nobody knows how much goes where: as if all picked rows were at home."""
        for _ in range(self.pauses):
            yield
        rows = part.new_empty(addresses.numel(), part.shape[1]).requires_grad_()
        picked = kept_for_backward((1,), part.dtype, rows)
        own, groups = split_address(addresses, self.layout.num_values)
        if pre is None:
            return lookup_reduce(part, own, groups, scores, self.num_groups) + picked
        given = (part, pre.part, own, groups, scores, pre.x)
        return lookup_prevalued(*given, self.num_groups, pre.act) + picked

    def _by_owner(self, addresses: Tensor) -> _Picks:
        layout = self.layout
        rows, groups = split_address(addresses, layout.num_values)
        # Made on the device: a list from the host would have to be waited for.
        ranks = torch.arange(layout.size, device=rows.device)
        first_rows = ranks * layout.num_values // layout.size
        owners = torch.bucketize(rows.flatten(), first_rows, right=True) - 1
        tokens = torch.arange(len(addresses), device=rows.device).unsqueeze(1)
        buckets = (tokens * self.num_groups + groups).flatten()
        order = (owners * (len(addresses) * self.num_groups) + buckets).argsort(stable=True)
        owners, buckets = owners[order], buckets[order]
        return _Picks(order, rows.flatten()[order] - first_rows[owners], buckets, owners)

    def _read_rows(self, part: Tensor, picks: _Picks, weights: Tensor) -> _Exchanged:
        """Rows come here; weighting is done at home."""
        each = torch.ones_like(picks.owners)
        [(send, receive)] = yield from self._exchange_sizes(picks.owners, each)
        asking = self._send_integers(picks.rows, "addresses", send, receive)
        yield
        served = asking.wait().long()
        rows = _read(part, served, part.new_ones(len(served), 1))  # (S, V)
        returning = all_to_all(rows, self.group, "values", receive, send)
        yield
        return _weighted(returning.wait(), weights), picks.buckets  # (T*P, V)

    def _read_sums(self, part: Tensor, picks: _Picks, weights: Tensor) -> _Exchanged:
        """Owners weight and sum; one vector per owner and bucket comes here."""
        # Every rank numbers its (owner, bucket) pairs in order, so the owner need not send them.
        number, new_pair = _numbered(picks.owners, picks.buckets)
        (send, receive), (sums_receive, sums_send) = yield from self._exchange_sizes(
            picks.owners, torch.ones_like(picks.owners), new_pair
        )
        local_number = number - _first(sums_receive, number)[picks.owners]
        buckets = number.new_empty(sum(sums_receive)).scatter_(0, number, picks.buckets)

        asking = self._send_integers(picks.rows, "addresses", send, receive)
        numbering = self._send_integers(local_number, "sum numbers", send, receive)
        weighing = all_to_all(weights, self.group, "scores", send, receive)
        yield
        served, target = asking.wait().long(), numbering.wait().long()  # (S,)
        source = self._sources(receive, number.device)
        values = _read(part, served, weighing.wait())
        target += _first(sums_send, number)[source]
        sums = _sums(values, target, sum(sums_send)).to(part.dtype)
        returning = all_to_all(sums, self.group, "pooled values", sums_send, sums_receive)
        yield
        return returning.wait(), buckets

    def _read_prevalued(
        self, part: Tensor, picks: _Picks, weights: Tensor, pre: PreValues
    ) -> _Exchanged:
        """As _read_sums. A token's x goes once to each owner of its rows."""
        tokens = picks.buckets // self.num_groups
        sums, new_sum = _numbered(picks.owners, picks.buckets)
        vectors, new_vector = _numbered(picks.owners, tokens)
        (
            (send, receive),
            (sums_receive, sums_send),
            (vectors_send, vectors_receive),
        ) = yield from self._exchange_sizes(
            picks.owners, torch.ones_like(picks.owners), new_sum, new_vector
        )
        buckets = sums.new_empty(sum(sums_receive)).scatter_(0, sums, picks.buckets)
        of_token = vectors.new_empty(sum(vectors_send)).scatter_(0, vectors, tokens)

        asking = self._send_integers(picks.rows, "addresses", send, receive)
        own = sums - _first(sums_receive, sums)[picks.owners]
        numbering = self._send_integers(own, "sum numbers", send, receive)
        own = vectors - _first(vectors_send, vectors)[picks.owners]
        naming = self._send_integers(own, "input numbers", send, receive)
        weighing = all_to_all(weights, self.group, "scores", send, receive)
        lent = pre.x.to(part.dtype)[of_token]
        lending = all_to_all(lent, self.group, "pre-value inputs", vectors_send, vectors_receive)
        yield
        served, source = asking.wait().long(), self._sources(receive, sums.device)
        target = numbering.wait().long() + _first(sums_send, sums)[source]  # (S,)
        inputs = lending.wait()[naming.wait().long() + _first(vectors_receive, sums)[source]]
        rows, scores = served.unsqueeze(1), weighing.wait().unsqueeze(1)
        given = (part, pre.part, rows, torch.zeros_like(rows), scores, inputs)
        values = lookup_prevalued(*given, 1, pre.act).squeeze(1)  # (S, V)
        pooled = _sums(values, target, sum(sums_send)).to(part.dtype)
        returning = all_to_all(pooled, self.group, "pooled values", sums_send, sums_receive)
        yield
        return returning.wait(), buckets

    def _exchange_sizes(
        self, owners: Tensor, *counted: Tensor
    ) -> Generator[None, None, list[_Sizes]]:
        """For each of `counted`, 0 or 1 per pick: the sums that go to, and come from, each rank."""
        none = owners.new_zeros(self.layout.size)
        counts = torch.stack([none.scatter_add(0, owners, kind) for kind in counted], dim=1)
        counting = all_to_all(counts, self.group, "sizes")
        yield
        both = torch.stack([counts, counting.wait()]).permute(2, 0, 1)
        return [(send, receive) for send, receive in both.tolist()]  # the host waits here

    def _send_integers(
        self, x: Tensor, purpose: str, send: Sequence[int], receive: Sequence[int]
    ) -> Transfer:
        return all_to_all(x.to(torch.int32), self.group, purpose, send, receive)


def _numbered(owners: Tensor, of_owner: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct pairs, numbered in their order, and 1 where a new one begins; both ordered."""
    new_pair = torch.ones_like(owners)
    new_pair[1:] = (owners.diff() != 0) | (of_owner.diff() != 0)
    return new_pair.cumsum(0) - 1, new_pair


def _first(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Of parts of these sizes, one after the other, the first entry of each, and the end."""
    return torch.tensor([0, *sizes], device=like.device).cumsum(0)


def _read(part: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Rows (S,) of the table times the weight (S, C) of each core on its slice, (S, V)."""
    rows = rows.unsqueeze(1)
    return lookup_reduce(part, rows, torch.zeros_like(rows), weights.unsqueeze(1), 1).squeeze(1)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Values (S, V) times the weight (S, C) of each core on its slice, at least float32."""
    cores = weights.shape[1]
    by_core = at_least_float32(values).unflatten(1, (cores, values.shape[1] // cores))
    return (by_core * weights.unsqueeze(-1)).flatten(1)


def _sums(values: Tensor, buckets: Tensor, count: int) -> Tensor:
    """Sum of the values (S, V) of each bucket 0..count-1, at least float32."""
    values = at_least_float32(values)
    return values.new_zeros(count, values.shape[1]).index_add(0, buckets, values)


def volume_of_rows(x: Exchange) -> Volume:
    """Addresses go to the owners, rows come back."""
    away = (x.size - 1) / x.size
    addresses = ROW_BYTES * x.picks * away
    rows = x.number_bytes * x.picks * x.value_dim * away
    return Volume(addresses + rows, rows)


def volume_of_sums(x: Exchange) -> Volume:
    """Addresses and scores go to the owners, one sum per owner and group comes back."""
    away = (x.size - 1) / x.size
    addresses = 2 * ROW_BYTES * x.picks * away  # the row, and the number of its sum
    scores = x.number_bytes * x.cores * x.picks * away
    sums = x.number_bytes * x.value_dim * distinct(x.size * x.expansion, x.picks) * away
    return Volume(addresses + scores + sums, scores + sums)


def volume(x: Exchange) -> Volume:
    """The cheaper of the two ways to bring values home; behind pre-values there is one."""
    if x.pre_dim:
        return _volume_of_prevalued(x)
    return _volume_of_values(x)


def volume_of_columns(x: Exchange) -> Volume:
    """Where rows are cut by columns too, so that products come home before values are read."""
    values = _volume_of_values(x)
    dots = _volume_of_dots(x) if x.pre_dim else Volume(0.0, 0.0)
    return Volume(values.forward + dots.forward, values.backward + dots.backward)


def _volume_of_values(x: Exchange) -> Volume:
    return min(volume_of_rows(x), volume_of_sums(x), key=lambda way: way.total)


def _volume_of_dots(x: Exchange) -> Volume:
    """Of pre-values: indices, an input for each owner that a token asks, products."""
    away = (x.size - 1) / x.size
    indices = 2 * ROW_BYTES * x.picks * away
    inputs = x.number_bytes * x.pre_dim * distinct(x.size, x.picks) * away
    products = PRODUCT_BYTES * x.picks * away
    return Volume(indices + inputs + products, inputs + products)


def _volume_of_prevalued(x: Exchange) -> Volume:
    """As of sums, with an input for each owner that a token asks, and the number of each pick's."""
    away, sums = (x.size - 1) / x.size, volume_of_sums(x)
    numbers = ROW_BYTES * x.picks * away
    inputs = x.number_bytes * x.pre_dim * distinct(x.size, x.picks) * away
    return Volume(sums.forward + numbers + inputs, sums.backward + inputs)


def kept(x: Exchange) -> float:
    """As many rows as were picked: those that came, or those that this rank summed for others."""
    return x.picks * x.value_dim * x.number_bytes


def pools_at_owner(x: Exchange) -> bool:
    """Whether sums move fewer bytes than rows."""
    return volume_of_sums(x).total < volume_of_rows(x).total


def _check(layout: TableLayout) -> None:
    if layout.num_values < layout.size:
        raise UltraMemError(
            f"--ultramem-parallel-size is {layout.size}, more than the {layout.num_values} values "
            f"of a table (--ultramem-num-keys squared). Use a smaller size or more keys."
        )


def _reader(
    layout: TableLayout, num_groups: int, group: Any, exchange: Exchange
) -> NumberWiseReader:
    return NumberWiseReader(layout, num_groups, group, pools_at_owner(exchange))


PARTITION = Partition(
    name="number",
    parts=lambda size, _node: (size, 1),
    check=_check,
    reader=_reader,
    volume=volume,
    kept=kept,
    waits_for_host=True,
)
