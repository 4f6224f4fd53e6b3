"""Where there is no CUDA, the device "cuda" means the CPU.

Megatron writes the device into its tensor constructors. The functions that accept a device are
replaced, rather than putting a TorchFunctionMode over the whole program: a mode costs 1.6 us on
every tensor operation and 1.2 us on every attribute, this costs 0.3 us and only where a tensor
is made or moved (measured 2026-11, torch 2.15.0), and it holds in all threads.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils import _device

from ultramem_megatron.patches.patch import Editor, Patch

_CPU = torch.device("cpu")
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like")
_RANDOM_LIKE = ("rand_like", "randn_like", "randint_like")
_METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")


def without_cuda() -> bool:
    """Whether this machine lacks a usable CUDA device."""
    return not torch.cuda.is_available()


def host_device(device: Any) -> Any:
    """The CPU for any way to write a CUDA device ("cuda:1", 0, torch.device); others unchanged."""
    if isinstance(device, str):
        return _CPU if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    return device


def _with_host_device(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def construct(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = host_device(kwargs["device"])
        kwargs.pop("pin_memory", None)  # a request to CUDA
        return original(*args, **kwargs)

    return construct


def _to_host_device(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (host_device(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = host_device(kwargs["device"])
        return original(self, *args, **kwargs)

    return to


class _AnyGenerator(type(torch.Generator)):  # type: ignore[misc]  # a metaclass found at run time
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _GENERATOR)


_GENERATOR = torch.Generator


class HostGenerator(torch.Generator, metaclass=_AnyGenerator):
    """torch.Generator on the CPU for any way to write a CUDA device."""

    def __new__(cls, device: Any = "cpu") -> Self:
        return super().__new__(cls, host_device(device))  # type: ignore[call-arg]  # torch declares no __new__


def _stay(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


def _type_for_megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers sort parameters by type strings such as "torch.cuda.FloatTensor"."""

    @functools.wraps(original)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        name: str = original(self)
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.") else name

    return type_name


def _constructor_paths() -> list[str]:
    # Filled from torch's own list of constructors with a device; torch caches that list, so that
    # `with torch.device(...)` keeps knowing the originals by identity.
    names = {f"torch.{f.__name__}" for f in _device._device_constructors()}
    names = {name for name in names if hasattr(torch, name.removeprefix("torch."))}
    return sorted(names | {f"torch.{name}" for name in (*_LIKE, *_RANDOM_LIKE)})


def import_dynamo() -> None:
    """Let torch's compiler list torch's functions, by identity, before some are replaced.

    It does so when it is imported, which Megatron does at some point anyway.
    """
    importlib.import_module("torch._dynamo")


def _install(editor: Editor) -> None:
    import_dynamo()
    for path in _constructor_paths():
        editor.wrap(path, _with_host_device)
    for method in _METHODS:
        editor.wrap(f"torch.Tensor.{method}", _with_host_device)
    editor.wrap("torch.Tensor.to", _to_host_device)
    editor.replace("torch.Tensor.cuda", _stay)
    editor.replace("torch.Tensor.pin_memory", _stay)
    editor.replace("torch.Generator", HostGenerator)
    editor.wrap("torch.Tensor.type", _type_for_megatron)


PATCH = Patch(
    name="cpu.devices",
    symbols=("torch.tensor", "torch.empty", "...", "torch.Tensor.to", "torch.Tensor.type"),
    reason='Megatron passes device="cuda" literally; there is no setting for another device.',
    delete_when="Megatron takes its device from one place that can be set to the CPU.",
    install=_install,
    active=without_cuda,
)
