"""Every partition reads what the whole table gives: outputs and gradients, on real ranks."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close, rounding
from tests.ranks import init_gloo, run_on_ranks
from ultramem_megatron.communication.exchange import count_bytes
from ultramem_megatron.communication.pausing import run
from ultramem_megatron.memory.tables.contract import Partition
from ultramem_megatron.memory.tables.layout import TableLayout
from ultramem_megatron.memory.tables.number_wise import (
    NumberWiseReader,
    volume_of_rows,
    volume_of_sums,
)
from ultramem_megatron.memory.tables.partitions import PARTITIONS
from ultramem_megatron.memory.tables.replicated import ReplicatedReader
from ultramem_megatron.memory.tables.traffic import Exchange


@dataclass(frozen=True)
class Case:
    """A table and the tokens of each rank. addresses: "any", "one owner" (all on the last row)."""

    # "dimension", "rows" (number-wise, rows come back), "sums" (owner pools), "grid"
    partition: str
    tokens: tuple[int, ...]  # per rank
    num_values: int = 25
    value_dim: int = 24
    picks: int = 6
    cores: int = 2
    groups: int = 4
    node: int = 2
    addresses: str = "any"
    dtype: torch.dtype = torch.float64

    @property
    def size(self) -> int:
        return len(self.tokens)

    def layout(self, rank: int = 0) -> TableLayout:
        sizes = (self.num_values, self.value_dim, self.cores, self.size)
        return self.kind.layout(*sizes, rank, node=self.node)

    @property
    def kind(self) -> Partition:
        return PARTITIONS["number" if self.partition in ("rows", "sums") else self.partition]

    @property
    def exchange(self) -> Exchange:
        return Exchange(
            self.size,
            self.picks,
            self.value_dim,
            self.groups,
            self.cores,
            number_bytes=self.dtype.itemsize,
            ranks_per_node=self.node,
        )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Table, addresses, scores and output gradient of all tokens, the same in each process."""
        total, generator = sum(self.tokens), torch.Generator().manual_seed(11)
        table = torch.randn(
            self.num_values, self.value_dim, generator=generator, dtype=torch.float64
        )
        virtual = self.num_values * self.groups
        addresses = torch.randint(virtual, (total, self.picks), generator=generator)
        if self.addresses == "one owner":
            addresses = addresses // self.num_values * self.num_values + self.num_values - 1
        scores = torch.randn(
            total, self.picks, self.cores, generator=generator, dtype=torch.float64
        )
        grad = torch.randn(
            total, self.groups, self.value_dim, generator=generator, dtype=torch.float64
        )
        return table.to(self.dtype), addresses, scores.to(self.dtype), grad.to(self.dtype)


def _whole(case):
    table, addresses, scores, grad = case.tensors()
    table.requires_grad_()
    scores.requires_grad_()
    out = run(ReplicatedReader(case.num_values, case.groups).read(table, addresses, scores))
    out.backward(grad)
    return out.detach(), table.grad, scores.grad


def _on_rank(cases):
    """Each case's output, part gradient, score gradient and received bytes, on this rank."""
    import torch.distributed as dist

    init_gloo()
    return [_read(case, dist.group.WORLD, dist.get_rank()) for case in cases]


def _read(case, group, rank):
    layout = case.layout(rank)
    table, addresses, scores, grad = case.tensors()
    rows, columns = layout.rows(), layout.columns()
    part = table[rows.start : rows.stop, columns.start : columns.stop].clone().requires_grad_()
    first = sum(case.tokens[:rank])
    own = slice(first, first + case.tokens[rank])
    own_scores = scores[own].clone().requires_grad_()
    reader = case.kind.reader(layout, case.groups, group, case.exchange)
    if isinstance(reader, NumberWiseReader):
        reader = replace(reader, pool_at_owner=case.partition == "sums")
    with count_bytes() as received:
        out = run(reader.read(part, addresses[own], own_scores))
        forward = dict(received)
        out.backward(grad[own])
    backward = {name: n - forward.get(name, 0) for name, n in received.items()}
    return out.detach(), part.grad, own_scores.grad, forward, backward


