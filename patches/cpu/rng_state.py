"""Megatron's random streams live in the generator of the CPU where there is no CUDA.

With CUDA, host work and the model draw from generators of their own. Here they share one, so host
work that comes after a checkpoint's random state was loaded has to leave it as it found it;
otherwise a run with dropout would not resume to the same numbers.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from ultramem_megatron.patches.cpu.devices import without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_MODULE = "megatron.core.tensor_parallel.random"
_GET = f"{_MODULE}._get_cuda_rng_state"
_SET = f"{_MODULE}._set_cuda_rng_state"
_BUILD_ITERATORS = "megatron.training.training.build_train_valid_test_data_iterators"


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
    # A graph-safe state is a generator. None refers to the CPU's own, so it is a copy.
    return torch.default_generator.clone_state() if graph_safe else torch.get_rng_state()


def _set_rng_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state.get_state() if graph_safe else new_state)


def _keep_generator(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build_train_valid_test_data_iterators(*args: Any, **kwargs: Any) -> Any:
        # Every iterator of a torch DataLoader draws a seed for its workers.
        state = torch.get_rng_state()
        try:
            return original(*args, **kwargs)
        finally:
            torch.set_rng_state(state)

    return build_train_valid_test_data_iterators


def _drop_shared_generator_warning(record: logging.LogRecord) -> bool:
    # A forked stream moves the CPU generator by design here; upstream takes it for a mistake.
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _install(editor: Editor) -> None:
    editor.replace(_GET, _get_rng_state, ("device", "clone", "graph_safe"))
    editor.replace(_SET, _set_rng_state, ("new_state", "device", "graph_safe"))
    editor.wrap(_BUILD_ITERATORS, _keep_generator, ("build_train_valid_test_datasets_provider",))
    module_logger = logging.getLogger(_MODULE)
    module_logger.addFilter(_drop_shared_generator_warning)
    editor.on_revert(lambda: module_logger.removeFilter(_drop_shared_generator_warning))


PATCH = Patch(
    name="cpu.rng_state",
    symbols=(_GET, _SET, _BUILD_ITERATORS),
    reason="The first two use torch.cuda.default_generators, which are empty without CUDA; the "
    "last makes data loaders without a generator of their own.",
    delete_when="Megatron sets generator states through torch.accelerator.",
    install=_install,
    active=without_cuda,
)
