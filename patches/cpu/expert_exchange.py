"""Tokens travel between experts on a CPU: how many go where is a sequence, as on a GPU."""

from collections.abc import Callable
from typing import Any

import torch

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch


def _also_on_the_host(move: Callable[..., Any]) -> Callable[..., Any]:
    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    return maybe_move_tensor_to_cpu


def _install(editor: Editor) -> None:
    editor.wrap(
        "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        _also_on_the_host,
        parameters=("tensor", "as_numpy", "record_stream"),
    )


PATCH = Patch(
    name="cpu.expert_exchange",
    symbols=("megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",),
    reason="It makes arrays of CUDA tensors alone; all_to_all_single takes no tensors for sizes: "
    "--moe-token-dispatcher-type alltoall ends in a TypeError.",
    delete_when="as_numpy holds for tensors that are on the CPU already.",
    install=_install,
    active=without_cuda,
    versions=">=0.19,<0.20",
)