def _rounding(case, terms):
    """Of a sum; in half precision it is kept in float32 until it is done."""
    half = case.dtype.itemsize < 4
    return rounding(case.dtype, terms, sums=torch.float32 if half else None)


def _compare(case, results):
    out, table_grad, score_grad = _whole(case)
    picked = case.tensors()[1].flatten() % case.num_values
    meeting = int(picked.bincount(minlength=1).max())  # picks that add up in one row's gradient
    table = torch.full_like(table_grad, torch.nan)
    for rank, result in enumerate(results):
        rows, columns = case.layout(rank).rows(), case.layout(rank).columns()
        table[rows.start : rows.stop, columns.start : columns.stop] = result[1]
    for name, found, expected, terms in (
        ("output", torch.cat([result[0] for result in results]), out, case.picks),
        ("table", table, table_grad, meeting),
        ("scores", torch.cat([result[2] for result in results]), score_grad, case.value_dim),
    ):
        assert_close(found, expected, _rounding(case, terms), f"{case} {name}")


def _check(size, cases):
    by_rank = run_on_ranks(size, _on_rank, cases)
    for case, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        _compare(case, results)


_FIXED = {
    1: [Case("rows", (5,)), Case("sums", (5,)), Case("dimension", (5,))],
    2: [
        *(Case(p, (4, 4)) for p in ("rows", "sums", "dimension")),
        *(Case(p, (3, 3), cores=1) for p in ("rows", "sums", "dimension")),
        *(Case(p, (3, 3), cores=4) for p in ("rows", "sums", "dimension")),
        *(Case(p, (5, 5), groups=9, picks=13) for p in ("rows", "sums", "dimension")),
        *(Case(p, (5, 5), groups=1, picks=1) for p in ("rows", "sums", "dimension")),
        *(Case(p, (4, 4), addresses="one owner") for p in ("rows", "sums", "dimension")),
        *(Case(p, (0, 5)) for p in ("rows", "sums")),
        *(Case(p, (7, 2)) for p in ("rows", "sums")),
        *(Case(p, (0, 0)) for p in ("rows", "sums", "dimension")),
    ],
    3: [Case(p, (4, 4, 4), cores=1) for p in ("rows", "sums", "dimension")],
    4: [
        *(Case(p, (3,) * 4) for p in ("rows", "sums", "dimension")),
        *(Case(p, (3,) * 4, cores=4) for p in ("rows", "sums", "dimension")),
        *(Case(p, (3,) * 4, num_values=4) for p in ("rows", "sums", "dimension")),
        *(Case(p, (1, 0, 6, 2), addresses="one owner") for p in ("rows", "sums")),
        *(Case("grid", (3,) * 4, cores=cores) for cores in (1, 2, 4)),
        *(Case("grid", (3,) * 4, node=node) for node in (1, 4)),  # columns alone, rows alone
        Case("grid", (5,) * 4, groups=9, picks=13),
        Case("grid", (5,) * 4, groups=1, picks=1),
        Case("grid", (4,) * 4, addresses="one owner"),
        Case("grid", (0,) * 4),
    ],
    8: [
        *(Case(p, (2,) * 8) for p in ("rows", "sums", "dimension", "grid")),
        Case("grid", (2,) * 8, node=4, cores=4),
    ],
}


@pytest.mark.parametrize("size", _FIXED)
def test_readers_equal_the_whole_table(size):
    _check(size, _FIXED[size])


def test_half_precision_tables():
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        _check(2, [Case(p, (6, 6), dtype=dtype) for p in ("rows", "sums", "dimension")])
    _check(4, [Case("grid", (6,) * 4, dtype=dtype) for dtype in dtypes])


