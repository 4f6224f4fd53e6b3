"""Reads behind pre-values: every partition and reader gives what the whole tables give."""

from typing import NamedTuple

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.ranks import init_gloo, run_on_ranks
from ultramem_megatron.communication.exchange import count_bytes
from ultramem_megatron.communication.pausing import run
from ultramem_megatron.memory.tables.contract import PreValues
from ultramem_megatron.memory.tables.lockstep import LockstepReader
from ultramem_megatron.memory.tables.partitions import PARTITIONS
from ultramem_megatron.memory.tables.replicated import ReplicatedReader
from ultramem_megatron.memory.tables.shared_tokens import SharedTokensReader
from ultramem_megatron.memory.tables.traffic import Exchange

_VALUES, _WIDTH, _PRE_WIDTH, _CORES, _PICKS = 25, 8, 12, 2, 6
_ACT = "gelu"
_NAMES = ("output", "table", "pre-values", "scores", "inputs")


class _Case(NamedTuple):
    partition: str
    tokens: tuple[int, ...]  # per rank
    groups: int
    dtype: torch.dtype = torch.float64

    def exchange(self) -> Exchange:
        sizes = (len(self.tokens), _PICKS, _WIDTH, self.groups, _CORES, _PRE_WIDTH)
        return Exchange(*sizes, number_bytes=self.dtype.itemsize, ranks_per_node=2)

    def tensors(self):
        """Table, pre-table, addresses, scores, x, output gradient, of all tokens."""
        total, generator = sum(self.tokens), torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        addresses = torch.randint(_VALUES * self.groups, (total, _PICKS), generator=generator)
        tables = draw(_VALUES, _WIDTH), draw(_VALUES, _PRE_WIDTH)
        inputs = draw(total, _PICKS, _CORES), draw(total, _PRE_WIDTH)
        return *tables, addresses, *inputs, draw(total, self.groups, _WIDTH)


def _read(reader, table, pre_table, addresses, scores, x, grad):
    leaves = [t.clone().requires_grad_() for t in (table, pre_table, scores, x)]
    table, pre_table, scores, x = leaves
    steps = reader.read(table, addresses, scores, PreValues(pre_table, x, _ACT))
    out = run(steps)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _whole(case):
    return _read(ReplicatedReader(_VALUES, case.groups), *case.tensors())


def _place(case, table, rank):
    """A rank's part of a table, or of a gradient; that of pre-values has one core."""
    kind, cores = PARTITIONS[case.partition], _CORES if table.shape[1] == _WIDTH else 1
    layout = kind.layout(*table.shape, cores, len(case.tokens), rank, node=2)
    rows, columns = layout.rows(), layout.columns()
    return table[rows.start : rows.stop, columns.start : columns.stop]


def _own(case, rank, tensors):
    """This rank's parts and tokens."""
    first = sum(case.tokens[:rank])
    own = slice(first, first + case.tokens[rank])
    return *(_place(case, table, rank) for table in tensors[:2]), *(t[own] for t in tensors[2:])


def _on_rank(cases):
    import torch.distributed as dist

    rank, size = init_gloo()
    group, found = dist.group.WORLD, []
    for case in cases:
        kind = PARTITIONS[case.partition]
        layout = kind.layout(_VALUES, _WIDTH, _CORES, size, rank, node=2)
        reader = kind.reader(layout, case.groups, group, case.exchange())
        own = _own(case, rank, case.tensors())
        pre = PreValues(own[1], own[4], _ACT)
        with count_bytes() as received:
            assert sum(1 for _ in reader.read(own[0], *own[2:4], pre)) == reader.prevalued_pauses
            there = sum(n for name, n in received.items() if "sizes" not in name)
            results = _read(reader, *own)
        total = sum(n for name, n in received.items() if "sizes" not in name)
        found.append((results, there, total - 2 * there))
    return found


_CASES = {
    2: [
        _Case("dimension", (3, 3), 1),
        _Case("dimension", (3, 3), 4),
        _Case("number", (3, 3), 1),
        _Case("number", (5, 0), 4),
        _Case("dimension", (10, 10), 4, torch.float32),
        _Case("number", (600, 600), 4, torch.float32),
    ],
    4: [_Case("grid", (3,) * 4, 4), _Case("grid", (300,) * 4, 4, torch.float32)],
}


@pytest.fixture(scope="module", params=_CASES)
def read(request):
    """What each rank found for each case of so many ranks."""
    cases = _CASES[request.param]
    by_rank = run_on_ranks(request.param, _on_rank, cases)
    return dict(zip(cases, zip(*by_rank, strict=True), strict=True))


def test_readers_equal_the_whole_tables(read):
    for case, results in read.items():
        terms = sum(case.tokens) * _PICKS + _WIDTH + _PRE_WIDTH
        for i, (name, wanted) in enumerate(zip(_NAMES, _whole(case), strict=True)):
            found = [by_rank[i] for by_rank, _, _ in results]
            if name in ("table", "pre-values"):
                joined = torch.full_like(wanted, torch.nan)
                for rank, part in enumerate(found):
                    _place(case, joined, rank).copy_(part)
            else:
                joined = torch.cat(found)
            assert_close(joined, wanted, rounding(case.dtype, terms), f"{name} of {case}")


def test_bytes_are_those_of_the_formula(read):
    for case, results in read.items():
        if case.dtype != torch.float32:
            continue  # in which the formula counts products, and with too few tokens
        expected = PARTITIONS[case.partition].volume(case.exchange())
        forward, backward = (sum(rank[i] for rank in results) / len(results) for i in (1, 2))
        # Rows are asked for as they are drawn.
        exactness = 1e-12 if case.partition == "dimension" else 0.02
        assert forward == pytest.approx(case.tokens[0] * expected.forward, rel=exactness)
        assert backward == pytest.approx(case.tokens[0] * expected.backward, rel=exactness)


def _alike_and_apart(case):
    """Two readers around a whole table: ranks with the same tokens; one rank with none left."""
    import torch.distributed as dist

    rank, _ = init_gloo()
    group, whole = dist.group.WORLD, ReplicatedReader(_VALUES, case.groups)
    shared = SharedTokensReader(whole, group)
    assert shared.prevalued_pauses == 1
    alike = _read(shared, *case.tensors())
    lockstep = LockstepReader(whole, group)
    table, pre_table, addresses, scores, x, _ = case.tensors()
    if rank == 0:
        pooled = run(lockstep.read(table, addresses, scores, PreValues(pre_table, x, _ACT)))
        assert not lockstep.serve(table, _PICKS, _CORES, PreValues(pre_table, x[:0], _ACT))
        return alike, pooled
    pre = PreValues(pre_table, x[:0], _ACT)
    assert lockstep.serve(table, _PICKS, _CORES, pre)
    assert not lockstep.serve(table, _PICKS, _CORES, pre)
    return alike, None


def test_shares_of_tokens_and_reads_in_lockstep():
    case = _Case("replicated", (5,), 4)
    expected = _whole(case)
    (first, pooled), (second, _) = run_on_ranks(2, _alike_and_apart, case)
    assert_close(pooled, expected[0], rounding(torch.float64, _PICKS))
    for i, name in enumerate(_NAMES):
        # Tables have the gradient of a share of the tokens on each rank, the rest all of it.
        of_table = name in ("table", "pre-values")
        found = [first[i] + second[i]] if of_table else [first[i], second[i]]
        for one in found:
            assert_close(one, expected[i], rounding(torch.float64, 60), name)
