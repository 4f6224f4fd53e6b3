"""A whole memory layer as in the paper's 1.6B model: time, launches, host waits, memory."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from launch.benchmarks.kernels.measure import extra_memory, timed
from launch.gpu_report.row import Row, attempted
from ultramem_megatron.memory.config import UltraMemConfig
from ultramem_megatron.memory.layer import UltraMemLayer
from ultramem_megatron.memory.spans import Span

_SHOWN = 25  # kernels that take longest
_CASES = (
    ("preset", 1789, 5),
    ("no convolution", 1789, 0),
    ("aligned keys, no convolution", 1792, 0),
)


def rows(large: bool) -> Iterator[Row]:
    """Microseconds and counts of a step: filter update, forward, backward."""
    for words, keys, taps in _CASES:
        name = f"{words}, T {8192 if large else 16}"
        yield from attempted(f"layer, {name}", partial(_measured, keys, taps, name, large))


def _measured(keys: int, taps: int, name: str, large: bool) -> Iterator[Row]:
    device = torch.device("cuda" if large else "cpu")
    layer, x = _layer(keys, taps, device, large)

    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        layer.end_batch()
        layer.after_step()
        output = layer(x)
        output.backward(output.detach())

    @torch.no_grad()
    def forward() -> None:
        layer(x)

    for what, run in (("forward", forward), ("forward and backward", step)):
        taken = round(1e3 * timed(run, device).median, 1)
        yield Row(what=f"layer {what}, {name}", value=taken, unit="us")
    extra = extra_memory(step, device)
    if extra is not None:
        yield Row(what=f"layer extra memory, {name}", value=round(extra / 1e6, 1), unit="MB")
    if device.type == "cuda":
        yield Row(what=f"host waits, {name}", value=_host_waits(step))
        yield from attempted(f"launches, {name}", lambda: _launches(step, name))


def _layer(
    keys: int, taps: int, device: torch.device, large: bool
) -> tuple[UltraMemLayer, torch.Tensor]:
    config = UltraMemConfig(
        spans=(Span(1, 2),),
        num_keys=keys if large else 24,
        key_dim=800 if large else 16,
        value_dim=1024 if large else 16,
        topk=42 if large else 4,
        query_conv_kernel=taps,
    )
    hidden, tokens, dtype = (2048, 8192, torch.bfloat16) if large else (32, 16, torch.float32)
    torch.manual_seed(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            layer = UltraMemLayer(config, hidden_size=hidden, num_layers=32)
    finally:
        torch.set_default_dtype(before)
    table: Any = layer.values.weight
    table.main_grad = torch.zeros(table.shape, device=device)
    x = torch.randn(tokens // 4, 4, hidden, device=device, dtype=dtype)
    return layer, x.requires_grad_()


def _host_waits(step: Callable[[], None]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _launches(step: Callable[[], None], name: str) -> Iterator[Row]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        step()
        torch.cuda.synchronize()
    events = [e for e in recorded.key_averages() if e.device_type == DeviceType.CUDA]
    yield Row(what=f"launches, {name}", value=sum(event.count for event in events))
    for event in sorted(events, key=lambda e: -e.self_device_time_total)[:_SHOWN]:
        what = f"{event.key[:70]} x {event.count}, {name}"
        yield Row(what=what, value=round(event.self_device_time_total, 1), unit="us")
