"""The distributed optimizer's default checkpoint has room for ranks that have nothing of a bucket.

A bucket that is small beside its ranks (a norm alone, by --ddp-bucket-size; numbers that stand for
tables in host memory) is padded to a multiple of them, and behind its last parameter a rank's shard
is all padding. Upstream refuses that ("empty bucket encountered"), for what has no tensor in it is
lost from a list of buckets on the way to the checkpoint and back. Here it is an entry of padding,
as there are between parameters, and a bucket goes by its number.
"""

import functools
from collections.abc import Callable
from typing import Any

from ultramem_megatron.patches.patch import Editor, Patch

_CLASS = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_STATE = f"{_CLASS}.get_parameter_state_dp_reshardable"
_SAVED = f"{_CLASS}.sharded_param_state_dp_reshardable"
_LOADED = f"{_CLASS}.load_parameter_state_from_dp_reshardable"


def _padding_alone(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_parameter_state_dp_reshardable(self: Any) -> Any:
        state = original(self)
        ranks, rank = self.data_parallel_group.size(), self.data_parallel_group.rank()
        for number, buffer in enumerate(self.buffers):
            for shards in state[number].values():
                for shard, bucket in zip(shards, buffer.buckets, strict=True):
                    size = bucket.grad_data.numel() // ranks
                    if not shard and rank * size >= bucket.numel_unpadded:
                        whole = {"gbuf_local_start": 0, "gbuf_local_end": size}
                        shard.append({**whole, "padding": True})
        return state

    return get_parameter_state_dp_reshardable


def _by_number(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded_param_state_dp_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        for number in range(len(self.buffers)):
            for dtype, buckets in state[number].items():
                state[number][dtype] = {
                    index: bucket
                    for index, bucket in enumerate(buckets)
                    if any(len(entry) > 1 for entry in bucket)
                }
        return state

    return sharded_param_state_dp_reshardable


def _as_lists(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_parameter_state_from_dp_reshardable(self: Any, state_dict: Any) -> Any:
        for number, ranges in enumerate(self.gbuf_ranges):
            found = state_dict.get(number, {})
            state_dict[number] = {
                dtype: [found.get(dtype, {}).get(index, []) for index in range(len(buckets))]
                for dtype, buckets in ranges.items()
            }
        return original(self, state_dict)

    return load_parameter_state_from_dp_reshardable


def _install(editor: Editor) -> None:
    editor.wrap(_STATE, _padding_alone, ("self",))
    editor.wrap(_SAVED, _by_number, ("self", "model_sharded_state_dict", "is_loading", "metadata"))
    editor.wrap(_LOADED, _as_lists, ("self", "state_dict"))


PATCH = Patch(
    name="defects.distopt_empty_shard",
    symbols=(_STATE, _SAVED, _LOADED),
    reason="The assertion stands in the middle of sharded_param_state_dp_reshardable().",
    delete_when="sharded_param_state_dp_reshardable() has no `assert bucket_state`.",
    install=_install,
)
