"""Tables in host memory beside Megatron's distributed optimizer.

Of the ranks that add up their gradients, one has the number that stands for a table in its shard;
it tells the others what Megatron made of the gradient there, once for all tables when gradients are
complete and once when the optimizer steps. Every rank then updates its copy of the table's rows, to
the same bits. With a copy a stage (--ultramem-parallel-size all its ranks), nothing is told.

In checkpoints tables have the form of those on the device in the fully reshardable format
(--dist-ckpt-optim-fully-reshardable); in the default format, which is one of buffers and not of
parameters, they stand beside it in that same form.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from ultramem_megatron.megatron.optimizer.host_adam import HostAdam
from ultramem_megatron.megatron.optimizer.visited_rows import make_state

_BESIDE = "tables_on_host"


class DistributedTrainer:
    """A distributed optimizer, and the tables that stand-ins in its buffers are for."""

    def __init__(self, single: Any, tables: Mapping[int, HostAdam]) -> None:
        """tables: by the stand-in's id, in the same order on every rank; a collective."""
        self.single, self.tables = single, list(tables.values())
        places = [single.model_param_group_index_map.get(t.home.stand_in) for t in self.tables]
        groups = single.optimizer.param_groups
        self._parts = [None if at is None else groups[at[0]]["params"][at[1]] for at in places]
        numbers = [None if at is None else torch.tensor(float(at[0])) for at in places]
        self._groups = [int(number) for number in self._told(numbers)]

    def take_over(self) -> None:
        """Its steps, and what checkpoints are written from and read into."""
        self.single.optimizer.register_step_pre_hook(self._step)
        for table, part in zip(self.tables, self._parts, strict=True):
            table.home.told = functools.partial(self._one_told, part is not None)
        for name in ("sharded_state_dict", "load_state_dict", "reload_model_params"):
            setattr(self.single, name, getattr(self, f"_{name}")(getattr(self.single, name)))

    def _told(self, numbers: list[Tensor | None]) -> list[float]:
        """Each by the one rank that has it; a collective."""
        device = self.tables[0].home.stand_in.device
        there = [torch.zeros(1) if number is None else number.float().view(1) for number in numbers]
        every = torch.cat([number.to(device) for number in there])
        if self.single.data_parallel_group.size() > 1:
            dist.all_reduce(every, group=self.single.data_parallel_group)
        return [float(number) for number in every]

    def _one_told(self, owned: bool, number: Tensor) -> float:
        return self._told([number if owned else None])[0]

    @torch.no_grad()
    def _step(self, *_: Any) -> None:
        norms = self._told([None if part is None else part.grad for part in self._parts])
        groups = self.single.optimizer.param_groups
        for table, norm, group, part in zip(
            self.tables, norms, self._groups, self._parts, strict=True
        ):
            table.step(norm, groups[group])
            if part is not None:  # its step is counted beside the others', of no effect
                part.grad = torch.zeros_like(part)

    def _sharded_state_dict(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def sharded_state_dict(model: Any, *args: Any, **kwargs: Any) -> Any:
            stored, _ = extract_sharded_tensors_and_factories(model)
            places = {id(tensor.data): tensor for tensor in nested_values(stored)}
            ones = {
                str(number): _stand_in(places[id(table.weight)], table)
                for number, table in enumerate(self.tables)
            }
            state = original({**model, _BESIDE: ones}, *args, **kwargs)
            tables = [_sharded(places[id(table.weight)], table) for table in self.tables]
            if state["param_state_sharding_type"] != "fully_reshardable":
                state[_BESIDE] = dict(enumerate(tables))
            elif state["param_state"] is not None:
                state["param_state"] |= dict(zip(self._indices(), tables, strict=True))
            return state

        return sharded_state_dict

    def _load_state_dict(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_state_dict(state: Any) -> Any:
            if "param_state" in state:
                steps = int(state["optimizer"]["param_groups"][0]["step"])
                if _BESIDE in state:
                    found = state.pop(_BESIDE)
                    loaded = [found[number] for number in range(len(self.tables))]
                else:
                    ones = dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), torch.zeros(1))
                    loaded = [state["param_state"][index] for index in self._indices()]
                    state["param_state"] |= dict.fromkeys(self._indices(), ones)
                for table, tensors in zip(self.tables, loaded, strict=True):
                    _load(table, tensors, steps)
            return original(state)

        return load_state_dict

    def _reload_model_params(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def reload_model_params(*args: Any, **kwargs: Any) -> Any:
            for table in self.tables:
                table.catch_up()
                table.master.copy_(table.weight)
            return original(*args, **kwargs)

        return torch.no_grad()(reload_model_params)

    def _indices(self) -> Iterator[int]:
        """Where the fully reshardable format has the tables: it counts parameters in buffers."""
        places = {
            id(parameter): index
            for index, parameter in enumerate(
                parameter for buffer in self.single.buffers for parameter in buffer.param_index_map
            )
        }
        return (places[id(table.home.stand_in)] for table in self.tables)


def _stand_in(place: ShardedTensor, table: HostAdam) -> ShardedTensor:
    """What the optimizer asks the model's state for, of the number; not written by that name."""
    return ShardedTensor.from_rank_offsets(
        f"{place.key}.stand_in", table.home.stand_in, replica_id=place.replica_id
    )


def _sharded(place: ShardedTensor, table: HostAdam) -> dict[str, ShardedTensor]:
    """State of a table at its place in the checkpoint, up to date."""
    table.expand()
    make_state(table.state, table.master)
    tensors = {"param": table.master, **table.state}
    table.drop(loaded=False)
    del tensors["step"]  # param_groups have it
    return {
        name: replace(
            place, key=f"optimizer.state.{name}.{place.key}", data=data.detach(), dtype=data.dtype
        )
        for name, data in tensors.items()
    }


@torch.no_grad()
def _load(table: HostAdam, tensors: Mapping[str, Tensor], steps: int) -> None:
    make_state(table.state, table.master)
    table.master.copy_(tensors["param"])
    for name in ("exp_avg", "exp_avg_sq"):
        table.state[name].copy_(tensors[name])
    table.state["step"].fill_(steps)
    table.drop(loaded=True)
