"""Inside Megatron's fp8 context a memory computes what it does outside of it, in bf16.

Transformer Engine is not here: a stand-in for its autocast rounds what Megatron's own linear
layers read to e4m3. What a GPU's kernels give can only be seen on one.
"""

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.training_runs import tiny_gpt

_FLAGS = {
    "num_layers": 4,
    "bf16": True,
    "ultramem_spans": "2:3/4:4",
    "ultramem_num_keys": 12,
    "ultramem_topk": 6,
}


class _StandInAutocast(contextlib.AbstractContextManager):
    """As Transformer Engine's, a state of the process, which its own layers alone look at."""

    depth = 0

    def __enter__(self) -> None:
        _StandInAutocast.depth += 1

    def __exit__(self, *_: object) -> None:
        _StandInAutocast.depth -= 1


def _rounding(forward: Any) -> Any:
    def rounded(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _StandInAutocast.depth:
            x = x + (x.to(torch.float8_e4m3fn).to(x.dtype) - x).detach()
        return forward(self, x, *args, **kwargs)

    return rounded


def _contexts(config: Any, layer: int = -1, is_init: bool = False) -> Any:
    assert config.fp8 == "hybrid"
    return contextlib.nullcontext() if is_init else _StandInAutocast()


def _computed(model: Any, tokens: torch.Tensor) -> SimpleNamespace:
    """The loss, and of each memory what it read, gave and got back, and its gradients."""
    memories = {
        layer.layer_number: layer.memory
        for layer in model.decoder.layers
        if getattr(layer, "memory", None) is not None
    }
    seen: dict[int, Any] = {}

    def keep(number: int, args: tuple[Any, ...], output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: seen[number].append(gradient.clone()))
        seen[number] = [_StandInAutocast.depth, args[0].detach().clone(), output.detach().clone()]

    hooks = [
        memory.register_forward_hook(lambda _, args, out, number=number: keep(number, args, out))
        for number, memory in memories.items()
    ]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    loss = model(tokens, positions, None, labels=tokens).float().mean()
    loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {number: _take_gradients(memory) for number, memory in memories.items()}
    return SimpleNamespace(loss=loss.detach(), seen=seen, gradients=gradients, memories=memories)


def _take_gradients(memory: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in memory.named_parameters() if p.grad is not None}
    memory.zero_grad()
    return found


def _inside_and_outside(recipe: str) -> Any:
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import transformer_block

    from ultramem_megatron.inference.untrained import untrained_model

    model = untrained_model(tiny_gpt(**_FLAGS))[0].module.train()
    tokens = torch.randint(500, (2, 32), generator=torch.Generator().manual_seed(0))
    plain = _computed(model, tokens).loss
    model.config.fp8, model.config.fp8_recipe = "hybrid", recipe
    with contextlib.ExitStack() as stack:
        for kind in (layers.ColumnParallelLinear, layers.RowParallelLinear):
            stack.enter_context(patch.object(kind, "forward", _rounding(kind.forward)))
        stack.enter_context(patch.object(transformer_block, "get_fp8_context", _contexts))
        found = _computed(model, tokens)
    again = {}
    for number, memory in found.memories.items():
        _, read, _, gradient = found.seen[number]
        output = memory(read)
        output.backward(gradient)
        again[number] = output.detach(), _take_gradients(memory)
    return plain, found.loss, found.seen, found.gradients, again


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_a_memory_computes_inside_the_fp8_context_what_it_does_outside(recipe: str) -> None:
    """delayed: one context around all layers; the others: one around each."""
    plain, loss, seen, gradients, again = run_on_ranks(1, _inside_and_outside, recipe)[0]
    assert 0 < abs(loss - plain) < 0.1
    assert list(seen) == list(again) == [2, 4]
    for number, (depth, read, output, gradient) in seen.items():
        assert depth == 1
        assert {t.dtype for t in (read, output, gradient)} == {torch.bfloat16}
        assert torch.equal(output, again[number][0])
        assert gradients[number].keys() == again[number][1].keys()
        assert len(gradients[number]) > 5
        for name, value in gradients[number].items():
            assert value.abs().sum() > 0, name
            assert torch.equal(value, again[number][1][name]), name
