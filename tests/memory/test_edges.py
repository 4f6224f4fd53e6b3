"""No tokens at all, and weights that are not finite."""

import pytest
import torch

from tests.layers import HIDDEN, small_layer
from ultramem_megatron.errors import UltraMemError


@pytest.mark.parametrize("kernel", [0, 4])
@pytest.mark.parametrize("shape", [(0, 2, HIDDEN), (3, 0, HIDDEN)], ids=["no sequence", "no batch"])
def test_no_tokens_are_read_and_learn_nothing(shape, kernel):
    layer = small_layer(query_conv_kernel=kernel)
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_cores_that_are_not_finite_are_named_with_their_layer(value):
    layer = small_layer()
    with torch.no_grad():
        layer.retrieval.cores.weight.view(-1)[0] = value
    named = rf"memory layer {layer.layer_number}: retrieval.cores.weight holds NaN or infinity"
    with pytest.raises(UltraMemError, match=named):
        layer.after_step()
