"""Bytes of MLP, expert and value weights that a decode step reads, counted in the step.

As in the paper (section 4, figures 1c and 7b), attention, keys and projections are left out.

B tokens of a step, N values of a memory layer, P picks per token and layer, Dv value dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ultramem_megatron.memory.tables.value_table import ValueTable
from ultramem_megatron.tools.plan.sizes import ReadSizes


@contextmanager
def count_weight_bytes(model: nn.Module) -> Iterator[dict[str, int]]:
    """Within it, forward passes of `model` add up what they read.

    Entries "mlp" (a dense MLP, once per pass), "experts" (those with a token) and "values" (each
    distinct row once per pass).
    """
    counted = {"mlp": 0, "experts": 0, "values": 0}

    def mlp(module: nn.Module, _inputs: Any) -> None:
        counted["mlp"] += _bytes_of(module)

    def experts(module: nn.Module, inputs: Any) -> None:
        tokens_per_expert: Tensor = inputs[1]
        used = int((tokens_per_expert > 0).sum())
        counted["experts"] += used * _bytes_of(module) // len(tokens_per_expert)

    def values(module: nn.Module, inputs: Any) -> None:
        assert isinstance(module, ValueTable)
        rows = (inputs[0] % module.layout.num_values).unique().numel()
        counted["values"] += rows * module.weight[0].nbytes

    kinds = {"MLP": mlp, "experts": experts, "ValueTable": values}
    hooks = [
        module.register_forward_pre_hook(kinds[kind])
        for name, module in model.named_modules()
        if (kind := _kind(name, module)) is not None
    ]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def _kind(name: str, module: nn.Module) -> str | None:
    if name.endswith(".experts"):
        return "experts"
    if isinstance(module, ValueTable):
        return "ValueTable"
    return "MLP" if name.endswith(".mlp") and type(module).__name__ == "MLP" else None


def other_weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights that every step reads whole and `count_weight_bytes` leaves out.

    Attention, norms, routers, what a memory has beside its table, and the output layer; of word
    embeddings a step reads next to nothing, unless they are the output layer too.
    """
    counted = {
        id(parameter)
        for name, module in model.named_modules()
        if _kind(name, module) is not None
        for parameter in module.parameters()
    }
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
    kinds = [(_kind(name, module), module) for name, module in model.named_modules()]
    experts = [module for kind, module in kinds if kind == "experts"]
    tables = [module for _, module in kinds if isinstance(module, ValueTable)]
    number = experts[0].num_local_experts if experts else 0
    return ReadSizes(
        mlp=sum(_elements_of(module) for kind, module in kinds if kind == "MLP"),
        expert=sum(map(_elements_of, experts)) // number if number else 0,
        experts=number,
        experts_per_token=experts_per_token if number else 0,
        memory_layers=len(tables),
        values=tables[0].layout.num_values if tables else 0,
        value_dim=tables[0].layout.value_dim if tables else 0,
        picks=picks,
    )


def _elements_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
