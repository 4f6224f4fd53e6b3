"""The memory submodule on Megatron's groups, tensor, context and data parallel, without a model.

It reads token by token, so its tables and groups can be tested with tokens dealt out by hand.
"""

from typing import NamedTuple

import pytest
import torch

from tests.closeness import assert_close, rounding
from tests.layers import sum_lengths
from tests.ranks import init_gloo, run_on_ranks
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.spans import Span

_HIDDEN = 16


def _config(**changes):
    sizes = {"num_keys": 5, "key_dim": 8, "value_dim": 16, "topk": 4, "init": "official"}
    return UltraMemConfig(spans=(Span(1, 1),), **{**sizes, **changes})


class _Layout(NamedTuple):
    """Ranks, how they are grouped, and tokens that each holds."""

    world: int
    tp: int
    cp: int
    size: int  # ranks that share a table
    partition: str
    sequence_parallel: bool
    tokens: int


_LAYOUTS = [
    _Layout(4, 2, 2, 4, "number", False, 5),  # odd: shares of 3 and 2 tokens
    _Layout(4, 2, 2, 4, "dimension", False, 5),
    _Layout(4, 1, 2, 4, "dimension", False, 3),
    _Layout(4, 1, 4, 2, "number", False, 3),
    _Layout(4, 2, 1, 2, "dimension", True, 3),
    _Layout(4, 2, 2, 1, "number", False, 1),
    _Layout(8, 2, 2, 8, "number", True, 2),
]
_DESIGNS = [_config(), _config(heads=1, cores=4), _config(value_expansion=9, query_centering=True)]


def _tokens(count):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 1, _HIDDEN, generator=generator)
    return x, torch.randn(count, 1, _HIDDEN, generator=generator)


def _on_rank(layout):
    """What each design gives on this rank."""
    from megatron.core import parallel_state

    from ultramem_megatron.patches import registry

    registry.apply_all()
    init_gloo()
    parallel_state.initialize_model_parallel(
        layout.tp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.size,
        expert_tensor_parallel_size=1,
    )
    return [_compute(layout, config) for config in _DESIGNS]


def _memory(layout, config):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from ultramem_megatron.megatron.layer.memory_submodule import TransformerMemory
    from ultramem_megatron.memory.placement import Placement

    transformer = TransformerConfig(
        num_layers=1,
        hidden_size=_HIDDEN,
        num_attention_heads=2,
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence_parallel,
    )
    return TransformerMemory(
        transformer,
        ultramem=config,
        layer_number=1,
        partition=layout.partition,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        placement=Placement(1, 1, 1),
        values_by_table={},
    )


def _compute(layout, config):
    from megatron.core import parallel_state

    memory, rank = _memory(layout, config), torch.distributed.get_rank()
    alike = 1 if layout.sequence_parallel else layout.tp  # ranks that hold the same tokens
    x, grad = _tokens(layout.world // alike * layout.tokens)
    first = rank // alike * layout.tokens
    own = slice(first, first + layout.tokens)
    out = memory(x[own].requires_grad_())
    out.backward(grad[own])
    gradients = {name: p.grad for name, p in memory.named_parameters()}
    memory.end_batch()
    common = memory.query.common
    group = parallel_state.get_expert_model_parallel_group()
    table = memory.values.layout
    assert sum(1 for _ in memory.steps(x[own])) == memory.pauses
    return {
        "out": out.detach(),
        "gradients": gradients,
        "mean": None if common is None else common.mean,
        "corner": (table.rows().start, table.columns().start),
        "group": torch.distributed.get_process_group_ranks(group),
    }


@pytest.fixture(scope="module", params=_LAYOUTS, ids=str)
def dealt(request):
    """A layout, and by rank what each design gives in it."""
    return request.param, run_on_ranks(request.param.world, _on_rank, request.param)


@pytest.mark.parametrize("design", range(len(_DESIGNS)))
def test_tokens_dealt_out_give_what_all_tokens_give(dealt, design):
    layout, config = dealt[0], _DESIGNS[design]
    ranks = [results[design] for results in dealt[1]]
    own_tokens = ranks if layout.sequence_parallel else ranks[:: layout.tp]
    whole = UltraMemLayer(config, hidden_size=_HIDDEN, num_layers=1)
    x, grad = _tokens(len(own_tokens) * layout.tokens)
    out = whole(x)
    out.backward(grad)
    terms = sum_lengths(config, _HIDDEN)
    found = torch.cat([rank["out"] for rank in own_tokens])
    assert_close(found, out, rounding(out.dtype, terms), "output")

    whole.end_batch()
    if whole.query.common is not None:
        for rank in ranks:
            assert_close(rank["mean"], whole.query.common.mean, rounding(out.dtype, len(x)), "mean")
    for rank in ranks:  # neighbours share a table
        assert len(rank["group"]) == layout.size
        assert rank["group"] == list(range(rank["group"][0], rank["group"][0] + layout.size))
    # A parameter's gradient also adds up the tokens.
    tolerance = rounding(out.dtype, terms + len(x))
    _compare_gradients(ranks, own_tokens, whole, tolerance)


def _compare_gradients(ranks, own_tokens, whole, tolerance):
    """Summed over ranks with different tokens, as Megatron sums them."""
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    table = torch.zeros_like(expected.pop("values.weight"))
    for rank in ranks:
        part, (row, column) = rank["gradients"]["values.weight"], rank["corner"]
        table[row : row + part.shape[0], column : column + part.shape[1]] += part
    assert_close(table, whole.values.weight.grad, tolerance, "table")
    for name, gradient in expected.items():
        total = sum(rank["gradients"][name] for rank in own_tokens)
        assert_close(total, gradient, tolerance, name)
