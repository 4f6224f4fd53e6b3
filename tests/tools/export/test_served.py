"""vLLM's ranks hold some rows of a table each, and together read what one with all of them reads.

vLLM itself: tests/launch/test_served_over_ranks.py.
"""

from types import SimpleNamespace

import pytest
import torch

from ultramem_megatron.tools.export.hf.quantized_ultramem import QuantizedPreValues, QuantizedTable
from ultramem_megatron.tools.export.hf.served_ultramem import ServedPreValues, ServedValues
from ultramem_megatron.tools.export.hf.values_ultramem import PreValueTable, ValueTable

_ROWS, _WIDTH, _EXPANSION, _CORES = 11, 8, 4, 2
_SIZES = (_ROWS, _WIDTH, _EXPANSION)
_INT8 = {"format": "int8", "block": 4}


def _filled(table):
    generator = torch.Generator().manual_seed(1)
    for tensor in table.state_dict(keep_vars=True).values():
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 255, generator=generator)
        else:
            torch.nn.init.uniform_(tensor, 0.5, 1, generator=generator)
    return table


def _served(kind, make, weights, ranks, table_memory="host"):
    """Of each rank its part, filled as vLLM's loader does."""
    for rank in range(ranks):
        engine = SimpleNamespace(
            tensor_model_parallel_all_reduce=lambda sums: sums,
            get_tensor_model_parallel_rank=lambda rank=rank: rank,
            get_tensor_model_parallel_world_size=lambda: ranks,
        )
        part = kind(make(), engine, table_memory)
        names = set(part.load_weights(weights.items()))
        assert names == {f"table.{name}" for name in weights}
        yield part


def _asked():
    generator = torch.Generator().manual_seed(2)
    addresses = torch.randint(_ROWS * _EXPANSION, (5, 6), generator=generator)
    return addresses, torch.randn(5, 6, _CORES, generator=generator)


@pytest.mark.parametrize(
    "make",
    [lambda: ValueTable(*_SIZES), lambda: QuantizedTable(*_SIZES, _INT8)],
    ids=["float", "int8"],
)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sums_of_all_ranks_are_those_of_a_whole_table(make, ranks):
    whole = _filled(make())
    addresses, scores = _asked()
    parts = list(_served(ServedValues, make, whole.state_dict(), ranks))
    assert sum(len(part.rows) for part in parts) == _ROWS
    held = [sum(t.nbytes for t in part.state_dict().values()) for part in parts]
    assert sum(held) == sum(t.nbytes for t in whole.state_dict().values())
    assert max(held) - min(held) <= sum(held) // _ROWS
    with torch.no_grad():
        found = sum(part(addresses, scores) for part in parts)
        torch.testing.assert_close(found, whole(addresses, scores))


@pytest.mark.parametrize(
    "make",
    [lambda: PreValueTable(*_SIZES), lambda: QuantizedPreValues(*_SIZES, _INT8)],
    ids=["float", "int8"],
)
def test_products_are_right_where_the_pre_value_is(make):
    whole = _filled(make())
    addresses, _ = _asked()
    x = torch.randn(5, _WIDTH, generator=torch.Generator().manual_seed(3))
    for part in _served(ServedPreValues, make, whole.state_dict(), 2):
        _, here = part.local(addresses)
        assert here.any()
        assert not here.all()
        assert torch.equal(part(addresses, x)[here], whole(addresses, x)[here])
