"""Megatron's own attention with context parallelism: each rank gathers the keys and values of all.

Upstream only Transformer Engine's attention has it, which needs a GPU. Here queries stay at home,
keys and values are gathered and put into the sequence's order. Exact, and with a score for each of
the rank's queries and all keys: for machines without Transformer Engine, not for long contexts.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ultramem_megatron.communication.sequence_chunks import gather_in_order, own_chunks
from ultramem_megatron.errors import UltraMemError
from ultramem_megatron.patches.patch import Editor, Patch

_ATTENTION = "megatron.core.transformer.dot_product_attention.DotProductAttention"


def _init(original: Any) -> Any:
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.context_parallel_size == 1:
            original(self, config, *args, **kwargs)
            return
        if config.window_size is not None:
            raise UltraMemError(
                f"--context-parallel-size {config.context_parallel_size} with --window-size "
                f"{config.window_size} needs Transformer Engine. Give up one of the two."
            )
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        original(self, alone, *args, **kwargs)
        self.config = config

    return init


def _forward(original: Any) -> Any:
    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.config.context_parallel_size > 1:
            group = _group(self)
            key, value = gather_in_order(key, group), gather_in_order(value, group)
            if attention_mask is None:
                positions = torch.arange(len(key), device=key.device)
                attention_mask = positions > own_chunks(positions, group)[:, None]
        return original(self, query, key, value, attention_mask, *args, **kwargs)

    return forward


def _group(attention: Any) -> dist.ProcessGroup:
    from megatron.core import parallel_state

    group: dist.ProcessGroup | None = getattr(attention.pg_collection, "cp", None)
    return group or parallel_state.get_context_parallel_group()


def _install(editor: Editor) -> None:
    editor.wrap(f"{_ATTENTION}.__init__", _init)
    editor.wrap(f"{_ATTENTION}.forward", _forward)


PATCH = Patch(
    name="cpu.context_parallel_attention",
    symbols=(f"{_ATTENTION}.__init__", f"{_ATTENTION}.forward"),
    reason="DotProductAttention asserts context_parallel_size == 1 (its __init__).",
    delete_when="Megatron's local attention has context parallelism.",
    install=_install,
)
