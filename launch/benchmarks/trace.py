"""What ran when, from a profiler's trace: layers, exchanges, and waiting for them.

All times in microseconds of the profiler's clock.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

ISSUE, WAIT, LAYER = "ultramem/issue ", "ultramem/wait ", "layer "


class Interval(NamedTuple):
    """From `start` to `end`, in microseconds."""

    name: str
    start: float
    end: float

    @property
    def length(self) -> float:
        """Microseconds."""
        return self.end - self.start


@contextmanager
def marked_layers(block: Any) -> Iterator[None]:
    """Within it, traces show where each layer of a TransformerBlock begins and ends.

    As events without length, "layer 3 forward begins", "layer 3 backward ends" and so on.
    """
    hooks = []
    for layer in block.layers:
        name = f"{LAYER}{layer.layer_number}"
        hooks.append(layer.register_forward_pre_hook(_mark_input(name), with_kwargs=True))
        hooks.append(layer.register_forward_hook(_mark_output(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mark_input(name: str) -> Callable[[nn.Module, Any, dict[str, Any]], Any]:
    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        marked = _Mark.apply(
            kwargs["hidden_states"], f"{name} forward begins", f"{name} backward ends"
        )
        return args, {**kwargs, "hidden_states": marked}

    return hook


def _mark_output(name: str) -> Callable[[nn.Module, Any, tuple[Tensor, Any]], Any]:
    def hook(_: nn.Module, _args: Any, output: tuple[Tensor, Any]) -> Any:
        hidden_states, context = output
        ends, begins = f"{name} forward ends", f"{name} backward begins"
        return _Mark.apply(hidden_states, ends, begins), context

    return hook


class _Mark(torch.autograd.Function):
    """Leaves an event where forward comes through, and one where backward does."""

    @staticmethod
    def forward(ctx, x, forward_event, backward_event):
        ctx.event = backward_event
        with record_function(forward_event):
            return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        with record_function(ctx.event):
            return grad, None, None


def traced(run: Callable[[], Any]) -> profile:
    """The profiler's trace of `run()`."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return trace


def events(trace: profile, *prefixes: str) -> list[Interval]:
    """Events on the host whose names begin so, in order of their start."""
    found = [
        Interval(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events() or []
        if event.name.startswith(prefixes) and event.device_type == torch.autograd.DeviceType.CPU
    ]
    return sorted(found, key=lambda interval: interval.start)


def layer_intervals(trace: profile) -> list[Interval]:
    """Each marked layer's forward and backward, "layer 3 forward"."""
    marks = {event.name: event for event in events(trace, LAYER)}
    names = [name.removesuffix(" begins") for name in marks if name.endswith(" begins")]
    return [
        Interval(name, marks[f"{name} begins"].start, marks[f"{name} ends"].end) for name in names
    ]


def transfers(trace: profile) -> list[Interval]:
    """Each exchange from its issue until someone has it; of a trace with one memory and step."""
    ends = {event.name.removeprefix(WAIT): event.end for event in events(trace, WAIT)}
    return [
        Interval(purpose, event.start, ends[purpose])
        for event in events(trace, ISSUE)
        if (purpose := event.name.removeprefix(ISSUE)) in ends
    ]


def exposed(trace: profile) -> float:
    """Microseconds in which nothing but communication happened.

    On a CPU: inside waits. On a GPU: while NCCL kernels ran and no other kernel did.
    """
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in trace.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    if not kernels:
        return sum(wait.length for wait in events(trace, WAIT))
    moving = [(start, end) for name, start, end in kernels if name.startswith("nccl")]
    computing = [(start, end) for name, start, end in kernels if not name.startswith("nccl")]
    return covered(moving + computing) - covered(computing)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
