"""Where there is no CUDA, the calls of torch.cuda that training makes are answered by the host.

One device (number 0, the CPU), streams that run everything at once, memory figures of the process.
`torch.cuda.is_available()` keeps telling the truth, so code that asks may still choose.
"""

import contextlib
import resource
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, Self

import torch

from ultramem_megatron.patches.cpu.devices import import_dynamo, without_cuda
from ultramem_megatron.patches.patch import Editor, Patch

_PAGE_BYTES = resource.getpagesize()


class HostEvent:
    """A CUDA event on a device that finishes every operation before returning."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "HostEvent") -> float:
        return 0.0


class HostStream:
    """A CUDA stream on a device that finishes every operation before returning."""

    cuda_stream = 0
    device_index = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        return event or HostEvent()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


_STREAM = HostStream()


def _ignored_context(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    """As torch's, it may be entered again: DDP does, with several optimizer instances."""
    return contextlib.nullcontext()


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _resident_bytes(device: Any = None) -> int:
    """Memory of this process that is in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def _peak_bytes(device: Any = None) -> int:
    """Largest resident memory of this process so far (the kernel counts in KiB, a little late)."""
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, _resident_bytes())


def _memory_stats(device: Any = None) -> dict[str, int]:
    now, peak = _resident_bytes(), _peak_bytes()
    return {
        "reserved_bytes.all.current": now,
        "reserved_bytes.all.peak": peak,
        "allocated_bytes.all.current": now,
        "allocated_bytes.all.peak": peak,
        "allocation.all.current": 0,
    }


def _properties(device: Any = None) -> SimpleNamespace:
    # Compute capability 0.0: nothing that asks for a minimum will choose a CUDA kernel.
    return SimpleNamespace(
        name="cpu", major=0, minor=0, multi_processor_count=1, total_memory=_peak_bytes()
    )


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    # Not torch.manual_seed: that one would call torch.cuda.manual_seed_all in turn.
    torch.default_generator.manual_seed(seed)


# --profile starts and stops a profiler of CUDA's that runs beside the process.
_RUNTIME = SimpleNamespace(cudaProfilerStart=lambda: 0, cudaProfilerStop=lambda: 0)

CALLS: dict[str, Any] = {
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "set_device": _nothing,
    "device": _ignored_context,
    "get_device_properties": _properties,
    "get_device_capability": lambda device=None: (0, 0),
    "get_device_name": lambda device=None: "cpu",
    "Stream": HostStream,
    "Event": HostEvent,
    "stream": _ignored_context,
    "set_stream": _nothing,
    "current_stream": lambda device=None: _STREAM,
    "default_stream": lambda device=None: _STREAM,
    "synchronize": _nothing,
    "is_current_stream_capturing": lambda: False,
    "empty_cache": _nothing,
    "memory_allocated": _resident_bytes,
    "memory_reserved": _resident_bytes,
    "max_memory_allocated": _peak_bytes,
    "max_memory_reserved": _peak_bytes,
    "device_memory_used": _resident_bytes,
    "memory_stats": _memory_stats,
    "reset_peak_memory_stats": _nothing,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "random.get_rng_state": _get_rng_state,
    "random.set_rng_state": _set_rng_state,
    "manual_seed": _manual_seed,
    "cudart": lambda: _RUNTIME,
    "check_error": _nothing,
    "nvtx.range_push": _nothing,
    "nvtx.range_pop": _nothing,
}
"""What each attribute of torch.cuda becomes."""


def _own(answer: Any) -> Any:
    """A function that no other name has: torch's compiler has rules by name and looks up by object.

    It refuses an object with two rules ("Duplicate torch object") when it makes its list anew.
    """
    if not isinstance(answer, FunctionType):
        return answer
    return FunctionType(answer.__code__, answer.__globals__, answer.__name__, answer.__defaults__)


def _install(editor: Editor) -> None:
    import_dynamo()
    for name, answer in CALLS.items():
        editor.replace(f"torch.cuda.{name}", _own(answer))


PATCH = Patch(
    name="cpu.cuda_calls",
    symbols=tuple(f"torch.cuda.{name}" for name in CALLS),
    reason="Megatron calls torch.cuda directly for streams, seeds, memory and device numbers.",
    delete_when="Megatron reaches its device through torch.accelerator or a layer of its own.",
    install=_install,
    active=without_cuda,
)
