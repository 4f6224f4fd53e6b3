"""Decode steps of a memory layer without Megatron: the kernels that only decoding has."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from launch.benchmarks.kernels.candidate import Candidate
from launch.benchmarks.kernels.shapes import Shape
from ultramem_megatron.communication.pausing import run
from ultramem_megatron.memory.layer import UltraMemLayer

_TAPS, _STEPS = 5, 3


def outputs(shape: Shape, device: torch.device, kernels: list[str]) -> Iterator[dict[str, Tensor]]:
    """By these kernels in turn: the outputs of steps of T sequences, and the last history."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            config = dataclasses.replace(shape.config(), query_conv_kernel=_TAPS)
            layer = UltraMemLayer(config, hidden_size=shape.hidden, num_layers=12)
            assert layer.query.conv is not None
            torch.nn.init.normal_(layer.query.conv.weight)  # it starts inert
            x = torch.randn(_STEPS, shape.tokens, shape.hidden)
            history = torch.randn(_TAPS - 1, shape.tokens, shape.hidden)
    finally:
        torch.set_default_dtype(before)
    for name in kernels:
        one = Candidate(name=name, forward=lambda: x, leaves=(), kernels=name)
        yield one.forced(lambda: _steps(layer, x, history.clone()))


@torch.no_grad()
def _steps(layer: UltraMemLayer, x: Tensor, history: Tensor) -> dict[str, Tensor]:
    layer.train()
    layer.prepare_for_inference()  # keys are kept as these kernels want them
    made = [run(layer.steps(position, history, advances=True)) for position in x.split(1)]
    return {"output": torch.cat(made), "history": history}
