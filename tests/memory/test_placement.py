"""Where memories stand, and memories that read the same values."""

from typing import Any

import torch

from tests.layers import HIDDEN, small_config
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.placement import Placement, placements
from ultramem_megatron.memory.spans import Span


def _layer(number: int, **changes: Any) -> UltraMemLayer:
    return UltraMemLayer(
        small_config(), hidden_size=HIDDEN, num_layers=4, layer_number=number, **changes
    ).double()


def test_each_span_has_values_of_its_own() -> None:
    config = small_config(spans=(Span(1, 2), Span(3, 3)))
    assert placements(config) == (Placement(1, 2, 1), Placement(3, 3, 3))


def test_shared_values_have_the_gradient_of_both_memories_and_are_drawn_once() -> None:
    first = _layer(1)
    drawn = first.values.weight.detach().clone()
    second = _layer(3, values=first.values, table_number=1)
    assert second.values.weight is first.values.weight
    assert torch.equal(first.values.weight, drawn.to(torch.float32).double())
    x = torch.randn(6, HIDDEN, dtype=torch.float64)
    apart = []
    for layer in (first, second):
        first.values.weight.grad = None
        layer(x).square().sum().backward()
        apart.append(first.values.weight.grad.clone())
    first.values.weight.grad = None
    (first(x).square().sum() + second(x).square().sum()).backward()
    torch.testing.assert_close(first.values.weight.grad, apart[0] + apart[1], rtol=1e-12, atol=0)
    assert not torch.equal(apart[0], apart[1])
