"""What a layer holds, keeps, computes and sends, from which layouts are worked out.

Counted on the model itself, as `stage_cost.py` does, once for each tensor-parallel size: a
micro-batch of one sequence through the whole model on the meta device.
"""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ultramem_megatron.megatron.flags.refused_by_megatron import megatron_refuses
from ultramem_megatron.memory.tables.value_table import is_value_table
from ultramem_megatron.tools.plan.build import Run, built_stage
from ultramem_megatron.tools.plan.stage_cost import micro_batch

_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """Of one layer, or of what comes before the first, or after the last."""

    dense: int = 0
    """Parameters on one tensor-parallel rank, without tables."""
    sharded: int = 0
    """Those of them in matrices that tensor-parallel ranks share: each sees all tokens."""
    whole: int = 0
    """Those in matrices that every tensor-parallel rank has: each sees its share of tokens."""
    tables: int = 0
    """Elements of whole value tables."""
    kept: int = 0
    """Bytes for the backward on one rank, of one sequence."""

    def __add__(self, other: "LayerCount") -> "LayerCount":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return LayerCount(*(one + two for one, two in pairs))


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of a model over so many tensor-parallel ranks."""

    tensor_ranks: int
    before: LayerCount
    layers: tuple[LayerCount, ...]
    after: LayerCount
    received: float
    """Bytes that tensor parallelism brings to a rank, of one sequence, all layers together."""


def count(run: Run) -> Counts:
    """Of a run of one sequence a micro-batch, whose ranks are tensor-parallel.

    Raises UltraMemError for what Megatron refuses.
    """
    with built_stage(run) as (chunk,):
        found = _parameters(chunk)
        with megatron_refuses(), _kept_by_layer(chunk) as kept:
            outside, received = micro_batch(run, [chunk])
    layers = tuple(
        dataclasses.replace(found.get(number, LayerCount()), kept=kept[number])
        for number in range(run.transformer.num_layers)
    )
    before = found.get(None, LayerCount())
    after = dataclasses.replace(_head(found, before), kept=outside)
    ranks = run.args.tensor_model_parallel_size
    return Counts(ranks, before, layers, after, received.get("tensor parallel", 0))


_BEFORE, _AFTER = None, -1


def _parameters(chunk: nn.Module) -> dict[int | None, LayerCount]:
    """By layer from 0; None: embeddings, -1: what follows the layers."""
    found: dict[int | None, LayerCount] = {}
    for name, parameter in chunk.named_parameters():
        layer = _LAYER.search(name)
        place = int(layer[1]) if layer else _BEFORE if name.startswith("embedding.") else _AFTER
        found[place] = found.get(place, LayerCount()) + _of(parameter)
    return found


def _of(parameter: Tensor) -> LayerCount:
    size = parameter.numel()
    if is_value_table(parameter):
        return LayerCount(tables=size)
    if parameter.dim() < 2:
        return LayerCount(dense=size)
    if getattr(parameter, "tensor_model_parallel", False):
        return LayerCount(dense=size, sharded=size)
    return LayerCount(dense=size, whole=size)


def _head(found: dict[int | None, LayerCount], before: LayerCount) -> LayerCount:
    """The last stage's: with tied embeddings it multiplies with a copy of the first one's."""
    own = found.get(_AFTER, LayerCount())
    if own.sharded:
        return own
    return own + LayerCount(dense=before.sharded, sharded=before.sharded)


@contextmanager
def _kept_by_layer(chunk: Any) -> Iterator[list[int]]:
    """Within it, bytes that autograd keeps of each layer beside its parameters; filled at the end.

    They are then not counted by who counts outside.
    """
    layers = list(chunk.decoder.layers)
    kept: list[dict[int, Tensor]] = [{} for _ in layers]
    entered: list[Any] = []

    def enter(number: int) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            kept[number][tensor.untyped_storage()._cdata] = tensor  # keeps the key unique
            return tensor

        entered.append(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        entered[-1].__enter__()

    hooks = []
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, at=number: enter(at)))
        hooks.append(layer.register_forward_hook(lambda *_: entered.pop().__exit__()))
    found = [0] * len(layers)
    try:
        yield found
        own = {p.untyped_storage()._cdata for p in chunk.parameters()}
        for number, tensors in enumerate(kept):
            found[number] = sum(
                x.untyped_storage().nbytes() for key, x in tensors.items() if key not in own
            )
    finally:
        for hook in hooks:
            hook.remove()
