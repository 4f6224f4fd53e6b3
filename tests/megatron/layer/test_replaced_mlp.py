"""A memory in the place of an MLP: the layer is one whose MLP returns the memory's result."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.ranks import run_on_ranks
from tests.training_runs import tiny_gpt

_FLAGS = {
    "num_layers": 2,
    "hidden_dropout": 0.3,
    "recompute_granularity": "selective",
    "recompute_modules": ["mlp", "layernorm"],
    "ultramem_spans": "2:2",
    "ultramem_replace_mlp": True,
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
}


class _AsMLP(torch.nn.Module):
    """The memory called as Megatron calls an MLP."""

    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.reads = memory

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self.reads(x), None


def _both_ways() -> SimpleNamespace:
    from ultramem_megatron.inference.untrained import untrained_model
    from ultramem_megatron.megatron.layer.transformer_layer import LayerRole

    model, args = untrained_model(tiny_gpt(**_FLAGS))
    layer: Any = model.train().decoder.layers[1]
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(8, 2, args.hidden_size, requires_grad=True)

    def computed() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        output = layer(x, attention_mask=None)[0]
        output.square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        found = [t.detach().clone() for t in (output, x.grad, *gradients)]
        layer.zero_grad()
        x.grad = None
        return tuple(found)

    replaced = computed()
    memory, layer.memory, layer.role = layer.memory, None, LayerRole()
    layer.mlp, layer.mlp_bda = _AsMLP(memory), layer._add
    return SimpleNamespace(names=names, replaced=replaced, as_mlp=computed())


def test_the_result_is_added_as_an_mlps_under_dropout_and_recomputation() -> None:
    found = run_on_ranks(1, _both_ways)[0]
    assert not any("linear_fc" in name for name in found.names)
    assert len(found.replaced) == len(found.as_mlp) > 10
    for one, other in zip(found.replaced, found.as_mlp, strict=True):
        assert torch.equal(one, other)
