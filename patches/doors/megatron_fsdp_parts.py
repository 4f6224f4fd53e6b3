"""Door: Megatron-FSDP keeps out of its units what is not the same on all data-parallel ranks.

A parameter with `allreduce=False` that is no expert's (a part of a value table) would be cut over
all data-parallel ranks as any other. Here it gets a buffer of its own over those ranks that have
the same part, as experts have. That one is of no unit: it is gathered once a step, not for each use
of its layer, and its gradient is reduced over these ranks alone.

Of no unit are the other parameters, too, of a module that is marked as WHOLE: it computes beside
later layers, when its own unit's are given back. They are cut over all data-parallel ranks.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

KEPT_TAGS = {"allreduce"}
"""Attributes of parameters that the optimizer's have too; who needs another one adds its name."""

WHOLE = "fsdp_whole"
"""Attribute of a module whose parameters stay gathered until backward is done; FSDP2's, too."""

_FSDP = "megatron.core.distributed.fsdp"
_BUFFER = f"{_FSDP}.src.megatron_fsdp.param_and_grad_buffer"
_ADAPTER = f"{_FSDP}.mcore_fsdp_adapter.FullyShardedDataParallel"
_GROUPS = f"{_BUFFER}._get_parameter_groups"
_NAMED = f"{_BUFFER}.ParamAndGradBuffer._init_optimizer_named_parameters"
_RELEASE = f"{_BUFFER}.AllGatherPipeline.release_bucket"


def is_part(name: str, parameter: Any) -> bool:
    """Whether a parameter is of fewer ranks than all data-parallel ones; of experts is another."""
    return not getattr(parameter, "allreduce", True) and ".experts." not in name


def _telling_parts(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def told(
        self: Any, config: Any, ddp_config: Any, module: Any, *args: Any, **settings: Any
    ) -> None:
        self.has_parts = any(is_part(*named) for named in module.named_parameters())
        init(self, config, ddp_config, module, *args, **settings)

    return told


def _with_their_mesh(init_index: Callable[..., Any]) -> Callable[..., Any]:
    """The mesh of experts' groups, in a model without experts as well."""

    @functools.wraps(init_index)
    def _init_dist_index(self: Any, pg_collection: Any) -> Any:
        experts = self.num_moe_experts
        if self.has_parts and experts is None:
            self.num_moe_experts = 0
        try:
            return init_index(self, pg_collection)
        finally:
            self.num_moe_experts = experts

    return _init_dist_index


@contextmanager
def _without(left_out: set[Any], module: Any) -> Iterator[None]:
    before = {
        owner: dict(owner._parameters)
        for owner in module.modules()
        if not left_out.isdisjoint(owner._parameters.values())
    }
    for owner, own in before.items():
        for name, parameter in own.items():
            if parameter in left_out:
                del owner._parameters[name]
    try:
        yield
    finally:
        for owner, own in before.items():
            owner._parameters.clear()
            owner._parameters.update(own)


def _in_groups_of_their_own(get_groups: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_groups)
    def _get_parameter_groups(module: Any, policy: Any, *args: Any, **settings: Any) -> Any:
        from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer

        parts = {p for n, p in module.named_parameters() if is_part(n, p)}
        with _without(parts, module):
            wholes = [each for each in module.modules() if getattr(each, WHOLE, False)]
            of_wholes = {p for whole in wholes for p in whole.parameters()}
            with _without(of_wholes, module):
                groups, group_of, together = get_groups(module, policy, *args, **settings)
            for whole in wholes:
                no_units = dataclasses.replace(policy, fsdp_unit_modules=[])
                _add(groups, group_of, together, get_groups(whole, no_units, *args, **settings)[0])
        uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        for part in (p for p in module.parameters() if p in parts):
            # Of several modules it has a gradient when all of backward is done.
            part._is_shared = uses[id(part)] > 1
            group = param_and_grad_buffer.ParameterGroup(
                [part],
                dtype=part.dtype,
                is_expert_param=True,
                requires_grad=part.requires_grad,
                chunk_size_factor=part.shape[1:].numel(),
            )
            _add(groups, group_of, together, [group])
        for group in groups:
            group.stays = any(p in parts or p in of_wholes for p in group.params)
        return groups, group_of, together

    return _get_parameter_groups


def _add(groups: list[Any], group_of: Any, together: dict[int, list[int]], more: list[Any]) -> None:
    """Of no unit, each gathered and reduced by itself."""
    for group in more:
        number = len(groups)
        groups.append(group)
        together[number] = [number]
        for parameter in group.params:
            group_of[parameter] = number


def _with_their_tags(init_named: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(init_named)
    def _init_optimizer_named_parameters(self: Any) -> Any:
        named = init_named(self)
        for _, parameter in named:
            for tag in KEPT_TAGS & vars(parameter.orig_param).keys():
                setattr(parameter, tag, getattr(parameter.orig_param, tag))
        return named

    return _init_optimizer_named_parameters


def _of_units_alone(release: Callable[..., None]) -> Callable[..., None]:
    """As upstream's own comment on it has it; others were released with the unit they are in."""

    @functools.wraps(release)
    def release_bucket(self: Any, bucket_id: int, bwd: bool, lazy: bool = False) -> None:
        if not self.buffer.parameter_groups[bucket_id].stays:
            release(self, bucket_id, bwd, lazy)

    return release_bucket


def _install(editor: Editor) -> None:
    given = ("self", "config", "ddp_config", "module", "fsdp_unit_modules", "disable_bucketing")
    editor.wrap(f"{_ADAPTER}.__init__", _telling_parts, (*given, "device", "pg_collection"))
    editor.wrap(f"{_ADAPTER}._init_dist_index", _with_their_mesh, ("self", "pg_collection"))
    groups = ("module", "policy", "meta_device_init_fp8_params", "bucket_group_by_fsdp_unit")
    editor.wrap(_GROUPS, _in_groups_of_their_own, groups)
    editor.wrap(_NAMED, _with_their_tags, ("self",))
    editor.wrap(_RELEASE, _of_units_alone, ("self", "bucket_id", "bwd", "lazy"))


PATCH = Patch(
    name="doors.megatron_fsdp_parts",
    symbols=(f"{_ADAPTER}._init_dist_index", _GROUPS, _NAMED, _RELEASE),
    reason="Megatron-FSDP knows experts by their names, and puts them into units.",
    delete_when="It takes parameters with allreduce=False over the ranks that have the same.",
    install=_install,
    versions=">=0.19,<0.20",
)
