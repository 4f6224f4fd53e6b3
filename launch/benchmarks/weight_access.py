"""Bytes of MLP, expert and value weights that a decode step reads, counted in the step.

As in the paper (section 4, figures 1c and 7b), attention, keys and projections are left out.

B tokens of a step, N values of a memory layer, P picks per token and layer, Dv value dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from torch import Tensor, nn

from launch.benchmarks.grouped_experts import GroupedProducts
from ultramem_megatron.memory.tables.contract import PreValues
from ultramem_megatron.memory.tables.value_table import PreValueTable, ValueTable
from ultramem_megatron.tools.plan.sizes import ReadSizes


@contextmanager
def count_weight_bytes(model: nn.Module) -> Iterator[dict[str, int]]:
    """Within it, forward passes of `model` add up what they read.

    Entries "mlp" (dense MLPs and shared experts, once per pass), "experts" (those with a token) and
    "values" (each distinct row once per pass).
    """
    counted = {"mlp": 0, "experts": 0, "values": 0}

    def mlp(module: nn.Module, _inputs: Any) -> None:
        counted["mlp"] += _bytes_of(module)

    def experts(module: nn.Module, inputs: Any) -> None:
        tokens_per_expert: Tensor = inputs[1]
        used = int((tokens_per_expert > 0).sum())
        counted["experts"] += used * _bytes_of(module) // len(tokens_per_expert)

    def grouped(module: nn.Module, inputs: Any) -> None:
        ends: Tensor = inputs[1]
        used = int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum())
        counted["experts"] += used * _bytes_of(module) // len(ends)

    def values(module: nn.Module, inputs: Any) -> None:
        assert isinstance(module, ValueTable)
        if isinstance(module, PreValueTable):
            return  # it is read, and counted, with the values it stands before
        addresses, _scores, *others = inputs
        rows = (addresses % module.layout.num_values).unique().numel()
        pre = [given.part for given in others if isinstance(given, PreValues)]
        counted["values"] += rows * sum(part[0].nbytes for part in (module.weight, *pre))

    counters = {"mlp": mlp, "experts": experts, "grouped": grouped, "values": values}
    hooks = [
        module.register_forward_pre_hook(counters[kind]) for module, kind in _kinds(model).items()
    ]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def _kinds(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that are counted, and under which entry."""
    routed = [module.experts for module in model.modules() if isinstance(module, BaseMoELayer)]
    inside = {module for experts in routed for module in experts.modules()}
    kinds: dict[nn.Module, str] = dict.fromkeys(routed, "experts")
    for module in model.modules():
        if isinstance(module, ValueTable):
            kinds[module] = "values"
        elif isinstance(module, GroupedProducts):
            kinds[module] = "grouped"
        elif isinstance(module, MLP) and module not in inside:
            kinds[module] = "mlp"
    return kinds


def other_weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights that every step reads whole and `count_weight_bytes` leaves out.

    Attention, norms, routers, what a memory has beside its table, and the output layer; of word
    embeddings a step reads next to nothing, unless they are the output layer too.
    """
    counted = {id(p) for module in _kinds(model) for p in module.parameters()}
    names = dict(model.named_parameters())
    untied = any(name.endswith("output_layer.weight") for name in names)
    return sum(
        parameter.nbytes
        for name, parameter in names.items()
        if id(parameter) not in counted and not (untied and "embedding." in name)
    )


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def read_sizes(model: nn.Module, experts_per_token: int, picks: int) -> ReadSizes:
    """What the paper's model of weight access needs to know of a built model.

    picks: values that a token reads of one table, m*H.
    """
    found = _kinds(model).items()
    mlps, experts = ([m for m, kind in found if kind == name] for name in ("mlp", "experts"))
    layouts = [module.layout for module, _ in found if isinstance(module, ValueTable)]
    routed = [module for module in model.modules() if isinstance(module, BaseMoELayer)]
    number = routed[0].num_local_experts if routed else 0
    return ReadSizes(
        mlp=sum(map(_elements_of, mlps)),
        expert=sum(map(_elements_of, experts)) // number if number else 0,
        experts=number,
        experts_per_token=experts_per_token if number else 0,
        memory_layers=len(layouts),
        values=layouts[0].num_values if layouts else 0,
        value_dim=layouts[0].value_dim if layouts else 0,
        picks=picks,
    )


def _elements_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
