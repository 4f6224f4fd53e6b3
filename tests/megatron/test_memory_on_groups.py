"""The memory submodule on Megatron's groups, tensor, context and data parallel, without a model.

It reads token by token, so its tables and groups can be tested with tokens dealt out by hand.
"""

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


def _tokens(count):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 1, _HIDDEN, generator=generator)
    return x, torch.randn(count, 1, _HIDDEN, generator=generator)


def _on_rank(tp, cp, size, partition, sequence_parallel, tokens_per_rank, config):
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from ultramem_megatron.megatron.layer.memory_submodule import TransformerMemory
    from ultramem_megatron.memory.placement import Placement
    from ultramem_megatron.patches import registry

    registry.apply_all()
    rank, world = init_gloo()
    parallel_state.initialize_model_parallel(
        tp, context_parallel_size=cp, expert_model_parallel_size=size,
        expert_tensor_parallel_size=1,
    )  # fmt: skip
    transformer = TransformerConfig(
        num_layers=1, hidden_size=_HIDDEN, num_attention_heads=2, use_cpu_initialization=True,
        tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel,
    )  # fmt: skip
    memory = TransformerMemory(
        transformer, ultramem=config, layer_number=1, partition=partition,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        placement=Placement(1, 1, 1), values_by_table={},
    )  # fmt: skip
    holders = world if sequence_parallel else world // tp  # ranks with tokens of their own
    x, grad = _tokens(holders * tokens_per_rank)
    index = rank if sequence_parallel else rank // tp
    own = slice(index * tokens_per_rank, (index + 1) * tokens_per_rank)
    out = memory(x[own].requires_grad_())
    out.backward(grad[own])
    gradients = {name: p.grad for name, p in memory.named_parameters()}
    group = parallel_state.get_expert_model_parallel_group()
    layout = memory.values.layout
    assert sum(1 for _ in memory.steps(x[own])) == memory.pauses
    return {
        "out": out.detach(), "gradients": gradients,
        "corner": (layout.rows().start, layout.columns().start),
        "group": torch.distributed.get_process_group_ranks(group),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("world", "tp", "cp", "size", "partition", "sequence_parallel", "tokens"),
    [
        (4, 2, 2, 4, "number", False, 5),  # odd: shares of 3 and 2 tokens
        (4, 2, 2, 4, "dimension", False, 5),
        (4, 1, 2, 4, "dimension", False, 3),
        (4, 1, 4, 2, "number", False, 3),
        (4, 2, 1, 2, "dimension", True, 3),
        (4, 2, 2, 1, "number", False, 1),
        (8, 2, 2, 8, "number", True, 2),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"heads": 1, "cores": 4}, {"value_expansion": 9}])
def test_tokens_dealt_out_give_what_all_tokens_give(
    world, tp, cp, size, partition, sequence_parallel, tokens, changes
):
    config = _config(**changes)
    ranks = run_on_ranks(
        world, _on_rank, tp, cp, size, partition, sequence_parallel, tokens, config
    )
    own_tokens = ranks if sequence_parallel else ranks[::tp]
    whole = UltraMemLayer(config, hidden_size=_HIDDEN, num_layers=1)
    x, grad = _tokens(len(own_tokens) * tokens)
    out = whole(x)
    out.backward(grad)
    terms = sum_lengths(config, _HIDDEN)
    found = torch.cat([rank["out"] for rank in own_tokens])
    assert_close(found, out, rounding(out.dtype, terms), "output")

    for rank in ranks:  # neighbours share a table
        assert len(rank["group"]) == size
        assert rank["group"] == list(range(rank["group"][0], rank["group"][0] + size))
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
