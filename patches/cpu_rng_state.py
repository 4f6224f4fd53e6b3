"""Megatron's random streams live in the generator of the CPU where there is no CUDA."""

import logging
from typing import Any

import torch

from ultramem_megatron.patches.cpu_devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_MODULE = "megatron.core.tensor_parallel.random"


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _drop_shared_generator_warning(record: logging.LogRecord) -> bool:
    # A forked stream moves the CPU generator by design here; upstream takes it for a mistake.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _install(editor: Editor) -> None:
    editor.replace(
        f"{_MODULE}._set_cuda_rng_state", _set_rng_state, ("new_state", "device", "graph_safe")
    )
    module_logger = logging.getLogger(_MODULE)
    module_logger.addFilter(_drop_shared_generator_warning)
    editor.on_revert(lambda: module_logger.removeFilter(_drop_shared_generator_warning))


PATCH = Patch(
    name="cpu_rng_state",
    symbols=(f"{_MODULE}._set_cuda_rng_state",),
    reason="It sets torch.cuda.default_generators, which are empty without CUDA.",
    delete_when="Megatron sets generator states through torch.accelerator.",
    install=_install,
    active=without_cuda,
)