@st.composite
def _cases(draw, size):
    partition = draw(st.sampled_from(["rows", "sums", "dimension"]))
    cores = draw(st.sampled_from([1, 2, 3, 4]))
    value_dim = cores * draw(st.integers(1, 6)) * size
    straddles = size % cores and cores % size
    if partition == "dimension" and (value_dim % size or straddles):
        cores = 1
    tokens = draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    if partition == "dimension":
        tokens = [tokens[0]] * size
    return Case(
        partition,
        tuple(tokens),
        draw(st.integers(size, 40)),
        value_dim,
        draw(st.integers(1, 9)),
        cores,
        draw(st.sampled_from([1, 4, 9])),
        draw(st.sampled_from(["any", "one owner"])),
    )


@pytest.mark.parametrize("size", [2, 4])
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_readers_equal_the_whole_table_for_random_sizes(size, data):
    # Many cases a start of ranks: starting them is what takes the time.
    _check(size, [data.draw(_cases(size)) for _ in range(15)])


def _received(case):
    """Bytes received forward and backward, of each rank, without the counts of entries."""
    results = [rank[0] for rank in run_on_ranks(case.size, _on_rank, [case])]

    def total(by_purpose):
        return sum(n for name, n in by_purpose.items() if "sizes" not in name)

    return [(total(result[3]), total(result[4])) for result in results]


@pytest.mark.parametrize(("size", "cores"), [(2, 1), (2, 2), (2, 4), (4, 2)])
def test_dimension_wise_moves_the_bytes_of_the_formula(size, cores):
    case = Case("dimension", (10,) * size, cores=cores, dtype=torch.float32)
    expected = case.kind.volume(case.exchange)
    for forward, backward in _received(case):
        assert forward == 10 * expected.forward
        assert backward == 10 * expected.backward


@pytest.mark.parametrize("partition", ["rows", "sums"])
def test_number_wise_moves_the_bytes_of_the_formula(partition):
    case = Case(partition, (400,) * 4, num_values=1024, picks=12, dtype=torch.float32)
    formula = volume_of_rows if partition == "rows" else volume_of_sums
    received = _received(case)
    # What one rank receives as owner depends on the draw; over all ranks it evens out.
    forward, backward = (sum(column) / len(received) for column in zip(*received, strict=True))
    assert forward == pytest.approx(400 * formula(case.exchange).forward, rel=0.01)
    assert backward == pytest.approx(400 * formula(case.exchange).backward, rel=0.01)


@pytest.mark.parametrize(("picks", "node"), [(12, 2), (2, 2), (12, 4)])
def test_grid_moves_the_bytes_of_the_formula(picks, node):
    """12 picks: sums come; 2: rows. Both at once in the node of 4, of which there is one."""
    case = Case("grid", (400,) * 4, 1024, picks=picks, node=node, dtype=torch.float32)
    expected, received = case.kind.volume(case.exchange), _received(case)
    forward, backward = (sum(column) / len(received) for column in zip(*received, strict=True))
    assert forward == pytest.approx(400 * expected.forward, rel=0.01)
    assert backward == pytest.approx(400 * expected.backward, rel=0.01)


def _die_in_the_middle():
    import os

    import torch.distributed as dist

    init_gloo()
    case = Case("dimension", (4, 4))
    if dist.get_rank() == 1:
        os._exit(17)
    _read(case, dist.group.WORLD, 0)


def test_a_dead_rank_ends_the_others_with_the_exchange_and_the_group_named():
    from tests.ranks import RanksFailed

    with pytest.raises(
        RanksFailed, match=r"Memory-table exchange of \w+ failed on rank 0 in the group .*\[0, 1\]"
    ):
        run_on_ranks(2, _die_in_the_middle)


def _agree(differ):
    import torch.distributed as dist

    from ultramem_megatron.megatron.startup import check_agreement

    init_gloo()
    check_agreement(("plan", dist.get_rank() if differ else 0))


def test_ranks_that_disagree_are_told_so():
    from tests.ranks import RanksFailed

    run_on_ranks(2, _agree, False)
    with pytest.raises(RanksFailed, match="Ranks disagree on the memory layers: rank 0 has"):
        run_on_ranks(2, _agree, True)
